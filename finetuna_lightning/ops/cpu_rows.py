"""What stands between the products of a decoder layer, on the CPU: read-out of 8-bit rows, RMSNorm, SwiGLU.

A chain of plain torch operations over a whole matrix writes and reads each of its steps through memory; here a chain is
done over a piece of rows at a time, whose steps stay in the second-level cache. Everything goes row by row, so that a
row's result is the same bits whatever other rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIECE_ELEMENTS = 1 << 18


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Cuts of ``rows`` rows into pieces of about ``PIECE_ELEMENTS`` elements."""
    step = max(1, PIECE_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dequantize_rows_(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` [rows, columns] with ``codes * scale``, rounded once: codes int8, scale [rows] float32."""
    if out.dtype in (torch.float32, torch.float64):
        return out.copy_(codes).mul_(scale[:, None])
    for cut in pieces(*codes.shape):
        out[cut] = codes[cut].float().mul_(scale[cut, None])
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.empty_like(x), torch.empty(x.shape[0], 1)
        for cut in pieces(*x.shape):
            wide = x[cut].float()
            own = torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=rstd[cut])
            own.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            if x.dtype == torch.float32:
                torch.mul(wide, own, out=y[cut]).mul_(weight)
            else:
                y[cut] = wide.mul_(own)
                y[cut].mul_(weight)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        out, wide_weight = torch.empty_like(x), weight.float()
        for cut in pieces(*x.shape):  # operands of one type: torch is many times slower where it has to convert one
            wide, slope, own = x[cut].float(), grad[cut].float(), rstd[cut]
            slope = slope * wide_weight if grad.dtype == torch.float32 else slope.mul_(wide_weight)
            along = torch.linalg.vecdot(slope, wide)[:, None]
            along.mul_(own.pow(3)).div_(x.shape[1])
            out[cut] = slope.mul_(own).addcmul_(wide, along, value=-1)
        return out, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of x [rows, d], in x's type; the root mean square in float32. Differentiable in x."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(both: Tensor) -> Tensor:
    """``silu(gate) * up`` [rows, f] of ``both`` [rows, 2 f], gate and up side by side."""
    width = both.shape[1] // 2
    out = torch.empty(both.shape[0], width, dtype=both.dtype)
    for cut in pieces(both.shape[0], width):
        torch.mul(F.silu(both[cut, :width]), both[cut, width:], out=out[cut])
    return out


def swiglu_backward_(grad: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``both`` from ``grad``, that of ``silu(gate) * up`` [rows, f]; and, written over ``grad``,
    ``silu(gate) * up`` again."""
    width = both.shape[1] // 2
    out = torch.empty_like(both)
    for cut in pieces(both.shape[0], width):
        gate, up, own = both[cut, :width], both[cut, width:], grad[cut]
        opened = F.silu(gate)
        torch.ops.aten.silu_backward.grad_input(own * up, gate, grad_input=out[cut, :width])
        torch.mul(opened, own, out=out[cut, width:])
        torch.mul(opened, up, out=own)
    return out, grad


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> Tensor:
    """The rotary embedding ``x cos + rotate_half(x) sin`` of heads [T, H, size], in place; cos and sin [T, size].
    ``backward``: of the gradient instead."""
    half = heads.shape[-1] // 2
    for cut in pieces(heads.shape[0], heads.shape[1] * heads.shape[2]):
        first, second = heads[cut, :, :half], heads[cut, :, half:]
        (c, other_c), (s, other_s) = ((table[cut, None, :half], table[cut, None, half:]) for table in (cos, sin))
        turned = first * (s if backward else other_s)
        first.mul_(c).addcmul_(second, other_s if backward else s, value=1 if backward else -1)
        second.mul_(other_c).add_(turned, alpha=-1 if backward else 1)
    return heads
