"""The skinny products of low-rank deltas, for all adapters of a batch at once: ``low = s X M^T`` and ``G = X^T low``, the
gradient of a matrix.

Parameters stand in float32 wherever their adapters keep them, of any ranks; ``gather`` reads those of one layer (or of
several that share an input) through a table of addresses into one small 16-bit block [n, C, K], which both products
and the epilogue of ``gemm`` then read. Rows come in tiles and chunks that never straddle two adapters and start at an
adapter's own first row: what one adapter gets does not depend, in any bit, on its company.

Shapes: M rows, K or N features, n adapters, L layers, C low-rank columns: R of each layer, side by side, then zeros up
to a power of two. R is the largest rank, rounded up to a power of two no smaller than 16."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from finetuna_lightning.ops.tiling import TILE_ROWS

STEP = 16


def padded_rank(rank: int) -> int:
    """R for ranks up to ``rank``."""
    return max(STEP, int(triton.next_power_of_2(rank)))


def columns_of(layers: int, rank: int) -> int:
    """C for so many layers of R = ``rank``."""
    return int(triton.next_power_of_2(layers * rank))


@triton.jit
def _gather(table_ptr, rank_ptr, out_ptr, K, adapters, layers, R, C, BY_RANK: tl.constexpr, STEP: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    groups = C // STEP
    adapter = tl.program_id(0) // groups
    c0 = tl.program_id(0) % groups * STEP
    layer = c0 // R
    live = layer < layers
    at = tl.where(live, layer, 0) * adapters + adapter
    rank = tl.where(live, tl.load(rank_ptr + at), 0)
    base = tl.load(table_ptr + at).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, STEP)
    r = c0 - layer * R + i
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rank)[:, None] & (k < K)[None, :]
    if BY_RANK:  # [rank, K], as A
        w = tl.load(base + r[:, None] * K + k[None, :], mask=inside, other=0.0)
    else:  # [K, rank], as B
        inside_t = (k < K)[:, None] & (r < rank)[None, :]
        w = tl.load(base + k[:, None] * rank + r[None, :], mask=inside_t, other=0.0).T
    out = out_ptr + (adapter * C + c0 + i).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=(i >= 0)[:, None] & (k < K)[None, :])


def gather(table: Tensor, ranks: Tensor, width: int, rank: int, dtype: torch.dtype, *, by_rank: bool) -> Tensor:
    """The matrices of every adapter and layer in ``dtype``: [n, C, width], zeros where a rank is smaller.

    Args:
        table: int64 [L, n], addresses of float32 matrices [width, rank], or [rank, width] with ``by_rank``.
        ranks: int32 [L, n]; 0 where an adapter has no delta on a layer.
        rank: R (``padded_rank`` of the largest).
    """
    layers, adapters = ranks.shape
    columns = columns_of(layers, rank)
    out = torch.empty(adapters, columns, width, dtype=dtype, device=table.device)
    launch: Any = _gather[(adapters * columns // STEP, triton.cdiv(width, 256))]
    launch(table, ranks, out, width, adapters, layers, rank, columns, BY_RANK=by_rank, STEP=STEP, BLOCK=256, num_warps=4)
    return out


@triton.jit
def _down(
    x_desc, m_desc, part_ptr, scale_ptr, tiles_ptr, K, C, rows_in_all, stride_part, tile_count,
    BM: tl.constexpr, BK: tl.constexpr, CB: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid // PARTS
    start = tl.load(tiles_ptr + tile) + pid % PARTS * BM
    stop = tl.load(tiles_ptr + tile_count + tile)
    if start >= stop:
        return
    adapter = tl.load(tiles_ptr + 2 * tile_count + tile)
    c0 = tl.program_id(1) * CB
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    k0 = tl.program_id(2) * steps * BK
    acc = tl.zeros((BM, CB), dtype=tl.float32)
    for k in range(k0, tl.minimum(k0 + steps * BK, K), BK):
        acc = tl.dot(x_desc.load([start, k]), m_desc.load([adapter * C + c0, k]).T, acc)
    c = c0 + tl.arange(0, CB)
    if SPLIT == 1:
        acc = acc * tl.load(scale_ptr + adapter * C + c)[None, :]
    rows = start + tl.arange(0, BM)
    out = part_ptr + (tl.program_id(2).to(tl.int64) * rows_in_all + rows)[:, None] * stride_part + c[None, :]
    tl.store(out, acc.to(part_ptr.dtype.element_ty), mask=(rows < stop)[:, None] & (c >= 0)[None, :])


@triton.jit
def _add_parts(part_ptr, low_ptr, scale_ptr, tiles_ptr, C, rows_in_all, stride_low, tile_count,
               BM: tl.constexpr, CB: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    rows = tl.load(tiles_ptr + tile) + tl.arange(0, BM)
    here = rows < tl.load(tiles_ptr + tile_count + tile)
    adapter = tl.load(tiles_ptr + 2 * tile_count + tile)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live = here[:, None] & (c >= 0)[None, :]
    acc = tl.zeros((BM, CB), dtype=tl.float32)
    for split in tl.static_range(SPLIT):
        at = (rows.to(tl.int64) + split * rows_in_all.to(tl.int64))[:, None] * C + c[None, :]
        acc += tl.load(part_ptr + at, mask=live, other=0.0)
    acc = acc * tl.load(scale_ptr + adapter * C + c)[None, :]
    tl.store(low_ptr + rows.to(tl.int64)[:, None] * stride_low + c[None, :], acc.to(low_ptr.dtype.element_ty), mask=live)


def down(
    x: Tensor,
    matrices: Tensor,
    scales: Tensor,
    tiles: Tensor,
    low: Tensor | None = None,
    options: dict[str, int] | None = None,
) -> Tensor:
    """``scale * X M^T`` of each row's own adapter, [M, C] in x's type; in ``low`` where given, its rows any distance apart.

    Args:
        x: [M, K] in 16 bits, rows contiguous.
        matrices: [n, C, K] (see ``gather``).
        scales: float32 [n, C].
        tiles: int32 [3, tiles] (see ``gemm``).
    """
    tokens, width = x.shape
    columns = matrices.shape[1]
    block = min(64, columns)
    chosen = dict(options or {"BM": 64, "BK": 128, "SPLIT": 2, "num_warps": 4, "num_stages": 4})
    split = chosen["SPLIT"]
    if low is None:
        low = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    part = torch.empty(split, tokens, columns, device=x.device) if split > 1 else low
    parts = TILE_ROWS // chosen["BM"]
    launch: Any = _down[(tiles.shape[1] * parts, columns // block, split)]
    x_desc = TensorDescriptor(x, [tokens, width], [x.stride(0), 1], [chosen["BM"], chosen["BK"]])
    m_desc = TensorDescriptor(matrices, [matrices.shape[0] * columns, width], [width, 1], [block, chosen["BK"]])
    launch(x_desc, m_desc, part, scales, tiles, width, columns, tokens, part.stride(-2), tiles.shape[1], CB=block,
           PARTS=parts, **chosen)  # fmt: skip
    if split > 1:
        add: Any = _add_parts[(tiles.shape[1], columns // block)]
        add(part, low, scales, tiles, columns, tokens, low.stride(0), tiles.shape[1], BM=TILE_ROWS, CB=block, SPLIT=split,
            num_warps=4)  # fmt: skip
    return low


@triton.jit
def _outer(
    x_desc, low_desc, x_ptr, low_ptr, out_ptr, rank_ptr, chunks_ptr, N, R, layers, stride_x, stride_low, adapters, chunk_count,
    BT: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr, BY_RANK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start = tl.load(chunks_ptr + chunk)
    stop = tl.load(chunks_ptr + chunk_count + chunk)
    adapter = tl.load(chunks_ptr + 2 * chunk_count + chunk)
    n0 = tl.program_id(1) * BN
    c0 = tl.program_id(2) * CB
    n = n0 + tl.arange(0, BN)
    inside = n < N
    c = c0 + tl.arange(0, CB)
    whole = start + (stop - start) // BT * BT
    acc = tl.zeros((BN, CB), dtype=tl.float32)
    for t in range(start, whole, BT):
        acc = tl.dot(x_desc.load([t, n0]).T, low_desc.load([t, c0]), acc)
    if whole < stop:  # the rows after these are another adapter's, and may be NaN: not even multiplied by zero
        rows = whole + tl.arange(0, BT)
        here = (rows < stop)[:, None]
        at = rows.to(tl.int64)[:, None]
        xs = tl.load(x_ptr + at * stride_x + n[None, :], mask=here & inside[None, :], other=0.0)
        lows = tl.load(low_ptr + at * stride_low + c[None, :], mask=here & (c >= 0)[None, :], other=0.0)
        acc = tl.dot(xs.T, lows, acc)
    layer = c // R
    index = c % R
    used = layer < layers
    rank = tl.load(rank_ptr + layer * adapters + adapter, mask=used, other=0)
    out = out_ptr + (layer + chunk.to(tl.int64) * layers)[None, :] * (N * R)
    if BY_RANK:  # [rank, N], as A
        out = out + index[None, :] * N + n[:, None]
    else:  # [N, rank], as B
        out = out + n[:, None] * rank[None, :] + index[None, :]
    tl.store(out, acc, mask=inside[:, None] & (index < rank)[None, :])


@triton.jit
def _add_chunks(part_ptr, out_ptr, first_ptr, size, BLOCK: tl.constexpr):
    adapter = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    first = tl.load(first_ptr + adapter).to(tl.int64)
    count = tl.load(first_ptr + adapter + 1) - first
    part = part_ptr + first * size + at
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, count):
        acc += tl.load(part, mask=inside, other=0.0)
        part += size
    tl.store(out_ptr + adapter.to(tl.int64) * size + at, acc, mask=inside)


def outer(
    x: Tensor,
    low: Tensor,
    chunks: Tensor,
    first: Tensor | None,
    ranks: Tensor,
    rank: int,
    *,
    by_rank: bool,
    options: dict[str, int] | None = None,
) -> Tensor:
    """The gradients ``X^T low`` of every adapter and layer in float32, [n, L, N * R]: each a matrix [N, r], or [r, N]
    with ``by_rank``, packed at the start of its place for its own rank r; the rest of the place is not written.

    Args:
        x: [M, N] in 16 bits; low: [M, C], of its type. Features contiguous, rows a multiple of 16 bytes apart.
        chunks: int32 [3, chunks]: first row, end row and adapter of at most ``CHUNK_ROWS`` rows, sorted by adapter.
        first: int32 [n + 1], the first chunk of each adapter; None when each adapter has exactly one.
        ranks: int32 [L, n]; rank: R.
    """
    width, (layers, adapters), columns = x.shape[1], ranks.shape, low.shape[1]
    block = min(64, columns)
    chosen = options or {"BT": 128, "BN": 128, "num_warps": 4, "num_stages": 3}
    parts = torch.empty(chunks.shape[1], layers, width * rank, dtype=torch.float32, device=x.device)
    launch: Any = _outer[(chunks.shape[1], triton.cdiv(width, chosen["BN"]), columns // block)]
    x_desc = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [chosen["BT"], chosen["BN"]])
    low_desc = TensorDescriptor(low, list(low.shape), [low.stride(0), 1], [chosen["BT"], block])
    launch(x_desc, low_desc, x, low, parts, ranks, chunks, width, rank, layers, x.stride(0), low.stride(0), adapters,
           chunks.shape[1], CB=block, BY_RANK=by_rank, **chosen)  # fmt: skip
    if first is None:
        return parts
    out = torch.empty(adapters, layers, width * rank, dtype=torch.float32, device=x.device)
    size = layers * width * rank
    add: Any = _add_chunks[(adapters, triton.cdiv(size, 4096))]
    add(parts, out, first, size, BLOCK=4096)
    return out
