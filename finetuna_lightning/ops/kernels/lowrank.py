"""The skinny products of low-rank deltas, for all adapters of a batch at once: ``low = s X M^T`` and ``G = X^T low``,
the gradient of a matrix; of the outputs' gradient, which is the widest there is, both in one reading.

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


@Kernel
@triton.jit(do_not_specialize=["tokens", "tile_count"])
def _add_blocks(
    part_ptr, out_ptr, scale_ptr, tiles_ptr, counts_ptr, R, C, slab, layers, stride_out, tokens, tile_count,
    BM: tl.constexpr, CB: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // PARTS
    start = tl.load(tiles_ptr + tile) + tl.program_id(0) % PARTS * BM
    stop = tl.load(tiles_ptr + tile_count + tile)
    if start >= stop:
        return
    adapter = tl.load(tiles_ptr + 2 * tile_count + tile)
    layer = tl.program_id(1)
    column = tl.arange(0, CB)
    c = layer * R + slab + column
    rows = start + tl.arange(0, BM)
    live = (rows < stop)[:, None] & (column >= 0)[None, :]
    acc = tl.zeros((BM, CB), dtype=tl.float32)
    if layer < layers:
        if COUNT:
            first = layer * COUNT
            end = first + COUNT
        else:
            first = tl.load(counts_ptr + layer)
            end = tl.load(counts_ptr + layer + 1)
        part = part_ptr + first.to(tl.int64) * tokens * CB + rows[:, None] * CB + column[None, :]
        for _ in tl.range(first, end, num_stages=AHEAD):
            acc += tl.load(part, mask=live, other=0.0)
            part += tokens.to(tl.int64) * CB
    acc = acc * tl.load(scale_ptr + adapter * C + c)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * stride_out + c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live)


def _add(
    parts: Tensor, out: Tensor, scales: Tensor, tiles: Tensor, counts: Tensor | int, layers: int, rank: int,
    slab: int = 0,
) -> None:  # fmt: skip
    """Fill ``out`` [M, C] with scaled sums of ``parts`` float32 [blocks, M, columns], of each layer's own columns from
    ``slab`` on: of so many blocks for each of ``layers`` (of R = ``rank``), or of those of ``counts`` (see ``blocks``).
    Layers beyond have zeros."""
    (_, tokens, block), (count, columns), rows = parts.shape, (tiles.shape[1], out.shape[1]), 32
    given, each = (None, counts) if isinstance(counts, int) else (counts, 0)
    _add_blocks(
        (count * (TILE_ROWS // rows), columns // rank), parts, out, scales, tiles, given, rank, columns, slab, layers,
        out.stride(0), tokens, count, BM=rows, CB=block, PARTS=TILE_ROWS // rows, AHEAD=8 if each == 0 else 2,
        COUNT=each, num_warps=4,
    )  # fmt: skip


@triton.jit
def _joined(codes, rest):
    """Two slices of X, in units of the first."""
    return codes.to(tl.float32) + rest.to(tl.float32) * 0.00390625


@Kernel
@triton.jit(do_not_specialize=["tokens", "tile_count"])
def _down(
    x_desc, m_desc, out_ptr, row_scale_ptr, scale_ptr, tiles_ptr, K, C, span, stride_out, tokens, tile_count,
    BM: tl.constexpr, BK: tl.constexpr, CB: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid // PARTS
    start = tl.load(tiles_ptr + tile) + pid % PARTS * BM
    stop = tl.load(tiles_ptr + tile_count + tile)
    if start >= stop:
        return
    adapter = tl.load(tiles_ptr + 2 * tile_count + tile)
    slab = tl.program_id(1)
    split = tl.program_id(2)
    acc = tl.zeros((BM, CB), dtype=tl.float32)
    rest = tl.zeros((BM, CB), dtype=tl.float32)  # in 256ths
    for k in range(split * span, tl.minimum(K, split * span + span), BK):
        m = m_desc.load([adapter * C + slab * CB, k]).T
        acc = tl.dot(x_desc.load([start, k]).to(m.dtype), m, acc)
        if SLICES == 2:
            rest = tl.dot(x_desc.load([tokens + start, k]).to(m.dtype), m, rest)
    if SLICES == 2:
        acc = acc + rest * 0.00390625
    rows = start + tl.arange(0, BM)
    column = tl.arange(0, CB)
    here = rows < stop
    if SLICES:
        acc = acc * tl.load(row_scale_ptr + rows, mask=here, other=0.0)[:, None]
    if SPLITS == 1:
        acc = acc * tl.load(scale_ptr + adapter * C + slab * CB + column)[None, :]
        out = out_ptr + rows.to(tl.int64)[:, None] * stride_out + (slab * CB + column)[None, :]
    else:
        out = out_ptr + ((slab * SPLITS + split).to(tl.int64) * tokens + rows)[:, None] * CB + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here[:, None] & (column >= 0)[None, :])


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
    if low is None:
        low = torch.empty(tokens, columns, dtype=matrices.dtype, device=x.device)
    chosen = options or {"BM": 64, "BK": 128, "num_warps": 4, "num_stages": 3}
    splits = min(3, cdiv(width, 1024))  # programs wait for their own products: so a multiprocessor has two or three
    slabs, span = columns // block, cdiv(width, splits * chosen["BK"]) * chosen["BK"]
    sums = low if splits == 1 else torch.empty(slabs * splits, tokens, block, dtype=torch.float32, device=x.device)
    parts = TILE_ROWS // chosen["BM"]
    x_desc = descriptor(x, (x.numel() // width, width), x.stride(-2), (chosen["BM"], chosen["BK"]))
    m_desc = descriptor(matrices, (matrices.shape[0] * columns, width), width, (block, chosen["BK"]))
    _down(
        (tiles.shape[1] * parts, slabs, splits), x_desc, m_desc, sums, row_scale, scales, tiles, width, columns, span,
        low.stride(0), tokens, tiles.shape[1], CB=block, PARTS=parts, SLICES=_slices(x, row_scale), SPLITS=splits,
        **chosen,
    )  # fmt: skip
    if splits > 1:
        _add(sums, low, scales, tiles, splits, slabs, block)  # each slab as if it were a layer
    return low


def _slices(x: Tensor, row_scale: Tensor | None) -> int:
    return 0 if row_scale is None else x.dim() - 1


@Kernel
@triton.jit(do_not_specialize=["tokens", "adapters", "chunk_count"])
def _outer(
    x_desc, low_desc, x_ptr, low_ptr, row_scale_ptr, out_ptr, rank_ptr, chunks_ptr, N, R, layers, stride_x, stride_low,
    tokens, adapters, chunk_count, BT: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start = tl.load(chunks_ptr + chunk)
    stop = tl.load(chunks_ptr + chunk_count + chunk)
    adapter = tl.load(chunks_ptr + 2 * chunk_count + chunk)
    n0 = tl.program_id(1) * BN
    c0 = tl.program_id(2) * CB
    n = n0 + tl.arange(0, BN)
    inside = n < N
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
    layer = columns // R
    index = columns % R
    rank = tl.load(rank_ptr + layer * adapters + adapter, mask=layer < layers, other=0)
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


def _added(parts: Tensor, first: Tensor | None) -> Tensor:
    """Each adapter's chunks in one."""
    if first is None:
        return parts
    adapters, size = first.shape[0] - 1, parts.shape[1]
    out = torch.empty(adapters, size, dtype=torch.float32, device=parts.device)
    _add_chunks((adapters, cdiv(size, 4096)), parts, out, first, size, BLOCK=4096)
    return out


