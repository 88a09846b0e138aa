"""Dropout whose mask is a hash of where an entry stands: the adapter's seed for this layer and pass, the token's place
among the adapter's own sequences, and the feature. Neighbours, padding, packing and the device change nothing, and no
random stream moves.

One 64-bit word, mixed by two multiplications and shifts as in splitmix64, serves four neighbouring features with 16
bits each, so a rate is met to 1/65536; the scale is that of the rate in force."""

from __future__ import annotations

import torch
from torch import Tensor

_LANES, _LEVELS = 4, 1 << 16  # features to a word, and the values that each of them draws from


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word  # torch's int64 wraps around, on every device


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_LOW = (1 << 32) - 1


def kept_share(p: float) -> float:
    """The share of entries that a rate of ``p`` keeps: ``1 - p`` to 1/65536. Divide what is kept by it."""
    return 1 - _dropped(p) / _LEVELS


def _dropped(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


def places(lengths: Tensor, each: int = 1, numbers: Tensor | None = None, total: int | None = None) -> Tensor:
    """The place of every vector of sequences of ``lengths`` [S] tokens, one after another, ``each`` vectors a token:
    int64 [sum * each], the sequence in the upper half, the position within it in the lower one. ``numbers`` [S] are
    those of the sequences, where they are not 0, 1, ...; ``total``: how many places that will be, where it is known."""
    counts = lengths * each
    starts = counts.cumsum(0) - counts
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), counts, output_size=total)
    number = sequence if numbers is None else numbers[sequence]
    return (number << 32) + (torch.arange(len(sequence), device=lengths.device) - starts[sequence])


def keep_mask(seed: int, at: Tensor, features: int, p: float) -> Tensor:
    """Which entries of vectors at places ``at`` [V] stay: bool [V, features]."""
    groups = torch.arange(-(-features // _LANES), device=at.device)
    word = _mix_(at * _STEP + seed)[:, None] ^ _mix_(groups * _STEP)[None, :]
    word.mul_(_FIRST)
    word ^= word >> 32
    word.mul_(_SECOND)
    word ^= (word >> 32).bitwise_and_(_LOW)
    drawn = word.view(torch.int16)[:, :features]
    return drawn >= _dropped(p) - _LEVELS // 2


def _mix_(word: Tensor) -> Tensor:
    """splitmix64's finaliser, in place."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        word ^= (word >> shift).bitwise_and_((1 << 64 - shift) - 1)
        word.mul_(factor)
    word ^= (word >> 31).bitwise_and_((1 << 33) - 1)
    return word


def drop(x: Tensor, p: float, seed: int, at: Tensor | None = None) -> Tensor:
    """x [..., features] with zeros in the place of a share ``p`` of its entries; not scaled (see ``kept_share``).

    ``at`` are the places of x's vectors, int64 [numel / features]; None: x's leading dimension is that of sequences.
    Selects, so that a NaN that is dropped is gone, forwards and backwards.
    """
    if at is None:
        rows = x.shape[0] if x.dim() > 1 else 1
        per_row = x.numel() // (x.shape[-1] * rows)
        at = places(torch.full((rows,), per_row, device=x.device), total=rows * per_row)
    keep = keep_mask(seed, at, x.shape[-1], p).view(x.shape)
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))
