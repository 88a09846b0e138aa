"""The skinny products of low-rank deltas, for all adapters of a batch at once: ``low = s X M^T`` and ``G = X^T low``,
the gradient of a matrix.

Parameters stand in float32 wherever their adapters keep them, of any ranks; ``gather`` reads those of some layers
through a table of addresses into one small 16-bit buffer, which both products and the epilogue of ``gemm`` then read.
Rows come in tiles and chunks that never straddle two adapters and start at an adapter's own first row: what one adapter
gets does not depend, in any bit, on its company.

Shapes: M rows, K or N features, n adapters, L layers that share an input, C low-rank columns: R of each layer, side by
side, then zeros up to a power of two. R is the largest rank, rounded up to a power of two no smaller than 16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_lightning.ops.kernels.launch import Kernel, cdiv, descriptor, next_power_of_2
from finetuna_lightning.ops.tiling import TILE_ROWS

STEP = 16
"""Rows of a matrix that one program of ``gather`` copies."""


def padded_rank(rank: int) -> int:
    """R for ranks up to ``rank``."""
    return max(STEP, next_power_of_2(rank))


def columns_of(layers: int, rank: int) -> int:
    """C for so many layers of R = ``rank``."""
    return next_power_of_2(layers * rank)


Piece = tuple[int, int, int, bool, int, int, int]
"""A part of what is gathered: the address of a float32 matrix (0: none), its rank, its other side, whether it is [rank,
side], as A, or [side, rank], as B; and where it goes: first element, distance of rows, and their number (a multiple of
``STEP``), the rank's first, then zeros."""


def jobs(pieces: Sequence[Piece]) -> Tensor:
    """The table for ``gather``: int64 [7, jobs]."""
    found = [
        (address, start, rank if address else 0, side, at + start * stride, int(by_rank), stride)
        for address, rank, side, by_rank, at, stride, count in pieces
        for start in range(0, count, STEP)
    ]
    return torch.tensor(found, dtype=torch.int64).t().contiguous()


