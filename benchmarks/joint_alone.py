"""An adapter in company against the same adapter alone: how far apart its loss curve and its weights end.

    python -m benchmarks.joint_alone                                     # fp32 compute, on this machine's CPU
    python -m benchmarks.joint_alone --deterministic                     # bit for bit
    python -m benchmarks.joint_alone --dtype bfloat16 --device cuda --split    # beside another batch split

Four adapters of different rank, targets, dropout, batch size, length and schedule over the quickstart backbone.
Differences are relative: of the curve ||a - b|| / ||b||, of the weights the same over all of an adapter's tensors. With
``--split`` (dropout off) the solo run comes again with a pass for each sequence: the same batches in other shapes, so
what rounding alone does to a run in this precision."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import AutoTokenizer

import finetuna_lightning as ft
from benchmarks.common import machine
from finetuna_lightning.backbone import QUICKSTART_FOLDER
from finetuna_lightning.training.batches import sequences

ADAPTERS: dict[str, dict[str, Any]] = {
    "one": dict(rank=16, alpha=32, dropout=0.1, lr=2e-3, schedule="cosine", warmup_steps=5),
    "two": dict(rank=4, alpha=8, target_modules=["q_proj", "v_proj"], dropout=0.05, lr=3e-3, schedule="linear"),
    "three": dict(
        rank=8, alpha=16, target_modules=["mlp.up_proj", "o_proj"], dropout=0.2, lr=1e-3, schedule="constant"
    ),
    "four": dict(rank=32, alpha=32, target_modules=["q_proj", "down_proj"], dropout=0.1, lr=2e-3, max_steps=40),
}
SOURCES: dict[str, dict[str, Any]] = {
    "one": dict(path="quickstart:english", max_length=96, batch_size=3),
    "two": dict(path="quickstart:bytecode", max_length=64, batch_size=5),
    "three": dict(path="quickstart:c_headers", max_length=128, batch_size=2),
    "four": dict(path="quickstart:english", max_length=48, batch_size=4),
}


class Split(ft.MultiAdapterModule):
    """Each sequence in a pass of its own."""

    def _pass(self, batch: dict[str, Any], training: bool, bare: bool = False) -> Any:
        parts = [super(Split, self)._pass(part, training, bare).logits for _, part, _, _ in sequences(batch)]
        return SimpleNamespace(logits=torch.cat(parts, 1 if "lengths" in batch else 0))


class Curve(pl.Callback):
    """Every adapter's training losses."""

    def __init__(self) -> None:
        self.losses: dict[str, list[Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in batch["adapters"]:
            value = trainer.callback_metrics.get(f"train/{name}/loss")
            if value is not None:
                self.losses.setdefault(name, []).append(value.detach().cpu().double())


def run(names: list[str], given: argparse.Namespace, kind: Any = ft.MultiAdapterModule) -> dict[str, Any]:
    """By adapter: its losses, and its weights in one vector."""
    source = str(Path(__file__).parents[1] / "tests/data/quickstart_bf16")  # the shipped folder is in int8
    scheme, folder = ("fp8", source) if given.fp8 else ("int8", "quickstart")
    backbone = ft.BackboneConfig(folder, scheme=scheme, dtype=given.dtype)
    changes = {"dropout": 0.0} if given.split else {}
    adapters = {name: ft.AdapterConfig(**ADAPTERS[name] | changes) for name in names}
    module = kind(backbone, adapters, deterministic=given.deterministic)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_FOLDER)
    data = ft.AdapterDataModule({name: ft.DataConfig(**SOURCES[name]) for name in names}, tokenizer=tokenizer)
    curve = Curve()
    plugin = ft.EightBitPrecision(dtype=given.dtype, compute="fp8" if given.fp8 else "16bit")
    trainer = pl.Trainer(
        accelerator="gpu" if given.device == "cuda" else "cpu", devices=1, max_steps=given.steps, max_epochs=-1,
        plugins=[plugin], callbacks=[curve], logger=False, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    weights = {
        name: torch.cat([p.detach().cpu().double().flatten() for p in module.adapters[name].parameters()])
        for name in names
    }
    return {name: (torch.stack(curve.losses[name]), weights[name]) for name in names}


def apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative differences of curve and weights."""
    curve, weights = (float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))
    return curve, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--deterministic", action="store_true", help="one pass for each adapter, at its own shapes")
    parser.add_argument("--split", action="store_true", help="also a solo run with a pass for each sequence")
    parser.add_argument("--fp8", action="store_true", help="fp8 storage and fp8 products (a GPU that has them)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    joint = run(list(ADAPTERS), given)
    form = "deterministic" if given.deterministic else "joint"
    storage = "fp8 storage and products" if given.fp8 else "int8 storage"
    print(f"{given.dtype} compute on {given.device} over {storage}, {form}, {given.steps} steps; {machine()}")
    columns = ["curve: joint, alone", "weights: joint, alone"]
    columns += ["curve: split, alone", "weights: split, alone"] if given.split else []
    print("| adapter | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in ADAPTERS:
        alone = run([name], given)[name]
        cells = list(apart(joint[name], alone))
        if given.split:
            cells += apart(run([name], given, Split)[name], alone)
        print(f"| {name} | " + " | ".join(f"{cell:.1e}" if cell else "0" for cell in cells) + " |")


if __name__ == "__main__":
    main()
