"""Packed rows against padded ones: training steps over the quickstart backbone, sequences of unequal length.

    python -m benchmarks.packing [--adapters 4] [--rows 4] [--steps 6] [--dropout 0.1]

The same sequences and dropout masks either way; the losses must agree, or no figure is shown. Tokens are real ones,
pads not counted. Runs alternate: padded, packed, padded, packed, ...
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common import show
from finetuna_lightning.configs import AdapterConfig, BackboneConfig
from finetuna_lightning.training.batches import collate
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.tokenizing import Example

SPREADS = {"32 to 256": (32, 256), "8 to 256, most short": (8, 256), "256 all": (256, 256)}


def lengths_of(spread: str, count: int, generator: torch.Generator) -> list[int]:
    """``count`` lengths: uniform, or by a factor where most are to be short."""
    low, high = SPREADS[spread]
    drawn = torch.rand(count, generator=generator)
    if "short" in spread:
        return (low * (high / low) ** drawn).round().int().tolist()  # type: ignore[no-any-return]
    return (low + (high - low) * drawn).round().int().tolist()  # type: ignore[no-any-return]


def one_step(module: MultiAdapterModule, batch: Any) -> tuple[float, torch.Tensor]:
    """Seconds of a forward and backward pass, and the losses."""
    module.adapters.zero_grad()
    started = time.perf_counter()
    losses = torch.stack([total / count for _, total, count, _ in module.losses(module(batch, training=True), batch)])
    losses.sum().backward()
    return time.perf_counter() - started, losses.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args()
    names = [f"a{index}" for index in range(options.adapters)]
    module = MultiAdapterModule(
        BackboneConfig("quickstart"), {name: AdapterConfig(rank=8, dropout=options.dropout) for name in names}
    )
    vocabulary = int(module.adapters.backbone.config.vocab_size)  # type: ignore[union-attr, arg-type]
    module.train()
    assert module.packing_obstacle() is None
    rows = []
    for spread in SPREADS:
        generator = torch.Generator().manual_seed(0)
        seconds: dict[bool, float] = {False: 0.0, True: 0.0}
        tokens = area = 0
        for step in range(-1, options.steps):
            groups = {}
            for name in names:
                ids = [
                    torch.randint(vocabulary, (length,), generator=generator)
                    for length in lengths_of(spread, options.rows, generator)
                ]
                groups[name] = [Example(row, row) for row in ids]
            found = {}
            for packed in (False, True):
                batch = collate(groups, packed=packed)
                for adapter in module.adapters.adapters():
                    adapter.calls = step + 1  # the same masks
                took, found[packed] = one_step(module, batch)
                seconds[packed] += took if step >= 0 else 0.0  # the first is a warm-up
                if step >= 0:
                    tokens += int(packed) * batch["input_ids"].numel()
                    area += int(not packed) * batch["input_ids"].numel()
            torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)
        rates = {packed: tokens / seconds[packed] for packed in seconds}
        rows.append(
            [spread, f"{1 - tokens / area:.0%}", f"{rates[False]:,.0f}", f"{rates[True]:,.0f}",
             f"{rates[True] / rates[False]:.2f}x"]
        )  # fmt: skip
    title = f"{options.adapters} adapters x {options.rows} sequences, quickstart backbone, dropout {options.dropout}"
    show(title, ["tokens of a sequence", "pads", "padded tokens/s", "packed tokens/s", "packed"], rows)


if __name__ == "__main__":
    main()
