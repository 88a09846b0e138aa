"""``nn.joint`` on the CPU, for ``compute="int8"``: layers that share their input, with the deltas of many adapters, as
one step of autograd's.

X is quantised once for all of the layers. A delta is added to its adapter's rows by the very product that makes it,
and so is what it adds to the gradient of X, so that deltas cost no pass over Y or dX, no copy and no concatenation;
A and B of the layers stand side by side, one product for all of them. Each adapter's products have the shapes that they
have alone, so that its results are the same bits.

Kept for the backward pass: x, where there are deltas, and ``x A^T`` of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetuna_lightning.nn.lora import LoRALinear
from finetuna_lightning.nn.quantized import QuantizedWeight
from finetuna_lightning.ops import cpu

Spans = Sequence[tuple[int, int, int]]
"""(first row, end row, slot): whose rows they are."""


def takes(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether these layers are computed here: int8 products, nothing trained but the deltas."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and all(q.compute == "int8" and q.scheme == "int8" and q.codes.device == x.device for q in weights)
        and not any(bias is not None and bias.requires_grad for bias in biases)
    )


class _Side:
    """The low-rank side of some layers for one slot: A of those that have a delta, one below another; B of each.

    Args:
        deltas: of each layer, or None.
        spans: the slot's rows.
        dtype: of its products.
    """

    def __init__(
        self, deltas: Sequence[LoRALinear | None], spans: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        self.layers = [index for index, delta in enumerate(deltas) if delta is not None]
        own = [delta for delta in deltas if delta is not None]
        self.ranks, self.scalings = [delta.rank for delta in own], [delta.scaling for delta in own]
        self.spans = spans
        with torch.no_grad():
            a = [delta.lora_A.to(dtype) for delta in own]
            self.a = a[0] if len(a) == 1 else torch.cat(a)
            self.b = [delta.lora_B.to(dtype) for delta in own]

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Add the deltas to the layers' outputs; ``x A^T`` of each span."""
        lows = [x[start:stop] @ self.a.t() for start, stop in self.spans]
        for (start, stop), low in zip(self.spans, lows, strict=True):
            parts = low.split(self.ranks, 1)
            for index, part, b, scaling in zip(self.layers, parts, self.b, self.scalings, strict=True):
                outputs[index][start:stop].addmm_(part, b.t(), alpha=scaling)
        return lows

    def backward(
        self, x: Tensor, lows: Sequence[Tensor], grads: Sequence[Tensor], grad_x: Tensor | None
    ) -> list[Tensor]:
        """Add to ``grad_x`` what the deltas give; the gradients of A and B, layer by layer, in float32."""
        whole: list[Tensor] | None = None
        for (start, stop), low in zip(self.spans, lows, strict=True):
            own = [grads[index][start:stop] for index in self.layers]
            back = torch.empty(stop - start, sum(self.ranks), dtype=x.dtype)
            found = []
            parts = (back.split(self.ranks, 1), low.split(self.ranks, 1))
            for grad, b, scaling, into, part in zip(own, self.b, self.scalings, *parts, strict=True):
                torch.mm(grad, b, out=into).mul_(scaling)
                found.append((grad.t() @ (part * scaling)).float())
            down = (back.t() @ x[start:stop]).float().split(self.ranks)
            if grad_x is not None:
                grad_x[start:stop].addmm_(back, self.a)
            pairs = [one for pair in zip(down, found, strict=True) for one in pair]
            whole = pairs if whole is None else [one + other for one, other in zip(whole, pairs, strict=True)]
        assert whole is not None
        return whole


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> Tensor:
    """The rotary embedding of heads [T, H, size], in place; cos and sin [T, size], each half as the other. ``backward``
    turns the other way."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    c, s = cos[:, None, :half], sin[:, None, :half]
    s = -s if backward else s
    turned = first * s
    first.mul_(c).addcmul_(second, s, value=-1)
    second.mul_(c).add_(turned)
    return heads


class _Layers(torch.autograd.Function):
    """The outputs of some layers that share their input; with ``rotary`` (cos, sin, size) the first two are rotated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: tuple[Tensor, Tensor], weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor | None], sides: Sequence[_Side], rotary: tuple[Tensor, Tensor, int] | None, *_: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs = [cpu.int8_product(*quantized, q.codes, q.scale, x.dtype) for q in weights]
        for y, bias in zip(outputs, biases, strict=True):
            if bias is not None:
                y.add_(bias.to(y.dtype))
        lows = [side.add(x, outputs) for side in sides]
        for y in outputs[:2] if rotary else ():
            rotate_(y.view(y.shape[0], -1, rotary[2]), rotary[0], rotary[1])  # type: ignore[index]
        ctx.weights, ctx.sides, ctx.rotary = weights, sides, rotary
        ctx.save_for_backward(x if sides else None, *[low for own in lows for low in own])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *lows = ctx.saved_tensors
        grad_x = None
        if ctx.rotary:
            cos, sin, size = ctx.rotary
            turned = [rotate_(g.clone().view(g.shape[0], -1, size), cos, sin, True).view(g.shape) for g in grads[:2]]
            grads = (*turned, *grads[2:])
        if ctx.needs_input_grad[0]:
            for q, grad in zip(ctx.weights, grads, strict=True):
                grad_x = cpu.int8_product_backward(grad, q.codes, q.scale, grad_x)
        found: list[Tensor] = []
        for side in ctx.sides:
            own, lows = lows[: len(side.spans)], lows[len(side.spans) :]
            found += side.backward(x, own, grads, grad_x)
        return (grad_x, *[None] * 5, *found)


def layers(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    biases: Sequence[Tensor | None],
    deltas: Sequence[Sequence[LoRALinear | None]],
    spans: Spans,
    rotary: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, ...]:
    """``x W^T + bias`` plus each row's own delta, for every layer.

    Args:
        x: [..., d].
        deltas: by layer, the delta of each slot.
        spans: of x's rows.
        rotary: cos and sin [T, size], and the size of a head: the first two outputs are rotated by them.

    Returns:
        [..., N] for each layer, in x's type.
    """
    flat = x.reshape(-1, x.shape[-1])
    sides, parameters = [], []
    for slot in dict.fromkeys(span[2] for span in spans):
        own = [layer[slot] for layer in deltas]
        if any(delta is not None for delta in own):
            rows = [(start, stop) for start, stop, other in spans if other == slot]
            sides.append(_Side(own, rows, x.dtype))
            parameters += [p for delta in own if delta is not None for p in (delta.lora_A, delta.lora_B)]
    outputs = _Layers.apply(flat, cpu.quantized(x), weights, biases, sides, rotary, *parameters)  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)
