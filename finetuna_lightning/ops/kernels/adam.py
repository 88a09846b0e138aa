"""AdamW with 8-bit state (arXiv 1711.05101, 2110.02861) for the tensors of many adapters in one launch, in
bitsandbytes' format: codes of a 256-entry map and one float32 scale for every 256 elements; and the norms of gradients.

bitsandbytes has a kernel for one tensor; these find weights and gradients where they are, by a table of addresses, so
that nothing is put side by side and nothing copied back. What an adapter gets does not depend, in any bit, on which
others are stepped in the same launch. The nearest code is found by the upper 16 bits of the
float: between two such floats lies at most one boundary of the map, so one look-up and one comparison tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_lightning.ops.kernels.launch import Kernel

BLOCK = 256
"""Elements that share one scale."""

ROWS = 2
"""Blocks of one program of a step."""

NORM_ROWS = 16
"""Blocks of one program of a norm."""


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


def programs(sizes: Sequence[int], rows: int) -> Tensor:
    """Which tensor each program takes, and from which of its blocks on: int32 [2, programs], for tensors of ``sizes``
    elements and programs of ``rows`` blocks."""
    counts = torch.tensor([-(-size // (BLOCK * rows)) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    begin = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, (torch.arange(len(tensor)) - begin) * rows]).to(torch.int32)


@triton.jit
def _nearest(x, first_ptr, bounds_ptr):
    key = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    code = tl.load(first_ptr + key).to(tl.int32)
    return code + (x > tl.load(bounds_ptr + code)).to(tl.int32)


@Kernel
@triton.jit(do_not_specialize=["zero", "program_count", "tensor_count"])
def _adamw8bit(
    programs_ptr, tensors_ptr, addresses_ptr, states_ptr, settings_ptr, skip_ptr, coefficient_ptr,
    values1_ptr, bounds1_ptr, first1_ptr, values2_ptr, bounds2_ptr, first2_ptr, zero, program_count, tensor_count,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    owner = tl.program_id(1)
    if tl.load(skip_ptr + owner) != 0:
        return
    beta1 = tl.load(settings_ptr + owner * 5)
    beta2 = tl.load(settings_ptr + owner * 5 + 1)
    epsilon = tl.load(settings_ptr + owner * 5 + 2)
    step_size = tl.load(settings_ptr + owner * 5 + 3)
    kept = tl.load(settings_ptr + owner * 5 + 4)
    state1_ptr = tl.multiple_of(tl.load(states_ptr + owner * 4), 16).to(tl.pointer_type(tl.uint8))
    state2_ptr = tl.multiple_of(tl.load(states_ptr + owner * 4 + 1), 16).to(tl.pointer_type(tl.uint8))
    absmax1_ptr = tl.load(states_ptr + owner * 4 + 2).to(tl.pointer_type(tl.float32))
    absmax2_ptr = tl.load(states_ptr + owner * 4 + 3).to(tl.pointer_type(tl.float32))
    tensor = tl.load(programs_ptr + pid)
    blocks = tl.load(programs_ptr + program_count + pid) + tl.arange(0, ROWS)
    size = tl.load(tensors_ptr + tensor)
    start = tl.load(tensors_ptr + tensor_count + tensor)  # a multiple of BLOCK
    own = addresses_ptr + owner * 2 * tensor_count + tensor
    p_at = tl.load(own)
    g_at = tl.load(own + tensor_count)
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
    g *= tl.load(coefficient_ptr + owner)
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


@Kernel
@triton.jit(do_not_specialize=["program_count", "tensor_count"])
def _squares(
    programs_ptr, tensors_ptr, addresses_ptr, out_ptr, program_count, tensor_count,
    ALIGNED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    owner = tl.program_id(1)
    tensor = tl.load(programs_ptr + pid)
    at = tl.load(programs_ptr + program_count + pid).to(tl.int64) * BLOCK + tl.arange(0, SIZE)
    g_at = tl.load(addresses_ptr + owner * tensor_count + tensor)
    if ALIGNED:
        g_at = tl.multiple_of(g_at, 16)
    inside = at < tl.load(tensors_ptr + tensor)
    g = tl.load(g_at.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    tl.store(out_ptr + owner.to(tl.int64) * program_count + pid, tl.sum(g * g))


@Kernel
@triton.jit(do_not_specialize=["count"])
def _roots(part_ptr, out_ptr, count, SIZE: tl.constexpr):
    owner = tl.program_id(0)
    part = part_ptr + owner.to(tl.int64) * count
    acc = tl.zeros((SIZE,), dtype=tl.float32)
    for first in range(0, count, SIZE):
        at = first + tl.arange(0, SIZE)
        acc += tl.load(part + at, mask=at < count, other=0.0)
    tl.store(out_ptr + owner, tl.sqrt(tl.sum(acc)))


def norms(table: Tensor, sizes: Tensor, addresses: Tensor, *, aligned: bool = False) -> Tensor:
    """The Euclidean norms of the float32 tensors of several owners, all of each owner's together: float32 [owners].

    Args:
        table: of ``programs`` of ``NORM_ROWS``, on the device.
        sizes: int64 [tensors]: elements of each.
        addresses: int64 [owners, tensors], of contiguous tensors.
        aligned: whether all addresses are multiples of 16.
    """
    (owners, count), many = addresses.shape, table.shape[1]
    parts = torch.empty(owners, many, dtype=torch.float32, device=table.device)
    out = torch.empty(owners, dtype=torch.float32, device=table.device)
    grid, size = (many, owners), NORM_ROWS * BLOCK
    _squares(grid, table, sizes, addresses, parts, many, count, ALIGNED=aligned, SIZE=size, BLOCK=BLOCK)
    _roots((owners,), parts, out, many, SIZE=1024)
    return out


def settings_of(lr: float, betas: Sequence[float], eps: float, weight_decay: float, step: int) -> list[float]:
    """What ``adamw8bit`` takes for one owner's ``step``-th step, ``step`` from 1 on."""
    correction = (1 - betas[1] ** step) ** 0.5
    return [*betas, correction * eps, -lr * correction / (1 - betas[0] ** step), 1 - lr * weight_decay]


def adamw8bit(
    table: Tensor, tensors: Tensor, addresses: Tensor, states: Tensor, settings: Tensor, maps: tuple[Map, Map],
    *, zero: int, skip: Tensor, coefficient: Tensor, aligned: bool = False,
) -> None:  # fmt: skip
    """Step the float32 tensors of several owners, and their state, in place.

    Args:
        table: of ``programs`` of ``ROWS``, on the device.
        tensors: int64 [2, tensors]: elements of each, and where its state starts: a multiple of ``BLOCK``.
        addresses: int64 [owners, 2, tensors]: of weights and gradients, contiguous.
        states: int64 [owners, 4]: where the two moments stand, in uint8 codes, and their scales, in float32.
        settings: float32 [owners, 5], see ``settings_of``.
        maps: of the first and the second moment; zero: the first's code of 0.
        skip: bool [owners]: nothing of an owner is changed where it is true.
        coefficient: float32 [owners]: what the gradients are multiplied by.
        aligned: whether all addresses of weights and gradients are multiples of 16.
    """
    _adamw8bit(
        (table.shape[1], addresses.shape[0]),
        table, tensors, addresses, states, settings, skip.view(torch.uint8), coefficient,
        maps[0].values, maps[0].bounds, maps[0].first, maps[1].values, maps[1].bounds, maps[1].first, zero,
        table.shape[1], tensors.shape[1], ALIGNED=aligned, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
