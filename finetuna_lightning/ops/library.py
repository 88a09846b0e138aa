"""Operators as layers call them: differentiable, and dispatched to the implementation that fits the device.

Today each has the reference implementation alone; what is saved for the backward pass is the codes and scales, which
are the backbone's own storage, never a dequantised weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.ops import reference


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, scheme: str, block_size: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.scheme, ctx.block_size = scheme, block_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        return reference.linear(x, codes, scale, bias, scheme, block_size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        codes, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = reference.linear_backward(grad, codes, scale, ctx.scheme, ctx.block_size)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None


def quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *, scheme: str, block_size: int
) -> Tensor:
    """``x W^T + bias`` over 8-bit storage: x [..., in], codes [out, in], result [..., out] in x's type (under autocast,
    in autocast's). Differentiable in x and bias; the codes and scales are constants."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _QuantizedLinear.apply(x, codes, scale, bias, scheme, block_size)  # type: ignore[no-any-return]
