"""One matrix product for many adapters: ``Y = s_x (Xq Wq^T) s_w + bias + low M + residual``, of int8 or 16-bit values.

Rows come in tiles that never straddle two adapters (see ``ops.tiling``), so the product of a row, the delta that its
own adapter adds in the epilogue, and therefore every bit of the result, depend on nothing but the row and its adapter:
a neighbour's NaN is never multiplied, and company changes nothing.

Shapes: M rows, N columns, K summed over; n adapters, C low-rank columns (of one layer, or of several side by side,
whose deltas are then added up, as shared inputs add up their gradients).

On Hopper GPUs the kernel is ``hopper.cu``, elsewhere Triton's below, whose loop over K is the plain form: operands
through the bulk copy engine (TMA) where there is one, ``num_stages`` tiles in flight. Eight-bit matrix units want both
operands contiguous along K, so that a backward pass transposes the codes first."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_lightning.ops.kernels import hopper
from finetuna_lightning.ops.kernels.launch import Kernel, cdiv, descriptor
from finetuna_lightning.ops.tiling import TILE_ROWS


@triton.jit
def _tile(
    pid, a_desc, b_desc, low_desc, m_desc, c_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, residual_ptr, tiles_ptr,
    N, K, C, step, stride_c, stride_residual, tile_count,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, CB: tl.constexpr, DELTA: tl.constexpr,
    INT8: tl.constexpr, B_IS_KN: tl.constexpr, COLUMN_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    width = GROUP * tl.cdiv(N, BN)  # neighbours share operands in L2
    first = pid // width * GROUP
    size = tl.minimum(tile_count - first, GROUP)
    tile = first + pid % width % size
    n0 = pid % width // size * BN
    start = tl.load(tiles_ptr + tile)
    stop = tl.load(tiles_ptr + tile_count + tile)
    if DELTA:
        m0 = tl.load(tiles_ptr + 2 * tile_count + tile) * step
    kind: tl.constexpr = tl.int32 if INT8 else tl.float32
    acc = tl.zeros((BM, BN), dtype=kind)
    for k in range(0, K, BK):
        a = a_desc.load([start, k])
        if B_IS_KN:
            acc = tl.dot(a, b_desc.load([k, n0]), acc, out_dtype=kind)
        else:
            acc = tl.dot(a, b_desc.load([n0, k]).T, acc, out_dtype=kind)
    rows = start + tl.arange(0, BM)
    cols = n0 + tl.arange(0, BN)
    here = rows < stop
    inside = cols >= 0 if EVEN else cols < N
    out = acc.to(tl.float32)
    if INT8:
        out = out * tl.load(row_scale_ptr + rows, mask=here, other=0.0)[:, None]
    if COLUMN_SCALE:
        out = out * tl.load(column_scale_ptr + cols, mask=inside, other=0.0)[None, :]
    if DELTA:
        for c in range(0, C, CB):
            out = tl.dot(low_desc.load([start, c]), m_desc.load([m0 + c, n0]), out)
    if BIAS:
        out += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    live = here[:, None] & inside[None, :]
    if RESIDUAL:
        at = residual_ptr + rows.to(tl.int64)[:, None] * stride_residual + cols[None, :]
        out += tl.load(at, mask=live, other=0.0).to(tl.float32)
    c_at = c_ptr + rows.to(tl.int64)[:, None] * stride_c + cols[None, :]
    tl.store(c_at, out.to(c_ptr.dtype.element_ty), mask=live)


@Kernel
@triton.jit(do_not_specialize=["tile_count"])  # batches vary: nothing is compiled again for them
def _gemm(
    a_desc, b_desc, low_desc, m_desc, c_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, residual_ptr, tiles_ptr,
    N, K, C, step, stride_c, stride_residual, tile_count,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, CB: tl.constexpr, DELTA: tl.constexpr,
    INT8: tl.constexpr, B_IS_KN: tl.constexpr, COLUMN_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tile_count * tl.cdiv(N, BN), tl.num_programs(0), flatten=False):
            _tile(
                pid, a_desc, b_desc, low_desc, m_desc, c_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, residual_ptr,
                tiles_ptr, N, K, C, step, stride_c, stride_residual, tile_count,
                BM, BN, BK, GROUP, CB, DELTA, INT8, B_IS_KN, COLUMN_SCALE, BIAS, RESIDUAL, EVEN,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a_desc, b_desc, low_desc, m_desc, c_ptr, row_scale_ptr, column_scale_ptr, bias_ptr,
            residual_ptr, tiles_ptr, N, K, C, step, stride_c, stride_residual, tile_count,
            BM, BN, BK, GROUP, CB, DELTA, INT8, B_IS_KN, COLUMN_SCALE, BIAS, RESIDUAL, EVEN,
        )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def config(int8: bool) -> dict[str, int]:
    """Tile sizes and depth (measured on an H100: benchmarks/LOG.md). They must not depend on the number of rows, or an
    adapter's sums would be taken in another order in company. Persistent programs, one a multiprocessor, pay in 16 bits
    only."""
    if int8:
        return {"BN": 256, "BK": 128, "GROUP": 16, "PERSISTENT": False, "num_warps": 8, "num_stages": 4}
    return {"BN": 256, "BK": 64, "GROUP": 16, "PERSISTENT": True, "num_warps": 8, "num_stages": 3}


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    tiles: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    low: Tensor | None = None,
    matrices: Tensor | None = None,
    b_is_kn: bool = False,
    options: dict[str, int] | None = None,
) -> Tensor:
    """Fill ``out`` [M, N] (16 bits, rows contiguous) with the product; see the module's equation.

    Args:
        a: [M, K], int8 with ``row_scale`` [M] float32, or 16 bits. Strides of its rows are multiples of 16 bytes. Where
            ``hopper.takes_slices``, also [2, M, K]: codes, and what they leave in 256ths of their unit.
        b: [N, K] of a's type; [K, N] with ``b_is_kn`` (16 bits only).
        tiles: int32 [3, tiles]: first row, end row and adapter of each tile of at most ``TILE_ROWS`` rows.
        column_scale, bias: [N].
        residual: [M, N], added to the result.
        low: [M, C], the low-rank products in out's type; ``matrices`` [n, C, N] what each adapter's meet, of rows that
            are a multiple of 16 bytes apart, and adapters a multiple of rows.
        options: of Triton's kernel, which then runs also where ``hopper`` would.
    """
    if options is None and hopper.takes(a, b, out, row_scale, column_scale, bias, residual, low, matrices, b_is_kn):
        hopper.product(a, b, out, tiles, row_scale, column_scale, bias, residual, low, matrices, b_is_kn)
        return out
    if a.dim() == 3:
        raise ValueError(f"slices {list(a.shape)} are for Hopper's kernel, which does not take this product")
    k = a.shape[1]
    n = out.shape[1]
    int8 = a.dtype == torch.int8
    chosen = dict(options or config(int8))
    bn, bk = chosen["BN"], chosen["BK"]
    count = tiles.shape[1]
    a_desc = descriptor(a, a.shape, a.stride(0), (TILE_ROWS, bk))
    b_desc = descriptor(b, b.shape, b.stride(0), (bk, bn) if b_is_kn else (bn, bk))
    low_desc: Any = None
    m_desc: Any = None
    columns = block = step = 16
    if low is not None and matrices is not None:
        columns = low.shape[1]
        block = min(32, columns)  # more would not fit beside four stages of operands in shared memory
        low_desc = descriptor(low, low.shape, low.stride(0), (TILE_ROWS, block))
        step = matrices.stride(0) // matrices.stride(1)
        height = (matrices.shape[0] - 1) * step + columns
        m_desc = descriptor(matrices, (height, n), matrices.stride(1), (block, bn))
    programs = count * cdiv(n, bn)
    if chosen["PERSISTENT"]:
        programs = min(programs, _multiprocessors(a.device))
    _gemm(
        (programs,), a_desc, b_desc, low_desc, m_desc, out, row_scale, column_scale, bias, residual, tiles,
        n, k, columns, step, out.stride(0), 0 if residual is None else residual.stride(0), count,
        BM=TILE_ROWS, CB=block, DELTA=low is not None, INT8=int8, B_IS_KN=b_is_kn,
        COLUMN_SCALE=column_scale is not None, BIAS=bias is not None, RESIDUAL=residual is not None, EVEN=n % bn == 0,
        enable_fp_fusion=False,  # or scale and residual were one rounding where no delta stands between them
        **chosen,
    )  # fmt: skip
    return out
