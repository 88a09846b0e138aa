"""A small run with everything that a resume could get wrong: adapters of different rank, dropout, batch size and
schedule, shuffled data, accumulation over batches, validations in the middle of epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.runs import language_model, text_file

ADAPTERS: dict[str, dict[str, Any]] = {
    "sql": {"rank": 4, "dropout": 0.2, "lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    "legal": {"rank": 2, "dropout": 0.1, "lr": 3e-3, "bias": True, "plain_modules": ["lm_head"], "max_steps": 9},
    "chat": {"rank": 3, "lr": 1e-2, "target_modules": ["q_proj", "up_proj"], "schedule": "constant"},
}
SOURCES: dict[str, dict[str, Any]] = {
    "sql": {"batch_size": 2, "max_length": 16},
    "legal": {"batch_size": 3, "max_length": 24},
    "chat": {"batch_size": 1, "max_length": 16},
}
STEPS = 11
"""Optimizer steps; two batches each, but for the last of an epoch: an epoch has an odd number of batches."""


def module_of(folder: Path, names: list[str] | None = None, **changes: Any) -> MultiAdapterModule:
    """The module; ``names`` picks some of the adapters, ``changes`` alters all of them."""
    if not (folder / "llama/config.json").exists():
        language_model(folder / "llama")
    configs = {name: AdapterConfig(**ADAPTERS[name] | changes) for name in names or ADAPTERS}
    return MultiAdapterModule(BackboneConfig(str(folder / "llama")), configs)


def data_of(folder: Path, names: list[str] | None = None, lines: int = 12) -> AdapterDataModule:
    """Its data: a text for each adapter."""
    sources = {}
    for name in names or ADAPTERS:
        path = folder / f"{name}.txt"
        if not path.exists():
            text_file(path, name, lines=lines)
        sources[name] = DataConfig(str(path), **SOURCES[name])
    return AdapterDataModule(sources)


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet trainer on the CPU, whose output lies in ``folder``."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    usual = {
        "devices": 1,
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 5,
        "limit_val_batches": 2,
    }
    usual |= {"check_val_every_n_epoch": None, "enable_checkpointing": False, "default_root_dir": folder}
    if any(isinstance(callback, Checkpoint) for callback in callbacks):
        usual["enable_checkpointing"] = True
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet | usual | options)


class Diary(Callback):
    """What a run did: the loss of every adapter in every batch and validation, by number of the batch."""

    def __init__(self) -> None:
        self.train: dict[tuple[int, str], float] = {}
        self.val: dict[tuple[int, str], float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        self._note(trainer, self.train, "train/", batch["adapters"])  # the others' values are of earlier batches

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, self.val, "val/", list(ADAPTERS))

    def _note(self, trainer: Trainer, into: dict[tuple[int, str], float], prefix: str, names: list[str]) -> None:
        for name in names:
            value = trainer.callback_metrics.get(f"{prefix}{name}/loss")
            if value is not None:
                into[trainer.fit_loop.total_batch_idx, name] = float(value)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Weights, optimizer and schedule at the end of a run."""
    return {
        "weights": trainer.lightning_module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "calls": {adapter.name: adapter.calls for adapter in trainer.lightning_module.adapters.adapters()},
        "step": trainer.global_step,
    }


def differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two nested containers differ; tensors bit for bit."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return [] if mine.dtype == theirs.dtype and torch.equal(mine, theirs) else [path]
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted({*mine, *theirs}, key=str)
        gone = [f"{path}/{key}" for key in keys if (key in mine) != (key in theirs)]
        both = [key for key in keys if key in mine and key in theirs]
        return gone + [found for key in both for found in differences(mine[key], theirs[key], f"{path}/{key}")]
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple) and len(mine) == len(theirs):
        pairs = enumerate(zip(mine, theirs, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{path}/{index}")]
    return [] if mine == theirs or (callable(mine) and callable(theirs)) else [path]


HOOKS = ("batch", "validation start", "validation batch", "validation end", "epoch end")


class SaveAt(Callback):
    """Checkpoints of a running fit: after each batch, in each validation, at the end of each epoch, as chosen."""

    def __init__(self, folder: Path, chosen: Callable[[str, int], bool] = lambda hook, batch: True) -> None:
        self.folder, self.chosen = folder, chosen
        self.saved: list[tuple[str, int, Path]] = []

    def _save(self, trainer: Trainer, hook: str) -> None:
        batch = trainer.fit_loop.total_batch_idx
        if not trainer.sanity_checking and self.chosen(hook, batch):
            path = self.folder / f"{batch:03d}-{hook.replace(' ', '-')}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append((hook, batch, path))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validation start")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 0:
            self._save(trainer, "validation batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validation end")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch end")


def reference(folder: Path, *callbacks: Callback, **options: Any) -> tuple[dict[str, Any], Diary]:
    """The run that nothing interrupts: its end and its diary."""
    diary = Diary()
    trainer = trainer_of(folder / "reference", diary, *callbacks, **options)
    trainer.fit(module_of(folder), datamodule=data_of(folder))
    return state_of(trainer), diary


def resumed(folder: Path, path: Path, **options: Any) -> tuple[dict[str, Any], Diary]:
    """The run that goes on from ``path``."""
    diary = Diary()
    trainer = trainer_of(folder / "resumed", diary, **options)
    trainer.fit(module_of(folder), datamodule=data_of(folder), ckpt_path=str(path))
    return state_of(trainer), diary


def faults(
    hook: str, batch: int, whole: tuple[dict[str, Any], Diary], again: tuple[dict[str, Any], Diary]
) -> list[str]:
    """In what a resumed run differs from the uninterrupted one after ``batch``: end, losses, validations."""
    found = differences(again[0], whole[0])
    found += differences(again[1].train, {at: loss for at, loss in whole[1].train.items() if at[0] > batch}, "train")
    validated = ("validation end", "epoch end")
    to_come = {at: v for at, v in whole[1].val.items() if at[0] > batch or (at[0] == batch and hook not in validated)}
    return found + differences(again[1].val, to_come, "val")
