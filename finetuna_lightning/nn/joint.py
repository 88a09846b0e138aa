"""Frozen 8-bit layers with the deltas of many adapters, as few products as there can be: one product a weight in each
direction, however many adapters there are, their deltas added while it is written.

``Y = X W^T + low B^T`` with ``low = s X A^T``; backwards ``dlow = s dY B``, ``dX = dY W + dlow A``, ``dA = dlow^T X``,
``dB = dY^T low``: each row by its own adapter's A and B (arXiv 2106.09685). W stays in its 8 bits; with
``compute="int8"`` X and dY are quantised per row, W's row scales folded into dY, so that the one stored copy serves both
directions; with ``"16bit"`` W is read out into scratch for each product. A, B and their gradients are in float32, their
products in the activations' type. What a row gets does not depend on any other adapter's rows, to the bit.

Three forms: one layer; q, k and v with the rotary embedding; and a whole SwiGLU. What they keep for the backward pass
is said at each.

Shapes: T rows of the batch, d features, N outputs, f intermediate features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.autograd.function import once_differentiable

from finetuna_lightning.nn import joint_cpu
from finetuna_lightning.nn.lora import LoRALinear
from finetuna_lightning.nn.quantized import QuantizedWeight
from finetuna_lightning.ops import reference
from finetuna_lightning.ops.library import has_joint_kernels
from finetuna_lightning.ops.tiling import Tiling

Deltas = Sequence[Sequence[LoRALinear | None]]
"""By layer, the delta of each slot of the tiling."""


def takes(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether the kernels take this product: a Hopper GPU or newer, 16-bit activations, sizes that are multiples of 16,
    nothing trained but the deltas. On the CPU, ``nn.joint_cpu`` does."""
    if x.device.type == "cpu":
        return joint_cpu.takes(x, weights, biases)
    return (
        has_joint_kernels(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() > 0
        and all(
            q.compute in ("16bit", "int8") and q.codes.device == x.device and not any(side % 16 for side in q.shape)
            for q in weights
        )
        and not any(bias is not None and bias.requires_grad for bias in biases)
    )


def takes_delta(delta: LoRALinear) -> bool:
    """Whether the kernels add this delta: float32, without a bias."""
    a, b = delta.lora_A, delta.lora_B
    return (
        delta.lora_bias is None
        and a.dtype == b.dtype == torch.float32
        and a.is_contiguous()
        and b.is_contiguous()
    )


# ---- where the adapters' matrices stand ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """The deltas of some layers that share their input: addresses [L, n], ranks [L, n], scalings [n, C], and R."""

    a: Tensor
    b: Tensor
    ranks: Tensor
    scales: Tensor
    rank: int
    own: tuple[tuple[int, ...], ...]  # the ranks, on the host

    def layer(self, index: int) -> _Table:
        """Of one layer alone."""
        one = slice(index, index + 1)
        columns = slice(index * self.rank, (index + 1) * self.rank)
        return _Table(self.a[one], self.b[one], self.ranks[one], self.scales[:, columns].contiguous(), self.rank, self.own[one])


_TABLES: OrderedDict[Any, tuple[_Table, tuple[_Table, ...]]] = OrderedDict()
_KEPT = 4096


def _tables(deltas: Deltas, device: torch.device) -> tuple[_Table, tuple[_Table, ...]] | None:
    """The table of ``deltas``, and that of each layer; made once for parameters that stay where they are. None where
    there is no delta at all."""
    if all(delta is None for layer in deltas for delta in layer):
        return None
    key = (device, tuple(
        tuple(
            (0, 0, 0, 0.0) if d is None else (d.lora_A.data_ptr(), d.lora_B.data_ptr(), d.rank, d.scaling) for d in layer
        )
        for layer in deltas
    ))  # fmt: skip
    found = _TABLES.get(key)
    if found is None:
        found = _make_tables(key[1], device)
        _TABLES[key] = found
        if len(_TABLES) > _KEPT:
            _TABLES.popitem(last=False)
    return found


def _make_tables(
    rows: tuple[tuple[tuple[int, int, int, float], ...], ...], device: torch.device
) -> tuple[_Table, tuple[_Table, ...]]:
    from finetuna_lightning.ops.kernels import lowrank

    rank = lowrank.padded_rank(max(entry[2] for layer in rows for entry in layer))
    columns = lowrank.columns_of(len(rows), rank)
    scales = torch.zeros(len(rows[0]), columns)
    for index, layer in enumerate(rows):
        scales[:, index * rank : (index + 1) * rank] = torch.tensor([entry[3] for entry in layer])[:, None]
    whole = _Table(
        torch.tensor([[entry[0] for entry in layer] for layer in rows]).to(device),
        torch.tensor([[entry[1] for entry in layer] for layer in rows]).to(device),
        torch.tensor([[entry[2] for entry in layer] for layer in rows], dtype=torch.int32).to(device),
        scales.to(device),
        rank,
        tuple(tuple(entry[2] for entry in layer) for layer in rows),
    )
    return whole, tuple(whole.layer(index) for index in range(len(rows)))


def _parameters(deltas: Deltas) -> list[Tensor]:
    return [p for layer in deltas for delta in layer if delta is not None for p in (delta.lora_A, delta.lora_B)]


# ---- products --------------------------------------------------------------------------------------------------------


@dataclass
class _Operand:
    """Rows as the products take them: codes with a scale a row, or, ``scale`` being None, 16-bit values."""

    values: Tensor
    scale: Tensor | None


def _operand(x: Tensor, compute: str, column_scale: Tensor | None = None) -> _Operand:
    from finetuna_lightning.ops.kernels import rows

    return _Operand(*rows.quantize(x, column_scale)) if compute == "int8" else _Operand(x, None)


def _read_out(q: QuantizedWeight, out: Tensor) -> Tensor:
    from finetuna_lightning.ops.kernels import rows

    if q.scheme == "int8":
        return rows.dequantize(q.codes, q.scale, out)
    return out.copy_(reference.dequantize(q.codes, q.scale, q.scheme, q.block_size, out.dtype))


def _forward(
    x: _Operand, q: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, tiling: Tiling, low: Tensor | None,
    matrices: Tensor | None,
) -> Tensor:  # fmt: skip
    from finetuna_lightning.ops.kernels.gemm import gemm

    outputs, inputs = q.shape
    out = torch.empty(x.values.shape[0], outputs, dtype=dtype, device=x.values.device)
    if x.scale is not None:
        weight, column_scale = q.codes, q.scale
    else:
        weight, column_scale = _read_out(q, torch.empty(outputs, inputs, dtype=dtype, device=out.device)), None
    return gemm(
        x.values, weight, out, tiling.tiles, row_scale=x.scale, column_scale=column_scale, bias=bias, low=low,
        matrices=matrices,
    )  # fmt: skip


def _backward(
    grad: _Operand, weights: Sequence[QuantizedWeight], dtype: torch.dtype, tiling: Tiling, low: Tensor | None,
    matrices: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the layers' common input: [T, d] from their gradients side by side [T, sum of N]. An int8 ``grad``
    has the weights' row scales within."""
    from finetuna_lightning.ops.kernels import rows
    from finetuna_lightning.ops.kernels.gemm import gemm

    inputs, outputs = weights[0].shape[1], sum(q.shape[0] for q in weights)
    device = grad.values.device
    out = torch.empty(grad.values.shape[0], inputs, dtype=dtype, device=device)
    start = 0
    if grad.scale is None:
        scratch = torch.empty(outputs, inputs, dtype=dtype, device=device)
        for q in weights:
            _read_out(q, scratch[start : start + q.shape[0]])
            start += q.shape[0]
        return gemm(grad.values, scratch, out, tiling.tiles, low=low, matrices=matrices, b_is_kn=True)
    scratch = torch.empty(inputs, outputs, dtype=torch.int8, device=device)
    for q in weights:
        rows.transpose(q.codes, scratch[:, start : start + q.shape[0]])
        start += q.shape[0]
    return gemm(grad.values, scratch, out, tiling.tiles, row_scale=grad.scale, low=low, matrices=matrices)


def _scales(weights: Sequence[QuantizedWeight]) -> Tensor:
    return weights[0].scale if len(weights) == 1 else torch.cat([q.scale for q in weights])


class _Deltas:
    """The low-rank side of some layers that share their input, through one forward and one backward pass."""

    def __init__(self, deltas: Deltas, tiling: Tiling, device: torch.device) -> None:
        found = _tables(deltas, device)
        self.tiling, self.deltas = tiling, deltas
        self.whole, self.layers = found if found is not None else (None, ())

    def low(self, x: Tensor) -> Tensor | None:
        """``s X A^T`` of all layers side by side [T, C]."""
        from finetuna_lightning.ops.kernels import lowrank

        if self.whole is None:
            return None
        return lowrank.down(x, self.inner(x), self.whole.scales, self.tiling.tiles)

    def inner(self, like: Tensor) -> Tensor:
        """The layers' A [n, C, d]."""
        from finetuna_lightning.ops.kernels import lowrank

        assert self.whole is not None
        width = next(d.lora_A.shape[1] for layer in self.deltas for d in layer if d is not None)
        return lowrank.gather(self.whole.a, self.whole.ranks, width, self.whole.rank, like.dtype, by_rank=True)

    def outputs(self, index: int, low: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What the product of layer ``index`` adds: its part of ``low`` [T, R], and its B [n, R, N]."""
        if low is None or not any(self.layers[index].own[0]):
            return None, None
        return self._part(low, index), self._up(index, dtype)

    def _part(self, low: Tensor, index: int) -> Tensor:
        assert self.whole is not None
        return low[:, index * self.whole.rank : (index + 1) * self.whole.rank]

    def _up(self, index: int, dtype: torch.dtype) -> Tensor:
        from finetuna_lightning.ops.kernels import lowrank

        one = self.layers[index]
        width = next(d.lora_B.shape[0] for d in self.deltas[index] if d is not None)
        return lowrank.gather(one.b, one.ranks, width, one.rank, dtype, by_rank=False)

    def backward_low(self, grads: Sequence[Tensor]) -> Tensor | None:
        """``s dY B`` of all layers side by side [T, C], from the gradient of each layer's output [T, N]."""
        from finetuna_lightning.ops.kernels import lowrank

        if self.whole is None:
            return None
        columns = self.whole.scales.shape[1]
        full = columns == len(grads) * self.whole.rank and all(any(one.own[0]) for one in self.layers)
        make = torch.empty if full else torch.zeros
        low = make(grads[0].shape[0], columns, dtype=grads[0].dtype, device=grads[0].device)
        for index, grad in enumerate(grads):
            if any(self.layers[index].own[0]):
                up = self._up(index, grad.dtype)
                lowrank.down(grad, up, self.layers[index].scales, self.tiling.tiles, self._part(low, index))
        return low

    def gradients(self, x: Tensor | None, grads: Sequence[Tensor], low: Tensor | None, back: Tensor | None) -> list[Any]:
        """The gradients of ``_parameters(deltas)``, in its order."""
        from finetuna_lightning.ops.kernels import lowrank

        if self.whole is None or low is None or back is None or x is None:
            return []
        tiling, whole = self.tiling, self.whole
        down = lowrank.outer(x, back, tiling.chunks, tiling.first, whole.ranks, whole.rank, by_rank=True)
        found: list[Any] = []
        for index, grad in enumerate(grads):
            one = self.layers[index]
            if not any(one.own[0]):
                continue
            part = self._part(low, index)
            up = lowrank.outer(grad, part, tiling.chunks, tiling.first, one.ranks, one.rank, by_rank=False)
            for slot, delta in enumerate(self.deltas[index]):
                if delta is None:
                    continue
                a, b = delta.lora_A, delta.lora_B
                at = (slot * len(grads) + index) * x.shape[1] * whole.rank
                found.append(down.as_strided(a.shape, a.stride(), at))
                found.append(up.as_strided(b.shape, b.stride(), slot * grad.shape[1] * whole.rank))
        return found


# ---- the three forms -------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """Keeps x, and ``low``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: QuantizedWeight, bias: Tensor | None, deltas: _Deltas, *_: Tensor) -> Tensor:
        low = deltas.low(x)
        part, matrices = deltas.outputs(0, low, x.dtype)
        ctx.q, ctx.deltas, ctx.dtype = q, deltas, x.dtype
        ctx.save_for_backward(None if deltas.whole is None else x, low)
        return _forward(_operand(x, q.compute), q, bias, x.dtype, deltas.tiling, part, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, deltas = ctx.q, ctx.deltas
        x, low = ctx.saved_tensors
        grad = _rows(grad)
        back = deltas.backward_low([grad])
        grad_x = None
        if ctx.needs_input_grad[0]:
            operand = _operand(grad, q.compute, q.scale)
            grad_x = _backward(operand, [q], ctx.dtype, deltas.tiling, back, None if back is None else deltas.inner(grad))
        return (grad_x, None, None, None, *deltas.gradients(x, [grad], low, back))


def _rows(grad: Tensor) -> Tensor:
    """A gradient as the kernels take it: rows of contiguous features, 16 bytes aligned."""
    aligned = grad.stride(-1) == 1 and grad.stride(0) * grad.element_size() % 16 == 0 and grad.data_ptr() % 16 == 0
    return grad if aligned else grad.contiguous()


class _Attention(torch.autograd.Function):
    """q, k, v with the rotary embedding on q and k. Keeps x and ``low``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, int, int], weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor | None], deltas: _Deltas, *_: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from finetuna_lightning.ops.kernels import rows

        batch, tokens, size = shape
        low = deltas.low(x)
        operand = _operand(x, weights[0].compute)
        out = []
        for index, (q, bias) in enumerate(zip(weights, biases, strict=True)):
            part, matrices = deltas.outputs(index, low, x.dtype)
            y = _forward(operand, q, bias, x.dtype, deltas.tiling, part, matrices)
            heads = y.view(batch, tokens, -1, size)
            if index < 2:
                rows.rotate(heads, y, cos, sin)
            out.append(heads.transpose(1, 2))
        ctx.weights, ctx.deltas, ctx.shape = weights, deltas, shape
        ctx.save_for_backward(x, low, cos, sin)
        return out[0], out[1], out[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        from finetuna_lightning.ops.kernels import rows

        x, low, cos, sin = ctx.saved_tensors
        weights, deltas = ctx.weights, ctx.deltas
        outputs = [q.shape[0] for q in weights]
        whole = torch.empty(x.shape[0], sum(outputs), dtype=x.dtype, device=x.device)
        parts = list(whole.split(outputs, 1))
        for index, (grad, part) in enumerate(zip(grads, parts, strict=True)):
            heads = grad.transpose(1, 2)
            if index < 2:
                heads = heads if heads.stride(-1) == 1 else heads.contiguous()
                rows.rotate(heads, part, cos, sin, backward=True)
            else:
                part.view(heads.shape).copy_(heads)
        back = deltas.backward_low(parts)
        grad_x = None
        if ctx.needs_input_grad[0]:
            operand = _operand(whole, weights[0].compute, _scales(weights))
            grad_x = _backward(operand, weights, x.dtype, deltas.tiling, back, None if back is None else deltas.inner(x))
        return (grad_x, *[None] * 6, *deltas.gradients(x, parts, low, back))


class _SwiGLU(torch.autograd.Function):
    """Keeps x, the gate's and up's outputs, and both ``low``; ``silu(gate) * up`` is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Sequence[QuantizedWeight], first: _Deltas, last: _Deltas, *_: Tensor
    ) -> Tensor:
        from finetuna_lightning.ops.kernels import rows

        compute, dtype = weights[0].compute, x.dtype
        low = first.low(x)
        operand = _operand(x, compute)
        gate, up = (
            _forward(operand, q, None, dtype, first.tiling, *first.outputs(index, low, dtype))
            for index, q in enumerate(weights[:2])
        )
        del operand
        h, codes, scale = rows.swiglu(gate, up, quantized=compute == "int8")
        low_h = last.low(h)
        operand = _Operand(h, None) if codes is None else _Operand(codes, scale)
        ctx.weights, ctx.first, ctx.last = weights, first, last
        ctx.save_for_backward(None if first.whole is None else x, gate, up, low, low_h)
        return _forward(operand, weights[2], None, dtype, last.tiling, *last.outputs(0, low_h, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from finetuna_lightning.ops.kernels import rows

        x, gate, up, low, low_h = ctx.saved_tensors
        weights, first, last = ctx.weights, ctx.first, ctx.last
        compute, dtype = weights[0].compute, gate.dtype
        grad = _rows(grad)
        back_h = last.backward_low([grad])
        h = _backward(
            _operand(grad, compute, weights[2].scale), weights[2:], dtype, last.tiling, back_h,
            None if back_h is None else last.inner(grad),
        )  # fmt: skip
        int8 = compute == "int8"
        both, codes, scale = rows.swiglu_backward(h, gate, up, _scales(weights[:2]) if int8 else None)  # h is now the
        outer_grads = last.gradients(h, [grad], low_h, back_h)  # ... product that went into down
        del h
        parts = list(both.split(gate.shape[1], 1))
        back = first.backward_low(parts)
        grad_x = None
        if ctx.needs_input_grad[0]:
            operand = _Operand(both, None) if codes is None else _Operand(codes, scale)
            matrices = None if back is None else first.inner(both)
            grad_x = _backward(operand, weights[:2], dtype, first.tiling, back, matrices)
        del codes, scale
        return (grad_x, None, None, None, *first.gradients(x, parts, low, back), *outer_grads)


def linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None, deltas: Sequence[LoRALinear | None], tiling: Tiling) -> Tensor:
    """``x W^T + bias`` plus each row's own delta: x [..., d], result [..., N]."""
    if x.device.type == "cpu":
        return joint_cpu.layers(x, [q], [bias], [deltas], tiling.spans)[0]
    flat = _rows(x.reshape(-1, x.shape[-1]))
    out: Tensor = _Linear.apply(flat, q, bias, _Deltas([deltas], tiling, x.device), *_parameters([deltas]))  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def attention_inputs(
    x: Tensor, cos: Tensor, sin: Tensor, size: int, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None],
    deltas: Deltas, tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v of x [B, T, d], each [B, heads, T, size], q and k rotated by cos and sin [B or 1, T, size]."""
    batch, tokens, features = x.shape
    cos, sin = (table.expand(batch, -1, -1).reshape(batch * tokens, size) for table in (cos, sin))
    if x.device.type == "cpu":
        out = joint_cpu.layers(x, weights, biases, deltas, tiling.spans, (cos, sin, size))
        q, k, v = (y.view(batch, tokens, -1, size).transpose(1, 2) for y in out)
        return q, k, v
    inner = _Deltas(deltas, tiling, x.device)
    flat = _rows(x.reshape(-1, features))
    return _Attention.apply(  # type: ignore[no-any-return, no-untyped-call]
        flat, cos, sin, (batch, tokens, size), weights, biases, inner, *_parameters(deltas)
    )


def swiglu(x: Tensor, weights: Sequence[QuantizedWeight], deltas: Deltas, tiling: Tiling) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of x [..., d], weights and deltas being those of gate, up and down."""
    if x.device.type == "cpu":
        gate, up = joint_cpu.layers(x, weights[:2], [None, None], deltas[:2], tiling.spans)
        return joint_cpu.layers(functional.silu(gate) * up, weights[2:], [None], deltas[2:], tiling.spans)[0]
    first, last = (_Deltas(part, tiling, x.device) for part in (deltas[:2], deltas[2:]))
    flat = _rows(x.reshape(-1, x.shape[-1]))
    out: Tensor = _SwiGLU.apply(flat, weights, first, last, *_parameters(deltas))  # type: ignore[no-untyped-call]
    return out.view(x.shape)


class _Norm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from finetuna_lightning.ops.kernels import rows

        y, rstd = rows.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from finetuna_lightning.ops.kernels import rows

        x, weight, rstd = ctx.saved_tensors
        return rows.norm_backward(grad, x, weight, rstd), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., d] with a frozen weight, in one pass each way."""
    flat = x.reshape(-1, x.shape[-1])
    return _Norm.apply(flat, weight, eps).view(x.shape)  # type: ignore[no-any-return, no-untyped-call]
