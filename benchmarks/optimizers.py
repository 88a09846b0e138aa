"""What a joint optimizer step takes: flat, and bitsandbytes tensor by tensor, over the adapters of workload W1.

    python -m benchmarks.optimizers [--device cuda] [--adapters 8] [--layers 32] [--hidden 4096] [--chunks 20 22 24]

Llama-3-8B's seven targets a layer, rank 16. Both must come to the same bits, or no figure is shown. ``host``: until the
call has returned; ``device``: until the device is done. The smallest of ``--steps`` steps each, in turns. One row for
each size of the chunks that are gathered (2 to the power of).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from torch import nn

from benchmarks.common import show
from finetuna_lightning.configs import AdapterConfig, OptimConfig
from finetuna_lightning.training import flat_optim
from finetuna_lightning.training.optim import build_optimizer

RANK = 16


def adapter_weights(layers: int, hidden: int, device: str) -> list[nn.Parameter]:
    """A and B of q, k, v, o, gate, up, down; k and v a quarter and the MLP 3.5 times as wide as the rest."""
    wide, narrow = hidden * 7 // 2, hidden // 4
    ends = [
        (hidden, hidden),
        (hidden, narrow),
        (hidden, narrow),
        (hidden, hidden),
        *[(hidden, wide)] * 2,
        (wide, hidden),
    ]
    shapes = [shape for into, out in ends for shape in ((RANK, into), (out, RANK))] * layers
    generator = torch.Generator(device).manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, device=device) / 64) for shape in shapes]


def give(owned: dict[str, list[nn.Parameter]], step: int) -> None:
    """A gradient for every parameter."""
    for index, parameters in enumerate(owned.values()):
        for parameter in parameters:
            parameter.grad = parameter.detach() * (0.1 + index + step)


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Milliseconds until ``call`` has returned, and until the device is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    wait()
    return 1e3 * host, 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--chunks", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    options = parser.parse_args()
    names = [f"a{index}" for index in range(options.adapters)]
    config = AdapterConfig(optimizer="adamw8bit", lr=1e-3, weight_decay=0.1, schedule="constant", max_grad_norm=1.0)
    rows = []
    for chunk in options.chunks:
        flat_optim.CHUNK = 1 << chunk
        mine, theirs = (
            {name: adapter_weights(options.layers, options.hidden, options.device) for name in names} for _ in range(2)
        )
        flat = build_optimizer(mine, dict.fromkeys(names, config), OptimConfig())
        single = [bitsandbytes.optim.AdamW8bit(own, lr=1e-3, weight_decay=0.1) for own in theirs.values()]

        def one_by_one(theirs: Any = theirs, single: Any = single) -> None:
            for own, optimizer in zip(theirs.values(), single, strict=True):
                nn.utils.clip_grad_norm_(own, 1.0)
                optimizer.step()

        found: dict[str, list[tuple[float, float]]] = {"flat": [], "single": []}
        for step in range(options.steps + 1):
            give(mine, step)
            found["flat"].append(timed(flat.step, options.device))
            flat.zero_grad()
            give(theirs, step)
            found["single"].append(timed(one_by_one, options.device))
            for own in theirs.values():
                for parameter in own:
                    parameter.grad = None
        pairs = [pair for name in names for pair in zip(mine[name], theirs[name], strict=True)]
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit("flat and single steps differ: no figure")
        best = [min(times) for name in ("flat", "single") for times in zip(*found[name][1:], strict=True)]
        rows.append([f"2^{chunk}", *(f"{value:.1f}" for value in best)])
    title = f"a step of {options.adapters} adapters x {14 * options.layers} tensors, AdamW 8-bit, ms"
    show(title, ["chunk", "flat, host", "flat, device", "one by one, host", "one by one, device"], rows)


if __name__ == "__main__":
    main()
