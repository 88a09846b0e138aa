"""A 16-bit or float32 matrix into int8, one scale a row, in the bits of ``ops.reference`` on a CPU: quotients are
rounded once, codes to the nearest and ties to even. Launched by the threads that read a checkpoint."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetuna_lightning.ops.kernels.launch import Kernel, next_power_of_2

_ONE_PASS = 16384  # columns of a row that one program keeps in registers


@triton.jit
def _load(x_ptr, at, columns):
    return tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)


@triton.jit
def _scale(top):
    scale = tl.div_rn(tl.max(top, 0), 127.0)
    return tl.where(tl.max((top != top).to(tl.int32), 0) > 0, float("nan"), scale)


@triton.jit
def _store(codes_ptr, x, scale, at, columns):
    x = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
    x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even, for |x| < 2^22
    tl.store(codes_ptr + at, tl.minimum(tl.maximum(x, -127.0), 127.0).to(tl.int8), mask=at < columns)


@Kernel
@triton.jit(do_not_specialize=["first"])
def _quantize(x_ptr, codes_ptr, scale_ptr, columns, first, ONE_PASS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x_ptr += row * columns
    codes_ptr += (first + row) * columns
    if ONE_PASS:
        x = _load(x_ptr, at, columns)
        scale = _scale(tl.abs(x))
        _store(codes_ptr, x, scale, at, columns)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            x = _load(x_ptr, start + at, columns)
            top = tl.maximum(top, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        scale = _scale(top)
        for start in range(0, columns, BLOCK):
            x = _load(x_ptr, start + at, columns)
            _store(codes_ptr, x, scale, start + at, columns)
    tl.store(scale_ptr + first + row, scale)


def quantize(part: Tensor, codes: Tensor, scale: Tensor, first: int) -> None:
    """Fill the rows of ``codes`` [rows, columns] and ``scale`` [rows] from ``first`` on with whole rows of a matrix,
    ``part`` (flat; bfloat16, float16 or float32). A row that holds a NaN or an infinity gets a scale that is not
    finite. Without any row the kernel is compiled, and nothing runs."""
    columns = codes.shape[1]
    block = min(next_power_of_2(columns), _ONE_PASS)
    _quantize((part.numel() // columns,), part, codes, scale, columns, first, ONE_PASS=columns <= block, BLOCK=block,
              num_warps=max(1, min(16, block // 512)))  # fmt: skip
