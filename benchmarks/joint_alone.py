"""An adapter in company against the same adapter alone: how far apart its loss curve and its weights end.

    python -m benchmarks.joint_alone                                     # fp32 compute, on this machine's CPU
    python -m benchmarks.joint_alone --deterministic                     # bit for bit
    python -m benchmarks.joint_alone --dtype bfloat16 --device cuda      # beside what another batch form does

Four adapters of different rank, targets, dropout, batch size, length and schedule over the quickstart backbone. ``other
split`` is the solo run again with its sequences in padded rows, not packed: the same sequences in other shapes, so what
rounding alone does to a run. Differences are relative: of the curve ||a - b|| / ||b||, of the weights the same over all
of an adapter's tensors."""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import finetuna_lightning as ft
from benchmarks.common import machine

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


class Curve(pl.Callback):
    """Every adapter's training losses."""

    def __init__(self) -> None:
        self.losses: dict[str, list[Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in batch["adapters"]:
            value = trainer.callback_metrics.get(f"train/{name}/loss")
            if value is not None:
                self.losses.setdefault(name, []).append(value.detach().cpu().double())


def run(names: list[str], given: argparse.Namespace, packing: bool | None) -> dict[str, tuple[Tensor, Tensor]]:
    """By adapter: its losses, and its weights in one vector."""
    backbone = ft.BackboneConfig("quickstart", scheme="int8", dtype=given.dtype)
    module = ft.MultiAdapterModule(
        backbone, {name: ft.AdapterConfig(**ADAPTERS[name]) for name in names}, deterministic=given.deterministic
    )
    data = ft.AdapterDataModule({name: ft.DataConfig(**SOURCES[name]) for name in names}, packing=packing)
    curve = Curve()
    trainer = pl.Trainer(
        accelerator="gpu" if given.device == "cuda" else "cpu", devices=1, max_steps=given.steps, max_epochs=-1,
        plugins=[ft.EightBitPrecision(dtype=given.dtype)], callbacks=[curve], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
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
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    joint = run(list(ADAPTERS), given, None)
    form = "deterministic" if given.deterministic else "joint"
    print(f"{given.dtype} compute on {given.device} over int8 storage, {form}, {given.steps} steps; {machine()}")
    print("| adapter | curve: joint, alone | weights: joint, alone | curve: other split | weights: other split |")
    print("|---|---:|---:|---:|---:|")
    for name in ADAPTERS:
        alone, split = run([name], given, None)[name], run([name], given, False)[name]
        cells = [*apart(joint[name], alone), *apart(split, alone)]
        print(f"| {name} | " + " | ".join(f"{cell:.1e}" if cell else "0" for cell in cells) + " |")


if __name__ == "__main__":
    main()
