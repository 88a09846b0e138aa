"""Operators as layers call them: differentiable, and dispatched to the implementation that fits the device.

What is saved for the backward pass is the codes and scales, which are the backbone's own storage, never a dequantised
weight. ``compute="16bit"`` multiplies in the activations' type; ``compute="fp8"`` multiplies e4m3 codes in float8,
where the device can (CUDA, compute capability 8.9 and newer) and both sides of the matrix are multiples of 16;
``compute="int8"`` multiplies int8 codes in int8, activations quantised per token."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.ops import cpu, cpu_rows, reference
from finetuna_lightning.ops.tiling import tiling


def read_out(
    codes: Tensor, scale: Tensor, scheme: str, block_size: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The bits of ``reference.dequantize``, in ``out`` [rows, columns] where that is given; of int8, in one pass where
    torch takes several times as long."""
    if scheme == "int8" and not torch.compiler.is_compiling():
        on_gpu = dtype in (torch.bfloat16, torch.float16) and has_triton(codes.device)
        if on_gpu or codes.device.type == "cpu":
            into = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
            if not on_gpu:
                return cpu_rows.dequantize_rows_(codes, scale, into)
            from finetuna_lightning.ops.kernels import rows

            with torch.cuda.device_of(codes):  # Triton launches on the current one
                return rows.dequantize(codes, scale, into)
    matrix = reference.dequantize(codes, scale, scheme, block_size, dtype)
    return matrix if out is None else out.copy_(matrix)


class _QuantizedLinear(torch.autograd.Function):
    """Both products by the equations of ``reference.linear`` and ``reference.linear_backward``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, scheme: str, block_size: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.scheme, ctx.block_size = scheme, block_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = read_out(codes, scale, scheme, block_size, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        codes, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ read_out(codes, scale, ctx.scheme, ctx.block_size, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None


@cache
def _triton_generation(device: torch.device) -> int:
    if importlib.util.find_spec("triton") is None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _generation(device: torch.device) -> int:
    """The first digit of a CUDA device's compute capability; 0 without Triton. (torch.compile would trace a cache.)"""
    return _triton_generation(device)


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on ``device``: a CUDA GPU of compute capability 8.0 or newer."""
    return bool(device.type == "cuda" and _generation(device) >= 8)


def has_joint_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels of ``ops.kernels`` for joint layers run on ``device``, with Hopper's bulk copies."""
    return bool(device.type == "cuda" and _generation(device) >= 9)


def has_quantize_kernel(device: torch.device, scheme: str, dtypes: set[torch.dtype]) -> bool:
    """Whether ``quantize_rows`` takes matrices of ``dtypes``, on ``device``, for ``scheme``."""
    return has_triton(device) and scheme == "int8" and dtypes <= {torch.bfloat16, torch.float16, torch.float32}


def quantize_rows(part: Tensor, codes: Tensor, scale: Tensor, first: int) -> None:
    """Whole rows of a matrix, ``part`` (flat), into the rows of ``codes`` [out, in] and ``scale`` [out] from ``first``
    on: the bits of ``reference.quantize_groups``, in one launch on the current stream. No rows at all compile it."""
    from finetuna_lightning.ops.kernels import quantize

    quantize.quantize(part, codes, scale, first)


