"""``nn.joint`` on the CPU: layers that share their input, with the deltas of many adapters, as one step of autograd's.

The outputs of the layers stand side by side, and so do A and B of their deltas, so that there is one product for all of
them in each direction; neighbours that have as many rows and deltas of one form are one batched product, added to their
rows by the very product that makes it. Deltas cost no pass over Y or dX, no copy and no concatenation.

With ``compute="int8"`` X is quantised once for all of the layers, and sums are exact integers; an adapter's products have
the shapes that they have alone: its results are the same bits. With ``"16bit"`` the codes are read out into scratch, one
direction of one group of layers at a time; of other numbers of rows a BLAS may sum in another order, so that company
changes the last bits.

Kept for the backward pass: x, where there are deltas, and ``s x A^T`` of each adapter; of a SwiGLU also gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetuna_lightning.nn.lora import LoRALinear
from finetuna_lightning.nn.quantized import QuantizedWeight
from finetuna_lightning.ops import cpu, cpu_rows

Spans = Sequence[tuple[int, int, int]]
"""(first row, end row, slot): whose rows they are."""

Deltas = Sequence[Sequence[LoRALinear | None]]
"""By layer, the delta of each slot."""

PIECE_ROWS = 512  # of one product with a weight in 16 bits: oneDNN takes longer a row for more, and for fewer


def takes(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether these layers are computed here: float32 or bfloat16, nothing trained but the deltas."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(
            q.codes.device == x.device and (q.compute == "16bit" or q.compute == q.scheme == "int8") for q in weights
        )
        and not any(bias is not None and bias.requires_grad for bias in biases)
    )


# ---- whose deltas are one product ------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Neighbours, each with ``length`` rows and deltas of the same form.

    Args:
        start: the first row.
        length: rows of each.
        slots: whose they are, in turn.
        form: by layer, (rank, scaling) of the delta, or None.
    """

    start: int
    length: int
    slots: list[int]
    form: tuple[tuple[int, float] | None, ...]

    def of(self, whole: Tensor) -> Tensor:
        """Their rows of ``whole`` [T, N]: [n, length, N]."""
        count = len(self.slots)
        return whole[self.start : self.start + count * self.length].view(count, self.length, whole.shape[1])


