"""What stands between the products of a decoder layer, on the CPU: read-out of 8-bit rows, RMSNorm, SwiGLU, rotary
embedding.

In bfloat16 a kernel of ours does each chain in one pass a row (see ``ops.native``). In other types, and where there is
no kernel, plain torch does: over a piece of rows at a time, whose steps stay in the second-level cache, where over a
whole matrix each would be written and read through memory. Everything goes row by row, so that a row's result is the
same bits whatever other rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finetuna_lightning.ops import native

PIECE_ELEMENTS = 1 << 18


def pieces(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts of matrices with as many rows into pieces of about ``PIECE_ELEMENTS`` elements of the first: views that one
    call makes, for a slice at a time they would take as long as the work."""
    count = max(1, -(-matrices[0].numel() // PIECE_ELEMENTS))
    return zip(*(matrix.chunk(count) for matrix in matrices), strict=True)


def dequantize_rows_(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` [rows, columns] with ``codes * scale``, rounded once: codes int8, scale [rows] float32."""
    if out.dtype in (torch.float32, torch.float64):
        return out.copy_(codes).mul_(scale[:, None])
    stored = native.takes(out) and native.holds(codes, torch.int8, out.shape)
    if stored and native.holds(scale, torch.float32, out.shape[:1]) and out.dim() == 2 and out.is_contiguous():
        native.run("dequantize", codes, scale, out, *out.shape)
        return out
    wide: Tensor | None = None
    for piece, own, into in pieces(codes, scale[:, None], out):
        if wide is None or wide.shape != piece.shape:
            wide = torch.empty(piece.shape)
        into.copy_(wide.copy_(piece).mul_(own))
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.empty_like(x), torch.empty(x.shape[0], 1)
        ctx.save_for_backward(x, weight, rstd)
        if weight.shape == x.shape[1:] and x.dim() == 2 and native.takes(x, weight, y):
            native.run("rms_norm", x, weight, y, rstd, *x.shape, x.stride(0), eps)
            return y
        for part, own, into in pieces(x, rstd, y):
            wide = part.float()
            torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=own)
            own.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            if x.dtype == torch.float32:
                torch.mul(wide, own, out=into).mul_(weight)
            else:
                into.copy_(wide.mul_(own)).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        out = torch.empty_like(x)
        if weight.shape == x.shape[1:] and x.dim() == 2 and native.takes(grad, x, weight, out):
            native.run("rms_norm_backward", grad, x, weight, rstd, out, *x.shape, grad.stride(0), x.stride(0))
            return out, None, None
        wide_weight = weight.float()
        for part, own_grad, own, into in pieces(x, grad, rstd, out):
            # operands of one type: torch is many times slower where it has to convert one
            wide, slope = part.float(), own_grad.float()
            slope = slope * wide_weight if grad.dtype == torch.float32 else slope.mul_(wide_weight)
            along = torch.linalg.vecdot(slope, wide)[:, None]
            along.mul_(own.pow(3)).div_(x.shape[1])
            into.copy_(slope.mul_(own).addcmul_(wide, along, value=-1))
        return out, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of x [rows, d], in x's type; the root mean square in float32. Differentiable in x."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(both: Tensor) -> Tensor:
    """``silu(gate) * up`` [rows, f] of ``both`` [rows, 2 f], gate and up side by side."""
    out = torch.empty(both.shape[0], both.shape[1] // 2, dtype=both.dtype)
    if both.dim() == 2 and native.takes(both):
        native.run("swiglu", both, out, *out.shape, both.stride(0))
        return out
    for into, gate, up in pieces(out, *both.chunk(2, 1)):
        torch.mul(F.silu(gate), up, out=into)
    return out


def swiglu_backward_(grad: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``both`` from ``grad``, that of ``silu(gate) * up`` [rows, f]; and, written over ``grad``,
    ``silu(gate) * up`` again."""
    out = torch.empty(both.shape, dtype=both.dtype)
    if both.dim() == 2 and native.takes(both, grad) and grad.is_contiguous():
        native.run("swiglu_backward", grad, both, out, *grad.shape, both.stride(0))
        return out, grad
    for own, gate, up, of_gate, of_up in pieces(grad, *both.chunk(2, 1), *out.chunk(2, 1)):
        opened = F.silu(gate)
        torch.ops.aten.silu_backward.grad_input(own * up, gate, grad_input=of_gate)
        torch.mul(opened, own, out=of_up)
        torch.mul(opened, up, out=own)
    return out, grad


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> Tensor:
    """The rotary embedding ``x cos + rotate_half(x) sin`` of heads [T, H, size], in place; cos and sin [T, size].
    ``backward``: of the gradient instead."""
    size = heads.shape[2]
    fit = cos.shape == sin.shape == (heads.shape[0], size) and size % 2 == 0 and heads.stride(1) == size
    if fit and native.takes(heads, cos, sin):
        native.run("rotate", heads, cos, sin, *heads.shape, heads.stride(0), cos.stride(0), sin.stride(0), backward)
        return heads
    tables = sin[:, None].chunk(2, -1)
    for_first, for_second = tables[::-1] if backward else tables
    sign = 1 if backward else -1
    for part, c, s, other_s in pieces(heads, cos[:, None], for_first, for_second):
        first, second = part.clone().chunk(2, -1)
        part.mul_(c)
        turned, other = part.chunk(2, -1)
        turned.addcmul_(second, s, value=sign)
        other.addcmul_(first, other_s, value=-sign)
    return heads
