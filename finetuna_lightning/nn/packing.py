"""Several sequences in one row, without pads: attention runs on each sequence by itself.

A block-diagonal mask would cost the square of the whole row, and would leak: a masked score has weight 0, and
``0 * NaN`` is NaN, so one sequence's NaN reaches all the others (so does ``scaled_dot_product_attention``'s, with every
kernel tried). Cut apart, a sequence meets nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate

import torch
from torch import Tensor

_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("finetuna_packed_lengths", default=None)


@contextmanager
def packed_pass(lengths: Sequence[int] | None) -> Iterator[None]:
    """Within, the backbone's one row is made of sequences of ``lengths`` tokens; None: its rows are sequences."""
    token = _LENGTHS.set(None if lengths is None else tuple(lengths))
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def packed_lengths() -> tuple[int, ...] | None:
    """What ``packed_pass`` says."""
    return _LENGTHS.get()


class PackedMask:
    """What attention layers get in the place of a mask: the lengths of the sequences, and the mask of one of them.

    Args:
        lengths: tokens of each sequence, in their order.
        make: the mask of a sequence of so many tokens by itself, [1, 1, T, T], or None where the kernel needs none.
    """

    def __init__(self, lengths: Sequence[int], make: Callable[[int], Tensor | None]) -> None:
        self.lengths = tuple(lengths)
        self._make = make
        self._made: dict[int, Tensor | None] = {}

    def of(self, length: int) -> Tensor | None:
        """The mask of a sequence of ``length`` tokens; made once."""
        if length not in self._made:
            self._made[length] = self._make(length)
        return self._made[length]

    def take(self, spans: Sequence[tuple[int, int]]) -> PackedMask:
        """That of the sequences which lie in ``spans`` of the row, (start, stop) in tokens."""
        stops = list(accumulate(self.lengths))
        inside = [
            length
            for start, stop in spans
            for length, end in zip(self.lengths, stops, strict=True)
            if start < end <= stop
        ]
        return PackedMask(inside, self._make)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend_by_sequence(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask) -> Tensor:
    """Attention within each sequence of a packed row; those of one length go through ``attend`` together.

    Args:
        attend: (query, key, value [sequences, heads, T, features], mask [1, 1, T, T] or None) ->
            [sequences, T, heads, features].
        query, key, value: [1, heads, tokens, features].
        mask: of the row.

    Returns:
        [1, tokens, heads, features].
    """
    pieces = [tensor.split(mask.lengths, dim=2) for tensor in (query, key, value)]
    out: dict[int, Tensor] = {}
    for length in dict.fromkeys(mask.lengths):
        own = [index for index, other in enumerate(mask.lengths) if other == length]
        q, k, v = (torch.cat([part[index] for index in own]) if len(own) > 1 else part[own[0]] for part in pieces)
        out |= zip(own, attend(q, k, v, mask.of(length)).split(1), strict=True)
    return torch.cat([out[index] for index in range(len(mask.lengths))], dim=1)
