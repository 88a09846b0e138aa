"""Several sequences in one row, without pads: attention runs on each sequence by itself.

A block-diagonal mask would cost the square of the whole row, and would leak: a masked score has weight 0, and
``0 * NaN`` is NaN, so one sequence's NaN reaches all the others (so does ``scaled_dot_product_attention``'s, with every
kernel tried). Cut apart, a sequence meets nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def attend_causally(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor | None:
    """Plain causal attention within each sequence of a packed row on a GPU, in one call: sequences of one length as
    rows of a batch, without copying them together; others by the ragged form of flash attention, which reads no row
    beyond a sequence's own. None where neither is to be had: in 32 bits, or on another device.

    Args:
        query [1, heads, tokens, D], key and value [1, fewer heads, tokens, D].
        lengths: tokens of each sequence.
        scale: of the scores.

    Returns:
        [1, tokens, heads, D].
    """
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or size % 8 or size > 256:
        return None
    if len(set(lengths)) == 1 and lengths[0] % 64 == 0 and lengths[0] > _SHORT:
        count = len(lengths)
        q, k, v = (t.squeeze(0).unflatten(1, (count, lengths[0])).transpose(0, 1) for t in (query, key, value))
        with sdpa_kernel(_PREFERRED, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
            )
        return out.transpose(1, 2).reshape(1, -1, query.shape[1], size)
    starts, longest = _starts(tuple(lengths), query.device), max(lengths)
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))  # a select's gradient is a copy
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )[0]
    result: Tensor = out[None]
    return result


_SHORT = 256
"""Tokens of a sequence up to which rows of a batch are ragged too. Of so few tokens, flash attention's gradients have
two summands at most, and so are the same in any company; cuDNN takes other sums for other numbers of rows."""

_PREFERRED = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


@lru_cache(maxsize=256)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return starts.pin_memory().to(device, non_blocking=True)


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
