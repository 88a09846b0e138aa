"""The same run on one process or several under Lightning's DDP, as a program: what a user starts.

python -m tests.resilience.ddp FOLDER PROCESSES"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed

from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig
from finetuna_lightning.errors import BackboneError
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.trainer_state import TrainerCheckpoint
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.distributed import check_same_backbone
from finetuna_lightning.training.module import MultiAdapterModule
from tests.resilience.runs import Diary, trainer_of

STEPS = 8
ADAPTERS: dict[str, dict[str, Any]] = {
    "sql": {"rank": 4, "lr": 1e-3, "schedule": "cosine", "dropout": 0.3},
    "legal": {"rank": 2, "lr": 1e-3, "bias": True, "plain_modules": ["lm_head"], "max_steps": 5},
    "chat": {"rank": 3, "dropout": 0.2, "lr": 1e-3, "target_modules": ["q_proj", "up_proj"], "schedule": "constant"},
}
BATCHES = {"sql": 4, "legal": 3, "chat": 1}  # chat has fewer rows than there are processes
SCENARIOS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "joint": (["sql", "legal", "chat"], {"accumulate_grad_batches": 2}),
    "one row": (["chat"], {"accumulate_grad_batches": 1}),  # a process without any row
}


class Spy:
    """Bytes that collectives of torch.distributed move, by kind; DDP's own reducer is asked separately."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        for name in ("_broadcast_coalesced", "broadcast", "all_reduce", "all_gather", "reduce_scatter"):
            setattr(distributed, name, self._counting(name, getattr(distributed, name)))

    def _counting(self, name: str, inner: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found: list[torch.Tensor] = []
            torch.utils._pytree.tree_map_only(torch.Tensor, found.append, (args, kwargs))
            self.bytes[name] = self.bytes.get(name, 0) + sum(t.numel() * t.element_size() for t in found)
            return inner(*args, **kwargs)

        return counted


class Reducer(Callback):
    """What DDP says of the parameters whose gradients it sends, and the norm of every adapter's gradient: Adam hides
    a wrong scale."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.norms: dict[tuple[int, str], float] = {}
        self.rows = 0  # of the largest batch of this process

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows = max(self.rows, len(batch["input_ids"]))
        for name in batch["adapters"]:
            if f"train/{name}/grad_norm" in trainer.callback_metrics:
                self.norms[index, name] = float(trainer.callback_metrics[f"train/{name}/grad_norm"])

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        model: Any = trainer.strategy.model
        said = model._get_ddp_logging_data() if hasattr(model, "_get_ddp_logging_data") else {}
        self.found = {key: said.get(key) for key in ("num_parameter_tensors", "total_parameter_size_bytes")}


def run(folder: Path, processes: int, names: list[str], options: dict[str, Any]) -> dict[str, Any] | None:
    """One fit; what it came to, on the first process."""
    spy = Spy() if processes > 1 else None
    out = folder / f"{processes}-{'-'.join(names)}"
    module = MultiAdapterModule(
        BackboneConfig(str(folder / "llama")), {name: AdapterConfig(**ADAPTERS[name]) for name in names}
    )
    data = AdapterDataModule(
        {name: DataConfig(str(folder / f"{name}.txt"), batch_size=BATCHES[name], max_length=16) for name in names}
    )
    diary, reducer, adapters = Diary(), Reducer(), AdapterCheckpoint()
    strategy = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    options = {"max_steps": STEPS, "val_check_interval": 4, "limit_val_batches": None} | strategy | options
    trainer = trainer_of(out, diary, reducer, adapters, TrainerCheckpoint(), **options)
    trainer.fit(module, datamodule=data)
    refused = ""
    try:
        check_same_backbone(trainer, f"that of {trainer.global_rank}")
    except BackboneError as error:
        refused = str(error)
    if not trainer.is_global_zero:
        return None
    assert module.backbone is not None
    return {
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
        "adapter bytes": sum(adapter.nbytes for adapter in module.adapters.adapters()),
        "backbone bytes": module.adapters.backbone_nbytes,
        "train": diary.train,
        "val": diary.val,
        "best": adapters.best_scores,
        "bytes": {} if spy is None else dict(spy.bytes),
        "reducer": reducer.found,
        "norms": reducer.norms,
        "rows": reducer.rows,
        "refused": refused,
    }


def main(folder: Path, processes: int) -> None:
    warnings.simplefilter("ignore")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {name: run(folder, processes, *scenario) for name, scenario in SCENARIOS.items()}
    if all(value is not None for value in found.values()):
        torch.save(found, folder / f"{processes}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
