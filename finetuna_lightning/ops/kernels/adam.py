"""AdamW with 8-bit state (arXiv 1711.05101, 2110.02861) for many tensors in one launch, in bitsandbytes' format: codes
of a 256-entry map and one float32 scale for every 256 elements.

bitsandbytes has a kernel for one tensor; this one finds weights and gradients where they are, by a table of addresses,
so that nothing is put side by side and nothing copied back. The nearest code is found by the upper 16 bits of the
float: between two such floats lies at most one boundary of the map, so one look-up and one comparison tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Elements that share one scale."""

ROWS = 2
"""Blocks of one program."""


@dataclass(frozen=True)
class Map:
    """What codes stand for, and how the nearest is found.

    Args:
        values: float32 [256], ascending.
        bounds: float32 [256]: between each value and the next, and infinity.
        first: uint8 [65536]: by the upper 16 bits of a float32, the lowest code of such floats.
    """

    values: Tensor
    bounds: Tensor
    first: Tensor


def nearest_map(values: Tensor) -> Map:
    """The map of ``values`` [256].

    Raises:
        ValueError: if two of its bounds share their upper 16 bits.
    """
    own = values.float().cpu()
    bounds = torch.cat([(own[:-1] + own[1:]) * 0.5, torch.tensor([torch.inf])])
    keys = torch.arange(1 << 16)
    ends = [(keys << 16 | low).to(torch.int32).view(torch.float32) for low in (0, 0xFFFF)]
    lowest, highest = torch.minimum(*ends), torch.maximum(*ends)
    first, last = (torch.searchsorted(bounds[:-1].contiguous(), end.nan_to_num(0.0)) for end in (lowest, highest))
    used = highest.abs().nan_to_num(torch.inf) <= 1
    if bool((last - first > 1)[used].any()):
        raise ValueError("the map has values too close to each other for a look-up by 16 bits")
    device = values.device
    return Map(own.to(device), bounds.to(device), first.to(torch.uint8).to(device))


def programs(sizes: Sequence[int]) -> Tensor:
    """Which tensor each program steps, and from which of its blocks on: int32 [2, programs], for tensors of ``sizes``
    elements."""
    counts = torch.tensor([-(-size // (BLOCK * ROWS)) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    begin = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, (torch.arange(len(tensor)) - begin) * ROWS]).to(torch.int32)


@triton.jit
def _nearest(x, first_ptr, bounds_ptr):
    key = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    code = tl.load(first_ptr + key).to(tl.int32)
    return code + (x > tl.load(bounds_ptr + code)).to(tl.int32)


@triton.jit
def _adamw8bit(
    programs_ptr, tensors_ptr, addresses_ptr, state1_ptr, state2_ptr, absmax1_ptr, absmax2_ptr,
    values1_ptr, bounds1_ptr, first1_ptr, values2_ptr, bounds2_ptr, first2_ptr, skip_ptr, coefficient_ptr,
    beta1, beta2, epsilon, step_size, kept, zero, program_count, tensor_count,
    SKIP: tl.constexpr, COEFFICIENT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SKIP:
        if tl.load(skip_ptr) != 0:
            return
    tensor = tl.load(programs_ptr + pid)
    blocks = tl.load(programs_ptr + program_count + pid) + tl.arange(0, ROWS)
    size = tl.load(tensors_ptr + tensor)
    start = tl.load(tensors_ptr + tensor_count + tensor)  # a multiple of BLOCK
    p_at = tl.load(addresses_ptr + tensor)
    g_at = tl.load(addresses_ptr + tensor_count + tensor)
    if ALIGNED:
        p_at = tl.multiple_of(p_at, 16)
        g_at = tl.multiple_of(g_at, 16)
    at = blocks.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < size
    p_at = p_at.to(tl.pointer_type(tl.float32)) + at
    start = tl.multiple_of(start, BLOCK)
    scales = start // BLOCK + blocks
    some = blocks * BLOCK < size
    g = tl.load(g_at.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    finite = tl.abs(g) < float("inf")  # not of NaN either: such an element keeps its weight and starts anew
    if COEFFICIENT:
        g *= tl.load(coefficient_ptr)
    code1 = tl.load(state1_ptr + start + at, mask=inside, other=0).to(tl.int32)
    code2 = tl.load(state2_ptr + start + at, mask=inside, other=0).to(tl.int32)
    s1 = tl.load(values1_ptr + code1) * tl.load(absmax1_ptr + scales, mask=some, other=0.0)[:, None]
    s2 = tl.load(values2_ptr + code2) * tl.load(absmax2_ptr + scales, mask=some, other=0.0)[:, None]
    live = inside & finite
    s1 = tl.where(live, s1 * beta1 + (1.0 - beta1) * g, 0.0)
    s2 = tl.where(live, s2 * beta2 + (1.0 - beta2) * g * g, 0.0)
    top1 = tl.max(tl.abs(s1), 1)
    top2 = tl.max(s2, 1)
    tl.store(absmax1_ptr + scales, top1, mask=some)
    tl.store(absmax2_ptr + scales, top2, mask=some)
    p = tl.load(p_at, mask=live, other=0.0)
    p = p * kept + step_size * (s1 / (tl.sqrt(s2) + epsilon))
    tl.store(p_at, p, mask=live)
    code1 = _nearest(s1 / tl.where(top1 > 0, top1, 1.0)[:, None], first1_ptr, bounds1_ptr)
    code2 = _nearest(s2 / tl.where(top2 > 0, top2, 1.0)[:, None], first2_ptr, bounds2_ptr)
    code1 -= ((s1 < 0) & (code1 >= zero)).to(tl.int32)  # the first moment keeps its sign
    tl.store(state1_ptr + start + at, code1.to(tl.uint8), mask=inside)
    tl.store(state2_ptr + start + at, code2.to(tl.uint8), mask=inside)


def adamw8bit(
    table: Tensor,
    tensors: Tensor,
    addresses: Tensor,
    moments: Tensor,
    absmax: Tensor,
    maps: tuple[Map, Map],
    *,
    zero: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    skip: Tensor | None = None,
    coefficient: Tensor | None = None,
    aligned: bool = False,
) -> None:
    """Step float32 tensors and their state in place.

    Args:
        table: of ``programs``, on the device.
        tensors: int64 [2, tensors]: elements of each, and where its state starts in ``moments``.
        addresses: int64 [2, tensors]: of each one's weights and gradient, contiguous.
        moments: uint8 [2, elements], each tensor's from a multiple of ``BLOCK`` on; absmax: float32 [2, blocks].
        maps: of the first and the second moment; zero: the first's code of 0.
        step: which it is, from 1 on.
        skip: bool [], on the device: nothing is changed where it is true.
        coefficient: float32 [], on the device: what the gradients are multiplied by.
        aligned: whether all addresses are multiples of 16.
    """
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    launch: Any = _adamw8bit[(table.shape[1],)]
    launch(
        table, tensors, addresses, moments[0], moments[1], absmax[0], absmax[1],
        maps[0].values, maps[0].bounds, maps[0].first, maps[1].values, maps[1].bounds, maps[1].first,
        None if skip is None else skip.view(torch.uint8), coefficient,
        beta1, beta2, correction * eps, -lr * correction / (1 - beta1**step), 1 - lr * weight_decay, zero,
        table.shape[1], tensors.shape[1], SKIP=skip is not None, COEFFICIENT=coefficient is not None, ALIGNED=aligned,
        ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