@Kernel
@triton.jit(do_not_specialize=["count"])
def _gather(jobs_ptr, out_ptr, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
    entry = jobs_ptr + tl.program_id(0)
    width = tl.multiple_of(tl.load(entry + 3 * count), 16)
    k0 = tl.program_id(1) * BLOCK
    if k0 >= width:
        return
    base = tl.load(entry).to(tl.pointer_type(tl.float32))
    r0 = tl.load(entry + count)
    rank = tl.load(entry + 2 * count)
    at = tl.multiple_of(tl.load(entry + 4 * count), 16)
    stride = tl.multiple_of(tl.load(entry + 6 * count), 16)
    i = tl.arange(0, STEP)
    r = r0 + i
    k = k0 + tl.arange(0, BLOCK)
    if tl.load(entry + 5 * count) > 0:
        inside = (r < rank)[:, None] & (k < width)[None, :]
        w = tl.load(base + r[:, None] * width + k[None, :], mask=inside, other=0.0)
    else:
        inside_t = (k < width)[:, None] & (r < rank)[None, :]
        w = tl.load(base + k[:, None] * rank + r[None, :], mask=inside_t, other=0.0).T
    out = out_ptr + at + i[:, None] * stride + k[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=(i >= 0)[:, None] & (k < width)[None, :])


def gather(table: Tensor, size: int, widest: int, dtype: torch.dtype) -> Tensor:
    """The matrices of ``jobs`` in ``dtype``: [size], ``widest`` being the longest side."""
    out = torch.empty(size, dtype=dtype, device=table.device)
    count = table.shape[1]
    _gather((count, cdiv(widest, 256)), table, out, count, STEP=STEP, BLOCK=256, num_warps=4)
    return out


@triton.jit
def _joined(codes, rest):
    """Two slices of X, in units of the first."""
    return codes.to(tl.float32) + rest.to(tl.float32) * 0.00390625


@Kernel
@triton.jit(do_not_specialize=["tokens", "tile_count"])
def _down(
    x_desc, m_desc, out_ptr, row_scale_ptr, scale_ptr, tiles_ptr, K, C, stride_out, tokens, tile_count,
    BM: tl.constexpr, BK: tl.constexpr, CB: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid // PARTS
    start = tl.load(tiles_ptr + tile) + pid % PARTS * BM
    stop = tl.load(tiles_ptr + tile_count + tile)
    if start >= stop:
        return
    adapter = tl.load(tiles_ptr + 2 * tile_count + tile)
    c0 = tl.program_id(1) * CB
    kind = out_ptr.dtype.element_ty
    acc = tl.zeros((BM, CB), dtype=tl.float32)
    for k in range(0, K, BK):
        x = x_desc.load([start, k])
        if SLICES == 2:
            x = _joined(x, x_desc.load([tokens + start, k]))
        acc = tl.dot(x.to(kind), m_desc.load([adapter * C + c0, k]).T, acc)
    rows = start + tl.arange(0, BM)
    c = c0 + tl.arange(0, CB)
    here = rows < stop
    if SLICES:
        acc = acc * tl.load(row_scale_ptr + rows, mask=here, other=0.0)[:, None]
    acc = acc * tl.load(scale_ptr + adapter * C + c)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * stride_out + c[None, :]
    tl.store(out, acc.to(kind), mask=here[:, None] & (c >= 0)[None, :])


def down(
    x: Tensor,
    matrices: Tensor,
    scales: Tensor,
    tiles: Tensor,
    low: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    options: dict[str, int] | None = None,
) -> Tensor:
    """``scale * X M^T`` of each row's own adapter, [M, C] in the matrices' type; in ``low`` where given, its rows any
    distance apart.

    Args:
        x: [M, K] in 16 bits, or in int8 with ``row_scale`` float32 [M], or two slices [2, M, K] (``rows.quantize``);
            rows contiguous.
        matrices: 16 bits [n, C, K] (see ``gather``).
        scales: float32 [n, C].
        tiles: int32 [3, tiles] (see ``gemm``).
    """
    tokens, width = x.shape[-2:]
    columns = matrices.shape[1]
    block = min(64, columns)
    chosen = options or {"BM": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
    if low is None:
        low = torch.empty(tokens, columns, dtype=matrices.dtype, device=x.device)
    parts = TILE_ROWS // chosen["BM"]
    x_desc = descriptor(x, (x.numel() // width, width), x.stride(-2), (chosen["BM"], chosen["BK"]))
    m_desc = descriptor(matrices, (matrices.shape[0] * columns, width), width, (block, chosen["BK"]))
    _down(
        (tiles.shape[1] * parts, columns // block), x_desc, m_desc, low, row_scale, scales, tiles, width, columns,
        low.stride(0), tokens, tiles.shape[1], CB=block, PARTS=parts, SLICES=_slices(x, row_scale), **chosen,
    )  # fmt: skip
    return low


def _slices(x: Tensor, row_scale: Tensor | None) -> int:
    return 0 if row_scale is None else x.dim() - 1


@Kernel
@triton.jit(do_not_specialize=["tokens", "adapters", "chunk_count", "block_count"])
def _outer(
    x_desc, low_desc, x_ptr, low_ptr, row_scale_ptr, out_ptr, rank_ptr, chunks_ptr, blocks_ptr,
    N, R, layers, stride_x, stride_low, tokens, adapters, chunk_count, block_count,
    BT: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr, UP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start = tl.load(chunks_ptr + chunk)
    stop = tl.load(chunks_ptr + chunk_count + chunk)
    adapter = tl.load(chunks_ptr + 2 * chunk_count + chunk)
    block = tl.program_id(1)
    c = tl.program_id(2) * CB + tl.arange(0, CB)
    if UP:  # these features are one layer's, which has R columns of its own
        first = tl.load(blocks_ptr + block)
        n0 = tl.load(blocks_ptr + block_count + block)
        end = tl.load(blocks_ptr + 2 * block_count + block)
        owner = tl.load(blocks_ptr + 3 * block_count + block)
        c0 = owner * R + tl.program_id(2) * CB
        layer = c * 0 + owner
        index = c
    else:
        first = 0
        n0 = block * BN
        end = N
        c0 = tl.program_id(2) * CB
        layer = c // R
        index = c % R
    n = n0 + tl.arange(0, BN)
    inside = n < end
    columns = c0 + tl.arange(0, CB)
    whole = start + (stop - start) // BT * BT
    acc = tl.zeros((BN, CB), dtype=tl.float32)
    kind = low_ptr.dtype.element_ty
    for t in range(start, whole, BT):
        low = low_desc.load([t, c0])
        if SLICES:  # the rows' scales go to the smaller side
            low = (low.to(tl.float32) * tl.load(row_scale_ptr + t + tl.arange(0, BT))[:, None]).to(kind)
        x = x_desc.load([t, n0])
        if SLICES == 2:
            x = _joined(x, x_desc.load([tokens + t, n0]))
        acc = tl.dot(x.to(kind).T, low, acc)
    if whole < stop:  # the rows after these are another adapter's, and may be NaN: not even multiplied by zero
        rows = whole + tl.arange(0, BT)
        here = (rows < stop)[:, None]
        at = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + at * stride_x + n[None, :], mask=here & inside[None, :], other=0)
        if SLICES == 2:
            rest = tl.load(x_ptr + (tokens + at) * stride_x + n[None, :], mask=here & inside[None, :], other=0)
            x = _joined(x, rest)
        low = tl.load(low_ptr + at * stride_low + columns[None, :], mask=here & (columns >= 0)[None, :], other=0.0)
        if SLICES:
            low = (low.to(tl.float32) * tl.load(row_scale_ptr + rows, mask=rows < stop, other=0.0)[:, None]).to(kind)
        acc = tl.dot(x.to(kind).T, low, acc)
    rank = tl.load(rank_ptr + layer * adapters + adapter, mask=layer < layers, other=0)
    if UP:  # [N of the layer, rank], as B
        out = out_ptr + chunk.to(tl.int64) * N * R + first * R + (n - first)[:, None] * rank[None, :] + index[None, :]
    else:  # [rank, N], as A
        out = out_ptr + (layer + chunk.to(tl.int64) * layers)[None, :] * (N * R) + index[None, :] * N + n[:, None]
    tl.store(out, acc, mask=inside[:, None] & (index < rank)[None, :])


@Kernel
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


OUTER_COLUMNS = 128
"""Features of one program of ``outer``."""


def blocks(widths: Sequence[int]) -> Tensor:
    """How the features of layers that stand side by side are cut for ``outer``, so that none has two layers': int32 [4,
    blocks]: the first feature of the layer, the first and the end of the block, and the layer."""
    found, first = [], 0
    for layer, width in enumerate(widths):
        for start in range(first, first + width, OUTER_COLUMNS):
            found.append((first, start, min(start + OUTER_COLUMNS, first + width), layer))
        first += width
    return torch.tensor(found, dtype=torch.int32).t().contiguous()


def outer(
    x: Tensor,
    low: Tensor,
    chunks: Tensor,
    first: Tensor | None,
    ranks: Tensor,
    rank: int,
    *,
    by_layer: Tensor | None = None,
    row_scale: Tensor | None = None,
    options: dict[str, int] | None = None,
) -> Tensor:
    """The gradients ``X^T low`` of every adapter and layer in float32. Of layers that share X, [n, L, N * R]: each a
    matrix [r, N], as A. Of layers whose outputs stand side by side in X, ``by_layer`` (see ``blocks``): [n, N * R], for
    each its [N of the layer, r], as B, at R times its first feature. Each is packed for its own rank r at the start of
    its place; the rest of the place is not written.

    Args:
        x: [M, N] in 16 bits, or in int8 with ``row_scale`` float32 [M], or two slices [2, M, N]; low: 16 bits [M, C].
            Features contiguous, rows a multiple of 16 bytes apart.
        chunks: int32 [3, chunks]: first row, end row and adapter of at most ``CHUNK_ROWS`` rows, sorted by adapter.
        first: int32 [n + 1], the first chunk of each adapter; None when each adapter has exactly one.
        ranks: int32 [L, n]; rank: R.
    """
    (tokens, width), (layers, adapters) = x.shape[-2:], ranks.shape
    columns = low.shape[1] if by_layer is None else rank
    block = min(64, columns)
    chosen = options or {"BT": 64, "num_warps": 4, "num_stages": 4}
    size = (layers if by_layer is None else 1) * width * rank
    parts = torch.empty(chunks.shape[1], size, dtype=torch.float32, device=x.device)
    count = cdiv(width, OUTER_COLUMNS) if by_layer is None else by_layer.shape[1]
    x_desc = descriptor(x, (x.numel() // width, width), x.stride(-2), (chosen["BT"], OUTER_COLUMNS))
    low_desc = descriptor(low, low.shape, low.stride(0), (chosen["BT"], block))
    _outer(
        (chunks.shape[1], count, columns // block), x_desc, low_desc, x, low, row_scale, parts, ranks, chunks, by_layer,
        width, rank, layers, x.stride(-2), low.stride(0), tokens, adapters, chunks.shape[1], count,
        BN=OUTER_COLUMNS, CB=block, UP=by_layer is not None, SLICES=_slices(x, row_scale), **chosen,
    )  # fmt: skip
    if first is None:
        return parts
    out = torch.empty(adapters, size, dtype=torch.float32, device=x.device)
    _add_chunks((adapters, cdiv(size, 4096)), parts, out, first, size, BLOCK=4096)
    return out