def outer(
    x: Tensor,
    low: Tensor,
    chunks: Tensor,
    first: Tensor | None,
    ranks: Tensor,
    rank: int,
    *,
    row_scale: Tensor | None = None,
    options: dict[str, int] | None = None,
) -> Tensor:
    """The gradients ``X^T low`` of every adapter's A in layers that share X, in float32 [n, L, N * R]: each a matrix
    [r, N], packed for its own rank r at the start of its place; the rest of the place is not written.

    Args:
        x: [M, N] in 16 bits, or in int8 with ``row_scale`` float32 [M], or two slices [2, M, N]; low: 16 bits [M, C].
            Features contiguous, rows a multiple of 16 bytes apart.
        chunks: int32 [3, chunks]: first row, end row and adapter of at most ``CHUNK_ROWS`` rows, sorted by adapter.
        first: int32 [n + 1], the first chunk of each adapter; None when each adapter has exactly one.
        ranks: int32 [L, n]; rank: R.
    """
    (tokens, width), (layers, adapters) = x.shape[-2:], ranks.shape
    columns = low.shape[1]
    block = min(64, columns)
    chosen = options or {"BT": 64, "BN": 128, "num_warps": 4, "num_stages": 3}
    parts = torch.empty(chunks.shape[1], layers * width * rank, dtype=torch.float32, device=x.device)
    x_desc = descriptor(x, (x.numel() // width, width), x.stride(-2), (chosen["BT"], chosen["BN"]))
    low_desc = descriptor(low, low.shape, low.stride(0), (chosen["BT"], block))
    _outer(
        (chunks.shape[1], cdiv(width, chosen["BN"]), columns // block), x_desc, low_desc, x, low, row_scale, parts,
        ranks, chunks, width, rank, layers, x.stride(-2), low.stride(0), tokens, adapters, chunks.shape[1],
        CB=block, SLICES=_slices(x, row_scale), **chosen,
    )  # fmt: skip
    return _added(parts, first)


UP_COLUMNS = 256
"""Features of one program of ``up_backward``, whose parts of ``low`` are added up one after another: so they must not
depend on ranks, or an adapter's sums would be others in company."""


def blocks(widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How the features of layers that stand side by side are cut for ``up_backward``, so that no block has two layers':
    int32 [4, blocks]: the first feature of the layer, the first and the end of the block, and the layer; and int32 [L +
    1], the first block of each layer."""
    found, first, counts = [], 0, [0]
    for layer, width in enumerate(widths):
        for start in range(first, first + width, UP_COLUMNS):
            found.append((first, start, min(start + UP_COLUMNS, first + width), layer))
        first += width
        counts.append(len(found))
    return torch.tensor(found, dtype=torch.int32).t().contiguous(), torch.tensor(counts, dtype=torch.int32)


@Kernel
@triton.jit(do_not_specialize=["tokens", "adapters", "chunk_count", "block_count"])
def _up_backward(
    grad_desc, low_desc, m_desc, grad_ptr, low_ptr, part_ptr, out_ptr, rank_ptr, chunks_ptr, blocks_ptr,
    N, R, C, slab, stride_g, stride_low, tokens, adapters, chunk_count, block_count,
    BT: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start = tl.load(chunks_ptr + chunk)
    stop = tl.load(chunks_ptr + chunk_count + chunk)
    adapter = tl.load(chunks_ptr + 2 * chunk_count + chunk)
    block = tl.program_id(1)
    first = tl.load(blocks_ptr + block)
    n0 = tl.load(blocks_ptr + block_count + block)
    end = tl.load(blocks_ptr + 2 * block_count + block)
    layer = tl.load(blocks_ptr + 3 * block_count + block)
    column = tl.arange(0, CB)  # of the slab
    index = slab + column  # of the layer's R columns
    c0 = layer * R + slab
    n = n0 + tl.arange(0, BN)
    inside = n < end
    m = m_desc.load([adapter * C + c0, n0])  # zeros where a block reaches into the next layer
    part_ptr += block.to(tl.int64) * tokens * CB
    whole = start + (stop - start) // BT * BT
    acc = tl.zeros((BN, CB), dtype=tl.float32)
    for t in range(start, whole, BT):
        low = low_desc.load([t, c0])
        grad = grad_desc.load([t, n0])
        part = tl.dot(grad, m.T)
        acc = tl.dot(grad.T, low, acc)
        rows = t + tl.arange(0, BT)
        tl.store(part_ptr + rows[:, None] * CB + column[None, :], part)
    if whole < stop:  # the rows after these are another adapter's
        rows = whole + tl.arange(0, BT)
        here = (rows < stop)[:, None]
        at = rows.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + at * stride_g + n[None, :], mask=here & inside[None, :], other=0.0)
        live = here & (column >= 0)[None, :]
        low = tl.load(low_ptr + at * stride_low + (c0 + column)[None, :], mask=live, other=0.0)
        part = tl.dot(grad, m.T)
        acc = tl.dot(grad.T, low, acc)
        tl.store(part_ptr + rows[:, None] * CB + column[None, :], part, mask=live)
    rank = tl.load(rank_ptr + layer * adapters + adapter)
    out = out_ptr + chunk.to(tl.int64) * N * R + first * R + (n - first)[:, None] * rank + index[None, :]
    tl.store(out, acc, mask=inside[:, None] & (index < rank)[None, :])


def up_backward(
    grad: Tensor,
    low: Tensor,
    matrices: Tensor,
    scales: Tensor,
    tiles: Tensor,
    chunks: Tensor,
    first: Tensor | None,
    ranks: Tensor,
    rank: int,
    blocks: tuple[Tensor, Tensor],
    options: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Backwards through every adapter's B in layers whose outputs stand side by side: ``back = scale * dY B`` [M, C],
    the layers' side by side, in the matrices' type; and the gradients ``dY^T low`` in float32 [n, N * R]: of each layer
    [N of the layer, r], at R times its first feature, packed for its own rank r; the rest is not written.

    Args:
        grad: dY, [M, N] in 16 bits; low: [M, C], of its type. Rows contiguous, a multiple of 16 bytes apart.
        matrices: [n, C, N], of its type (see ``gather``): in a layer's R rows zeros but for the layer's own N.
        scales: float32 [n, C].
        tiles, chunks, first, ranks, rank: see ``down`` and ``outer``.
        blocks: see ``blocks``.
    """
    (tokens, width), (layers, adapters) = grad.shape, ranks.shape
    columns, (table, counts) = matrices.shape[1], blocks
    block = min(64, rank)
    chosen = options or {"BT": 64, "num_warps": 4 if block < 64 else 8, "num_stages": 4 if block < 64 else 3}
    grads = torch.empty(chunks.shape[1], width * rank, dtype=torch.float32, device=grad.device)
    parts = torch.empty(table.shape[1], tokens, block, dtype=torch.float32, device=grad.device)
    back = torch.empty(tokens, columns, dtype=matrices.dtype, device=grad.device)
    grad_desc = descriptor(grad, grad.shape, grad.stride(0), (chosen["BT"], UP_COLUMNS))
    low_desc = descriptor(low, low.shape, low.stride(0), (chosen["BT"], block))
    m_desc = descriptor(matrices, (matrices.shape[0] * columns, width), matrices.stride(1), (block, UP_COLUMNS))
    for slab in range(0, rank, block):  # one after another, so that large ranks need no more room for their parts
        _up_backward(
            (chunks.shape[1], table.shape[1]), grad_desc, low_desc, m_desc, grad, low, parts, grads, ranks, chunks,
            table, width, rank, columns, slab, grad.stride(0), low.stride(0), tokens, adapters, chunks.shape[1],
            table.shape[1], BN=UP_COLUMNS, CB=block, **chosen,
        )  # fmt: skip
        _add(parts, back, scales, tiles, counts, layers, rank, slab)
    return back, _added(grads, first)