class _Plan:
    """The layers' weights, and the low-rank side of one forward and one backward pass.

    Args:
        weights: of the layers.
        biases: of each, or None.
        deltas: by layer, that of each slot.
        spans: of the rows.
        dtype: of the activations. In float32 each has its own product: the BLAS sums a batch of them in another order.
    """

    def __init__(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], deltas: Deltas, spans: Spans,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.weights, self.biases, self.deltas, self.spans = weights, biases, deltas, spans
        self.widths = [q.shape[0] for q in weights]
        self.runs: list[_Run] = []
        for start, stop, slot in spans:
            form = tuple(None if own[slot] is None else (own[slot].rank, own[slot].scaling) for own in deltas)  # type: ignore[union-attr]
            last = self.runs[-1] if self.runs else None
            if stop == start or not any(form):
                continue
            if last is not None and dtype != torch.float32 and (last.length, last.form) == (stop - start, form):
                if last.start + last.length * len(last.slots) == start:
                    last.slots.append(slot)
                    continue
            self.runs.append(_Run(start, stop - start, [slot], form))

    def parameters(self) -> list[Tensor]:
        """What is trained, in the order of ``gradients``."""
        return [p for delta in self._own() for p in (delta.lora_A, delta.lora_B)]

    def _own(self) -> list[LoRALinear]:
        return [delta for layer in self.deltas for delta in layer if delta is not None]

    def _inner(self, run: _Run, dtype: torch.dtype) -> Tensor:
        """A of the run's layers, one below another: [n, R, d]."""
        each = [self.deltas[i][slot].lora_A for slot in run.slots for i, one in enumerate(run.form) if one]  # type: ignore[union-attr]
        whole = each[0] if len(each) == 1 else torch.cat(each)
        return whole.detach().to(dtype).view(len(run.slots), -1, whole.shape[1])

    def _outer(self, run: _Run, dtype: torch.dtype) -> Tensor:
        """B of the run's layers, each at its own ranks and outputs, 0 elsewhere: [n, R, sum of N]."""
        count, ranks = len(run.slots), [one[0] if one else 0 for one in run.form]
        out = torch.zeros(count, sum(ranks), sum(self.widths), dtype=dtype) if len(ranks) > 1 else None
        row = column = 0
        for layer, rank, width in zip(self.deltas, ranks, self.widths, strict=True):
            if rank:
                each = [layer[slot].lora_B for slot in run.slots]  # type: ignore[union-attr]
                own = (each[0] if count == 1 else torch.cat(each)).detach().view(count, width, rank).transpose(1, 2)
                if out is None:
                    return own.to(dtype)
                out[:, row : row + rank, column : column + width] = own
            row, column = row + rank, column + width
        assert out is not None
        return out

    def add(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Add the deltas of x [T, d] to the outputs y [T, sum of N]; ``s x A^T`` of each run [n, length, R]."""
        lows = []
        for run in self.runs:
            low = torch.bmm(run.of(x), self._inner(run, x.dtype).transpose(1, 2)).mul_(_scalings(run, x.dtype))
            run.of(y).baddbmm_(low, self._outer(run, x.dtype))
            lows.append(low)
        return lows

    def backward_low(self, grad: Tensor, grad_x: Tensor | None) -> list[Tensor]:
        """``s dY B`` of each run, from the outputs' ``grad`` [T, sum of N]; what the deltas give is added to ``grad_x``
        [T, d]."""
        backs = []
        for run in self.runs:
            back = torch.bmm(run.of(grad), self._outer(run, grad.dtype).transpose(1, 2))
            back.mul_(_scalings(run, grad.dtype))
            if grad_x is not None:
                run.of(grad_x).baddbmm_(back, self._inner(run, grad.dtype))
            backs.append(back)
        return backs

    def gradients(
        self, x: Tensor | None, lows: Sequence[Tensor], grad: Tensor, backs: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradients of ``parameters``, in float32."""
        found: dict[int, list[Tensor]] = {}
        for run, low, back in zip(self.runs, lows, backs, strict=True):
            assert x is not None
            down = torch.bmm(back.transpose(1, 2), run.of(x)).float()
            self._collect(run, down, torch.bmm(low.transpose(1, 2), run.of(grad)), found)
        return [part for delta in self._own() for part in found.get(id(delta)) or self._none(delta)]

    def _collect(self, run: _Run, down: Tensor, up: Tensor, found: dict[int, list[Tensor]]) -> None:
        row = column = 0
        for layer, one, width in zip(self.deltas, run.form, self.widths, strict=True):
            if one:
                rows = slice(row, row + one[0])
                b = torch.empty(len(run.slots), width, one[0])
                b.copy_(up[:, rows, column : column + width].transpose(1, 2))
                for index, slot in enumerate(run.slots):
                    pair, key = [down[index, rows], b[index]], id(layer[slot])
                    earlier = found.get(key)
                    found[key] = pair if earlier is None else [p + q for p, q in zip(earlier, pair, strict=True)]
                row += one[0]
            column += width

    @staticmethod
    def _none(delta: LoRALinear) -> list[Tensor]:
        return [torch.zeros_like(delta.lora_A), torch.zeros_like(delta.lora_B)]


def _scalings(run: _Run, dtype: torch.dtype) -> Tensor:
    return torch.tensor([one[1] for one in run.form if one for _ in range(one[0])], dtype=dtype)


# ---- products with the frozen weights --------------------------------------------------------------------------------


def _pieces(rows: int) -> list[slice]:
    """The rows of each 16-bit product."""
    return [slice(start, min(start + PIECE_ROWS, rows)) for start in range(0, rows, PIECE_ROWS)]


def _read_out(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> Tensor:
    """The layers' weights, one below another, in scratch: [sum of N, d]."""
    scratch, start = torch.empty(sum(q.shape[0] for q in weights), weights[0].shape[1], dtype=dtype), 0
    for q in weights:
        into = scratch[start : start + q.shape[0]]
        if q.scheme == "int8":
            cpu_rows.dequantize_rows_(q.codes, q.scale.view(-1), into)
        else:
            into.copy_(q.dequantize(dtype))
        start += q.shape[0]
    return scratch


def _forward(x: Tensor, quantized: tuple[Tensor, Tensor] | None, plan: _Plan) -> tuple[Tensor, list[Tensor]]:
    """The outputs side by side [T, sum of N], with biases and deltas; what ``_Plan.add`` gives."""
    weights = plan.weights
    y = torch.empty(x.shape[0], sum(plan.widths), dtype=x.dtype)
    if weights[0].compute == "16bit":
        matrix = _read_out(weights, x.dtype)
        for cut in _pieces(x.shape[0]):
            torch.mm(x[cut], matrix.t(), out=y[cut])
        del matrix
    else:
        codes = cpu.quantized(x) if quantized is None else quantized
        for q, into in zip(weights, y.split(plan.widths, 1), strict=True):
            cpu.int8_product(*codes, q.codes, q.scale, x.dtype, into)
    for bias, into in zip(plan.biases, y.split(plan.widths, 1), strict=True):
        if bias is not None:
            into.add_(bias.to(y.dtype))
    return y, plan.add(x, y)


def _backward(grad: Tensor, plan: _Plan) -> Tensor:
    """``dX`` [T, d] of the outputs' gradient [T, sum of N], but for what the deltas give."""
    weights = plan.weights
    if weights[0].compute == "16bit":
        grad_x = torch.empty(grad.shape[0], weights[0].shape[1], dtype=grad.dtype)
        matrix = _read_out(weights, grad.dtype)
        for cut in _pieces(grad.shape[0]):
            torch.mm(grad[cut], matrix, out=grad_x[cut])
        return grad_x
    found: Tensor | None = None
    for q, own in zip(weights, grad.split(plan.widths, 1), strict=True):
        found = cpu.int8_product_backward(own, q.codes, q.scale, found)
    assert found is not None
    return found


# ---- the steps of autograd's -----------------------------------------------------------------------------------------


class _Layers(torch.autograd.Function):
    """The outputs of some layers that share their input; with ``rotary`` (cos, sin, size) the first two are rotated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: tuple[Tensor, Tensor] | None, plan: _Plan,
        rotary: tuple[Tensor, Tensor, int] | None, *_: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        y, lows = _forward(x, quantized, plan)
        if rotary:
            _rotate_(y, plan, rotary)
        ctx.plan, ctx.rotary = plan, rotary
        ctx.save_for_backward(x if lows else None, *lows)
        return tuple(y.split(plan.widths, 1)) if len(plan.widths) > 1 else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *lows = ctx.saved_tensors
        grad = torch.cat(grads, 1) if len(grads) > 1 else grads[0].contiguous()
        if ctx.rotary:
            _rotate_(grad, ctx.plan, ctx.rotary, backward=True)
        grad_x = _backward(grad, ctx.plan) if ctx.needs_input_grad[0] else None
        backs = ctx.plan.backward_low(grad, grad_x)
        return (grad_x, None, None, None, *ctx.plan.gradients(x, lows, grad, backs))


def _rotate_(y: Tensor, plan: _Plan, rotary: tuple[Tensor, Tensor, int], backward: bool = False) -> None:
    cos, sin, size = rotary
    heads = (plan.widths[0] + plan.widths[1]) // size
    cpu_rows.rotate_(y.view(y.shape[0], -1, size)[:, :heads], cos, sin, backward)


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` is computed again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: tuple[Tensor, Tensor] | None, first: _Plan, last: _Plan, *_: Tensor
    ) -> Tensor:
        both, lows = _forward(x, quantized, first)
        y, last_lows = _forward(cpu_rows.swiglu(both), None, last)
        ctx.first, ctx.last, ctx.cut = first, last, len(lows)
        ctx.save_for_backward(x if lows else None, both, *lows, *last_lows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, both, *lows = ctx.saved_tensors
        first, last, grad = ctx.first, ctx.last, grad.contiguous()
        h = _backward(grad, last)
        backs = last.backward_low(grad, h)
        grad_both, h = cpu_rows.swiglu_backward_(h, both)  # h is now what went into down
        last_found = last.gradients(h, lows[ctx.cut :], grad, backs)
        del h
        grad_x = _backward(grad_both, first) if ctx.needs_input_grad[0] else None
        backs = first.backward_low(grad_both, grad_x)
        return (grad_x, None, None, None, *first.gradients(x, lows[: ctx.cut], grad_both, backs), *last_found)


def _codes(x: Tensor, weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor] | None:
    """x quantised, where it is multiplied so: before autograd's step, in which x is another object."""
    return cpu.quantized(x) if weights[0].compute == "int8" else None


def layers(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    biases: Sequence[Tensor | None],
    deltas: Deltas,
    spans: Spans,
    rotary: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, ...]:
    """``x W^T + bias`` plus each row's own delta, for every layer.

    Args:
        x: [..., d].
        weights: of one ``compute``.
        deltas: by layer, the delta of each slot.
        spans: of x's rows.
        rotary: cos and sin [T, size], and the size of a head: the first two outputs are rotated by them.

    Returns:
        [..., N] for each layer, in x's type.
    """
    flat, plan = x.reshape(-1, x.shape[-1]), _Plan(weights, biases, deltas, spans, x.dtype)
    outputs = _Layers.apply(flat, _codes(x, weights), plan, rotary, *plan.parameters())  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def swiglu(x: Tensor, weights: Sequence[QuantizedWeight], deltas: Deltas, spans: Spans) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of x [..., d], weights and deltas being those of gate, up and down."""
    flat = x.reshape(-1, x.shape[-1])
    first = _Plan(weights[:2], [None, None], deltas[:2], spans, x.dtype)
    last = _Plan(weights[2:], [None], deltas[2:], spans, x.dtype)
    parameters = (*first.parameters(), *last.parameters())
    out: Tensor = _SwiGLU.apply(flat, _codes(x, weights), first, last, *parameters)  # type: ignore[no-untyped-call]
    return out.view(x.shape)
