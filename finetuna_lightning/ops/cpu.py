"""8-bit products on the CPU: both directions over the one stored ``int8`` copy of W [out, in] with row scales s.

    Y  = (Xq Wq^T) * sx * s         Xq, sx = quantize_rows(X)         one scale a token
    dX = (Gq Wq) * sg               Gq, sg = quantize_rows(dY * s)    s is folded into dY before that is quantised

``torch._int_mm`` (oneDNN: AMX tiles or VNNI) takes Wq as it lies and transposed equally fast, so no second copy, not
even in scratch. Its sums are exact integers and everything else is done row by row, so that a row's result is the same
bits whatever other rows stand beside it.

Temporaries are a piece of the matrix at a time: such as stay in the second-level cache, and never a vocabulary's width
of int32.
"""

from __future__ import annotations

import platform
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INT8_MAX = 127.0
SMALLEST_SCALE = 2.0**-126  # a row of zeros needs some scale, and its inverse must be finite
LONGEST_SUM = 131_072  # 127 * 127 * this is still an int32
PIECE_ELEMENTS = 1 << 19


def has_int8(device: torch.device) -> bool:
    """Whether ``device`` is a CPU that multiplies int8 matrices in units of its own (AMX, AVX512-VNNI)."""
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_vnni_supported())


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` is an x86 CPU that has no units for products in bfloat16 (AMX, AVX512-BF16): a step in float32
    was 2.2 to 2.8 times as fast on one (benchmarks/LOG.md)."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def quantize_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [rows, columns], its columns times ``factor`` [columns] first: (codes int8, scale float32 [rows, 1]) with
    ``scale = max|x| / 127``, rounded to nearest. A row that is not finite gets a scale that is not."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, 1)
    step = max(1, PIECE_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        piece = x[start : start + step]
        if factor is not None:
            piece = piece * factor
        own = scale[start : start + step]
        # the two reductions are several times faster than abs().amax() or a norm
        torch.maximum(piece.amax(1, keepdim=True).float(), -piece.amin(1, keepdim=True).float(), out=own)
        own.div_(INT8_MAX).clamp_min_(SMALLEST_SCALE)
        codes[start : start + step] = (piece * own.reciprocal()).round_()
    return codes, scale


def _product(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """``(left right) * scale`` in float32: left int8 [m, k], right int8 [k, n], scale [m, 1]."""
    length = left.shape[1]
    if length <= LONGEST_SUM:
        total = torch._int_mm(left, right).float()
    else:
        total = torch.zeros(left.shape[0], right.shape[1])
        for start in range(0, length, LONGEST_SUM):
            total += torch._int_mm(left[:, start : start + LONGEST_SUM], right[start : start + LONGEST_SUM])
    return total.mul_(scale)


def int8_product(
    x_codes: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``X W^T`` [rows, out] in ``dtype``, from X's and W's codes and scales; in ``out``, where that is given."""
    rows, width = x_codes.shape[0], codes.shape[0]
    step = max(256, 4 * PIECE_ELEMENTS // max(rows, 1))
    if width <= step and out is None:
        return _product(x_codes, codes.t(), x_scale).mul_(scale).to(dtype)
    y = torch.empty(rows, width, dtype=dtype) if out is None else out
    for start in range(0, width, step):  # pieces of W's rows: each is read, and laid out for the tiles, once
        stop = start + step
        y[:, start:stop] = _product(x_codes, codes[start:stop].t(), x_scale).mul_(scale[start:stop])
    return y


def int8_product_backward(grad: Tensor, codes: Tensor, scale: Tensor, onto: Tensor | None = None) -> Tensor:
    """``dY W`` [rows, in] of grad [rows, out], in its type; added to ``onto``, in place, where that is given."""
    g_codes, g_scale = quantize_rows(grad, scale)
    product = _product(g_codes, codes, g_scale)
    return product.to(grad.dtype) if onto is None else onto.add_(product)


class _Int8Linear(torch.autograd.Function):
    """Nothing of x is kept for the backward pass: the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_codes: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = int8_product(x_codes, x_scale, codes, scale, x.dtype).view(*x.shape[:-1], codes.shape[0])
        return y if bias is None else y.add_(bias.to(y.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None]:
        codes, scale = ctx.saved_tensors
        flat = grad.reshape(grad.numel() // grad.shape[-1], grad.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = int8_product_backward(flat, codes, scale).view(*grad.shape[:-1], codes.shape[1])
        if ctx.needs_input_grad[5]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, None, grad_bias


class _Last(threading.local):
    """The activations that were quantised last: q, k and v (gate and up) are given the same ones."""

    of: Callable[[], Tensor | None] = staticmethod(lambda: None)
    version: int = -1
    quantized: tuple[Tensor, Tensor] | None = None


_last = _Last()


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of x's vectors, once for one and the same tensor."""
    cached = not torch.compiler.is_compiling() and not x.is_inference()
    if cached and _last.quantized is not None and _last.of() is x and _last.version == x._version:
        return _last.quantized
    result = quantize_rows(x.detach().reshape(x.numel() // x.shape[-1], x.shape[-1]))
    if cached:
        _last.of, _last.version, _last.quantized = weakref.ref(x), x._version, result
    return result


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``, x [..., in] quantised per token, result [..., out] in x's type; the gradient of x comes from a
    product in int8 too. Differentiable in x and bias."""
    return _Int8Linear.apply(x, *quantized(x), codes, scale, bias)  # type: ignore[no-any-return, no-untyped-call]