class _Int8Linear(torch.autograd.Function):
    """Y = X W^T with X quantised per row; dX = (dY * s) W with dY * s quantised per row, on CUDA: see ops.kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.ops.finetuna.int8_linear(x, codes, scale, bias)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        codes, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.finetuna.int8_linear_backward(grad, codes, scale)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias


@torch.library.custom_op("finetuna::int8_linear", mutates_args=(), device_types="cuda")
def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from finetuna_lightning.ops.kernels import gemm, rows

    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], codes.shape[0], dtype=x.dtype, device=x.device)
    tiles = tiling([("", 0, flat.shape[0])], x.device).tiles
    with torch.cuda.device_of(x):  # Triton launches on the current one
        values, row_scale = rows.quantize(flat)
        gemm.gemm(values, codes, out, tiles, row_scale=row_scale, column_scale=scale, bias=bias)
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("finetuna::int8_linear_backward", mutates_args=(), device_types="cuda")
def _int8_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    from finetuna_lightning.ops.kernels import gemm, rows

    flat = grad.reshape(-1, grad.shape[-1])
    out = torch.empty(flat.shape[0], codes.shape[1], dtype=grad.dtype, device=grad.device)
    tiles = tiling([("", 0, flat.shape[0])], grad.device).tiles
    with torch.cuda.device_of(grad):
        values, row_scale = rows.quantize(flat, scale)
        gemm.gemm(values, rows.transpose([codes]), out, tiles, row_scale=row_scale)
    return out.view(*grad.shape[:-1], -1)


@_int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_int8_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes.shape[1])


def _e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as e4m3 with one scale a row: (codes, scale [rows, 1])."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / reference.FP8_MAX
    return (x / scale).clamp_(-reference.FP8_MAX, reference.FP8_MAX).to(torch.float8_e4m3fn), scale


def _scaled_product(left: Tensor, scale_left: Tensor, right: Tensor, scale_right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [m, k] right [k, n] in float8, right column-major; the scales [m, 1] and [1, n] are float32. The row-scaled
    product has bfloat16 results only."""
    product = torch._scaled_mm(left, right, scale_a=scale_left, scale_b=scale_right, out_dtype=torch.bfloat16)
    return product.to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """Y = X W^T with X quantised per token; dX = (dY * s) W with dY * s quantised per token: the one stored copy of W
    serves both, its row scale s folded into dY (arXiv 2209.05433 for e4m3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        x_codes, x_scale = _e4m3_rows(x.reshape(-1, x.shape[-1]))
        weight = codes.view(torch.float8_e4m3fn)
        y = _scaled_product(x_codes, x_scale, weight.t(), scale[None, :], x.dtype).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        codes, scale = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        g_codes, g_scale = _e4m3_rows(flat * scale)
        weight = codes.t().contiguous().t().view(torch.float8_e4m3fn)  # column-major, as the matrix units want it
        ones = torch.ones(1, codes.shape[1], device=codes.device)
        grad_x = _scaled_product(g_codes, g_scale, weight, ones, grad.dtype).view(*grad.shape[:-1], -1)
        return grad_x, None, None, flat.sum(0) if ctx.needs_input_grad[3] else None


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    scheme: str,
    block_size: int,
    compute: str = "16bit",
) -> Tensor:
    """``x W^T + bias`` over 8-bit storage: x [..., in], codes [out, in], result [..., out] in x's type (under autocast,
    in autocast's). Differentiable in x and bias; the codes and scales are constants.

    What ``compute`` asks for and cannot be had is said once, for each shape: 8-bit units take multiples of 16, and the
    kernels of a GPU take int8 beside 16-bit activations alone.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    in_int8 = compute == scheme == "int8"
    if in_int8 and x.numel() and has_joint_kernels(x.device):
        narrow = x.dtype in (torch.bfloat16, torch.float16)
        if narrow and codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0:
            return _Int8Linear.apply(x, codes, scale, bias)  # type: ignore[no-any-return, no-untyped-call]
        _say_not_8bit(tuple(codes.shape), "int8", "multiples of 16" if narrow else "activations in 16 bits")
    if compute == "fp8" and scheme == "fp8" and x.is_cuda:
        if codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0:
            return _Fp8Linear.apply(x, codes, scale, bias)  # type: ignore[no-any-return, no-untyped-call]
        _say_not_8bit(tuple(codes.shape), "float8")
    if in_int8 and x.device.type == "cpu":
        return cpu.int8_linear(x, codes, scale, bias)
    return _QuantizedLinear.apply(x, codes, scale, bias, scheme, block_size)  # type: ignore[no-any-return, no-untyped-call]


@cache
def _say_not_8bit(shape: tuple[int, ...], kind: str, needed: str = "multiples of 16") -> None:
    how = "16 bits" if needed == "multiples of 16" else "float32"
    warnings.warn(f"a {shape[0]}x{shape[1]} layer is computed in {how}: {kind} needs {needed}", stacklevel=3)
