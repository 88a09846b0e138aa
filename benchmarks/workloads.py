"""The workloads of the design's section 9 that train on one GPU: who trains, and on sequences of which lengths.

``tokens`` is the length that a workload's sequences are counted in: 1,024 in all of them, less in a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

RANK, ALPHA = 16, 32.0
Lengths = Mapping[str, Sequence[int]]
RAGGED_RANKS = (4, 8, 16, 32, 64, 8, 16, 32)


@dataclass(frozen=True)
class Workload:
    """Adapters and their sequences.

    Args:
        key: ``w1`` and so on; ``title``: in words.
        ranks: by adapter.
        step: the number of a step -> by adapter, the lengths of its sequences.
        peer: for an ordinary trainer of one adapter, the sequences and tokens of a step; None: no peer runs it.
    """

    key: str
    title: str
    ranks: Mapping[str, int]
    step: Callable[[int], Lengths]
    peer: tuple[int, int] | None = None

    def lengths(self, steps: int) -> list[Lengths]:
        """Of the first ``steps`` steps."""
        return [self.step(index) for index in range(steps)]

    def only(self, names: Sequence[str]) -> Workload:
        """The same with some of the adapters."""
        return replace(
            self,
            ranks={name: self.ranks[name] for name in names},
            step=lambda index: {name: self.step(index)[name] for name in names},
        )


def tokens_of(lengths: Lengths) -> int:
    """Real tokens of a step."""
    return sum(sum(own) for own in lengths.values())


def _names(count: int) -> list[str]:
    return [f"adapter{index}" for index in range(count)]


def even(key: str, adapters: int, rows: int, tokens: int, peer: tuple[int, int] | None = None) -> Workload:
    """Every adapter has ``rows`` sequences of ``tokens``."""
    lengths = {name: [tokens] * rows for name in _names(adapters)}
    many = f"{adapters} adapter{'s' if adapters > 1 else ''}"
    return Workload(
        key, f"{many} x {rows} x {tokens:,} tokens", dict.fromkeys(lengths, RANK), lambda index: lengths, peer
    )


def ragged(tokens: int, seed: int = 4) -> Workload:
    """W4: a sequence for each adapter, log-uniform in an eighth of ``tokens`` to twice them, then more of them in turn
    while they fit into 8 x ``tokens``; drawn for each step from a fixed seed."""
    names, total, low, high = _names(8), 8 * tokens, tokens // 8, 2 * tokens

    def step(index: int) -> Lengths:
        generator = torch.Generator().manual_seed(1000 * seed + index)
        lengths: dict[str, list[int]] = {name: [] for name in names}
        left, turn = total, 0
        while left >= low:
            drawn = round(low * (high / low) ** float(torch.rand((), generator=generator)))
            waiting = max(0, len(names) - 1 - turn) * low  # what the adapters without a sequence need at least
            length = min(drawn, left - waiting)
            lengths[names[turn % len(names)]].append(length)
            left, turn = left - length, turn + 1
        return lengths

    title = f"8 adapters of rank {min(RAGGED_RANKS)} to {max(RAGGED_RANKS)}, {low:,} to {high:,} tokens each sequence"
    return Workload("w4", title, dict(zip(names, RAGGED_RANKS, strict=True)), step)


def growing(adapters: int, tokens: int) -> Workload:
    """W5: one sequence for each adapter, ``tokens`` in all whatever their number."""
    base, more = divmod(tokens, adapters)
    lengths = {name: [base + (index < more)] for index, name in enumerate(_names(adapters))}
    return Workload(
        "w5", f"{adapters} adapters, {tokens:,} tokens", dict.fromkeys(lengths, RANK), lambda index: lengths
    )


def workload(key: str, tokens: int = 1024, adapters: int | None = None) -> Workload:
    """The workload called ``key``; W5 is a series of ``growing``. ``adapters``: other than the 8 of W1 and 64 of W3."""
    if key == "w1":
        return even("w1", adapters or 8, 1, tokens, peer=(1, tokens))
    if key == "w2":
        return even("w2", 1, 8, tokens, peer=(8, tokens))
    if key == "w3":
        return even("w3", adapters or 64, 1, max(2, tokens // 8))
    if key == "w4":
        return ragged(tokens)
    raise KeyError(key)


def linear_flops(tokens: int, shape: Mapping[str, int], layers: int) -> float:
    """Operations of one direction through the projections of all layers."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return 2.0 * tokens * layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)


def head_flops(tokens: int, shape: Mapping[str, int]) -> float:
    """Operations of one direction through the head."""
    return 2.0 * tokens * shape["hidden_size"] * shape["vocab_size"]


def delta_flops(lengths: Lengths, ranks: Mapping[str, int], shape: Mapping[str, int], layers: int) -> float:
    """Operations of the deltas, forward and backward, each token through its own adapter alone."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sides = 2 * (2 * hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    return math.fsum(6.0 * sum(own) * ranks[name] * sides * layers for name, own in lengths.items())


def attention_flops(lengths: Lengths, shape: Mapping[str, int], layers: int) -> float:
    """Operations of causal attention, forward and backward (five products, half of each masked; the flash kernel's
    recomputation of the scores counted as one of them)."""
    forward = math.fsum(2.0 * length**2 * shape["hidden_size"] for own in lengths.values() for length in own)
    return forward * layers * 3.5
