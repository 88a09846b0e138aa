"""Cross entropy of each row of logits, and its gradient in their place, in one launch.

A program has a row: it reads the row once for the maximum and the sum (kept for each lane, so that nothing is reduced
within the loop; arXiv 1805.02867), and once more to write the gradient. Ignored rows are written as zeros and not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_lightning.ops.kernels.launch import Kernel, next_power_of_2

BLOCK = 4096  # logits at a time
WARPS = 8
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e38)  # finite: of two such a lane past the end takes the difference


@Kernel
@triton.jit  # type: ignore[untyped-decorator]
def _rows(logits, labels, losses, stride, columns, ignored, gradient: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * stride
    lanes = tl.arange(0, block)
    if label == ignored:
        tl.store(losses + row, 0.0)
        if gradient:
            for at in range(0, columns, block):
                tl.store(start + at + lanes, tl.zeros([block], start.dtype.element_ty), mask=at + lanes < columns)
    else:
        chosen = tl.load(start + label).to(tl.float32)
        highest = tl.full([block], _LOWEST, tl.float32)
        total = tl.zeros([block], tl.float32)
        for at in range(0, columns, block):
            x = tl.load(start + at + lanes, mask=at + lanes < columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, x)
            total = total * tl.exp2((highest - higher) * _LOG2E) + tl.exp2((x - higher) * _LOG2E)
            highest = higher
        top = tl.max(highest, 0)
        norm = top + tl.log(tl.sum(total * tl.exp2((highest - top) * _LOG2E), 0))
        tl.store(losses + row, norm - chosen)
        if gradient:
            for at in range(0, columns, block):
                inside = at + lanes < columns
                x = tl.load(start + at + lanes, mask=inside, other=0.0).to(tl.float32)
                slope = tl.exp2((x - norm) * _LOG2E) - tl.where(at + lanes == label, 1.0, 0.0)
                tl.store(start + at + lanes, slope.to(start.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, ignored: int, gradient: bool) -> None:
    """As ``ops.loss.cross_entropy_``, for float32, bfloat16 and float16: logits [rows, V] whose last dimension is
    contiguous, labels [rows] int64, losses [rows] float32, which is written."""
    rows, columns = logits.shape
    if logits.stride(1) != 1 or not labels.is_contiguous() or losses.dtype != torch.float32:
        raise ValueError(f"logits of strides {logits.stride()}, losses in {losses.dtype}: rows must be contiguous")
    if rows:
        block = min(BLOCK, next_power_of_2(columns))
        _rows(
            (rows,), logits, labels, losses, logits.stride(0), columns, ignored,
            gradient=gradient, block=block, num_warps=WARPS,
        )  # fmt: skip
