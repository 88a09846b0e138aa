"""``nn.joint`` on the CPU: layers that share their input, with the deltas of many adapters, as one step of autograd's.

The outputs of the layers stand side by side, and so do A and B of their deltas, so that there is one product for all of
them in each direction; neighbours that have as many rows and deltas of one form are one batched product, added to their
rows by the very product that makes it. Deltas cost no pass over Y or dX, no copy and no concatenation.

With ``compute="int8"`` X is quantised once for all of the layers, and sums are exact integers; an adapter's products
have the shapes that they have alone: its results are the same bits. With ``"16bit"`` the codes are read out into
scratch, one direction of one group of layers at a time; of other numbers of rows a BLAS may sum in another order, so
that company changes the last bits.

Kept for the backward pass: x, where there are deltas, and ``s x A^T`` of each adapter; of a SwiGLU also gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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

Found = dict[int, list[Tensor]]
"""By delta, the gradients of A and B."""

CUT_ROWS = 1024  # of a piece; of fewer, the products with the deltas are too many
# of one product with a weight in 16 bits, of more inputs or of more outputs: oneDNN takes longer a row for others
PIECE_ROWS, WIDE_ROWS = 512, 1024


def takes(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether these layers are computed here: nothing trained but the deltas; int8 products in float32 or bfloat16,
    others in bfloat16. (In float32 they have the order of summation, and of scaling, that PEFT has.)"""
    dtypes = (torch.float32, torch.bfloat16) if all(q.compute == "int8" for q in weights) else (torch.bfloat16,)
    return (
        x.device.type == "cpu"
        and x.dtype in dtypes
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
        start: the first row, counted within its piece.
        length: rows of each.
        slots: whose they are, in turn.
        form: by layer, (rank, scaling) of the delta, or None.
    """

    start: int
    length: int
    slots: list[int]
    form: tuple[tuple[int, float] | None, ...]

    def of(self, piece: Tensor) -> Tensor:
        """Their rows of a piece's matrix [rows, N]: [n, length, N]."""
        count = len(self.slots)
        return piece[self.start : self.start + count * self.length].view(count, self.length, piece.shape[1])


@dataclass
class _Piece:
    """Rows for which all is done before the next are begun, so that what lies between the products of one step is small
    and its memory used again."""

    rows: slice
    runs: list[_Run]


class _Plan:
    """The layers' weights, and the low-rank side of one forward and one backward pass.

    Args:
        rows: T.
        weights: of the layers.
        biases: of each, or None.
        deltas: by layer, that of each slot.
        spans: of the rows.
        dtype: of the activations. In float32 each has its own product: the BLAS sums a batch of them in another order.
    """

    def __init__(
        self, rows: int, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], deltas: Deltas,
        spans: Spans, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.weights, self.biases, self.deltas = weights, biases, deltas
        self.widths = [q.shape[0] for q in weights]
        cuts = _cut(rows, spans, weights[0].compute)
        self.pieces = [_Piece(cut, self._runs(cut, own, dtype)) for cut, own in cuts]
        self._stacked: dict[int, tuple[Tensor, Tensor]] = {}

    def _runs(self, rows: slice, spans: Spans, dtype: torch.dtype) -> list[_Run]:
        runs: list[_Run] = []
        for start, stop, slot in spans:
            form = tuple(None if own[slot] is None else (own[slot].rank, own[slot].scaling) for own in self.deltas)  # type: ignore[union-attr]
            last, start, length = runs[-1] if runs else None, start - rows.start, stop - start
            if not length or not any(form):
                continue
            alike = last is not None and dtype != torch.float32 and (last.length, last.form) == (length, form)
            if last is not None and alike and last.start + length * len(last.slots) == start:
                last.slots.append(slot)
            else:
                runs.append(_Run(start, length, [slot], form))
        return runs

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
        """B of the run's layers, each at its own outputs and ranks, 0 elsewhere: [n, sum of N, R]."""
        count, ranks = len(run.slots), [one[0] if one else 0 for one in run.form]
        out = torch.zeros(count, sum(self.widths), sum(ranks), dtype=dtype) if len(ranks) > 1 else None
        row = column = 0
        for layer, rank, width in zip(self.deltas, ranks, self.widths, strict=True):
            if rank:
                each = [layer[slot].lora_B for slot in run.slots]  # type: ignore[union-attr]
                own = (each[0] if count == 1 else torch.cat(each)).detach().view(count, width, rank)
                if out is None:
                    return own.to(dtype)
                out[:, column : column + width, row : row + rank] = own
            row, column = row + rank, column + width
        assert out is not None
        return out

    def _matrices(self, run: _Run, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B; those of the forward pass are kept until the backward pass, when gradients take their place."""
        found = self._stacked.pop(id(run), None)
        return found or (self._inner(run, dtype), self._outer(run, dtype))

    def add(self, piece: _Piece, x: Tensor, y: Tensor) -> list[Tensor]:
        """Add the deltas of the piece's x [rows, d] to its outputs y [rows, sum of N]; of each run ``s x A^T``
        [n, length, R]."""
        lows = []
        for run in piece.runs:
            inner, outer = self._matrices(run, x.dtype)
            low = torch.bmm(run.of(x), inner.transpose(1, 2)).mul_(_scalings(run.form, x.dtype))
            run.of(y).baddbmm_(low, outer.transpose(1, 2))
            lows.append(low)
            self._stacked[id(run)] = inner, outer
        return lows

    def backward_low(self, piece: _Piece, grad: Tensor, grad_x: Tensor | None) -> list[Tensor]:
        """Of each run ``s dY B``, from the gradient of the piece's outputs [rows, sum of N]; what the deltas give is
        added to ``grad_x`` [rows, d]."""
        backs = []
        for run in piece.runs:
            inner, outer = self._matrices(run, grad.dtype)
            back = torch.bmm(run.of(grad), outer).mul_(_scalings(run.form, grad.dtype))
            if grad_x is not None:
                run.of(grad_x).baddbmm_(back, inner)
            backs.append(back)
        return backs

    def collect(
        self, piece: _Piece, x: Tensor, lows: Sequence[Tensor], grad: Tensor, backs: Sequence[Tensor], found: Found
    ) -> None:
        """Add the piece's gradients of A and B to ``found``."""
        for run, low, back in zip(piece.runs, lows, backs, strict=True):
            down = torch.bmm(back.transpose(1, 2), run.of(x)).float()
            self._collect(run, down, torch.bmm(run.of(grad).transpose(1, 2), low), found)

    def gradients(self, found: Found) -> list[Tensor]:
        """Those of ``parameters``, in float32."""
        return [part for delta in self._own() for part in found.get(id(delta)) or self._none(delta)]

    def _collect(self, run: _Run, down: Tensor, up: Tensor, found: Found) -> None:
        row = column = 0
        for layer, one, width in zip(self.deltas, run.form, self.widths, strict=True):
            if one:
                rows = slice(row, row + one[0])
                b = torch.empty(len(run.slots), width, one[0])
                b.copy_(up[:, column : column + width, rows])
                for index, slot in enumerate(run.slots):
                    pair, key = [down[index, rows], b[index]], id(layer[slot])
                    earlier = found.get(key)
                    found[key] = pair if earlier is None else [p + q for p, q in zip(earlier, pair, strict=True)]
                row += one[0]
            column += width

    @staticmethod
    def _none(delta: LoRALinear) -> list[Tensor]:
        return [torch.zeros_like(delta.lora_A), torch.zeros_like(delta.lora_B)]


@lru_cache(maxsize=256)
def _scalings(form: tuple[tuple[int, float] | None, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor([one[1] for one in form if one for _ in range(one[0])], dtype=dtype)


def _cut(rows: int, spans: Spans, compute: str) -> list[tuple[slice, Spans]]:
    """Pieces of about ``CUT_ROWS`` rows, of whole spans, with their spans. Of int8 products all rows are one: the
    pieces of theirs are cut in ``ops.cpu``."""
    found: list[tuple[slice, Spans]] = []
    first, own, stop = 0, list[tuple[int, int, int]](), 0
    for span in spans:
        if span[0] != stop:
            return [(slice(0, rows), spans)]
        stop = span[1]
        own.append(span)
        if compute != "int8" and stop - first >= CUT_ROWS:
            found.append((slice(first, stop), own))
            first, own = stop, []
    return [*found, (slice(first, rows), own)] if first < rows else found


# ---- products with the frozen weights --------------------------------------------------------------------------------


def _read_out(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> Tensor:
    """The layers' weights, one below another, in scratch: [sum of N, d]."""
    scratch, start = torch.empty(sum(q.shape[0] for q in weights), weights[0].shape[1], dtype=dtype), 0
    for q in weights:
        q.dequantize(out=scratch[start : start + q.shape[0]])
        start += q.shape[0]
    return scratch


class _Product:
    """``x W^T + bias`` of the layers of a plan, and its gradient, piece by piece."""

    def __init__(self, plan: _Plan, dtype: torch.dtype) -> None:
        self.plan, self.int8 = plan, plan.weights[0].compute == "int8"
        self._matrix = None if self.int8 else _read_out(plan.weights, dtype)

    def forward(self, x: Tensor, y: Tensor, quantized: tuple[Tensor, Tensor] | None) -> None:
        """Fill the outputs y [rows, sum of N] for x [rows, d]."""
        plan = self.plan
        if self._matrix is not None:
            _multiply(x, self._matrix.t(), y)
        else:
            codes = cpu.quantized(x) if quantized is None else quantized
            for q, into in zip(plan.weights, y.split(plan.widths, 1), strict=True):
                cpu.int8_product(*codes, q.codes, q.scale, x.dtype, into)
        for bias, into in zip(plan.biases, y.split(plan.widths, 1), strict=True):
            if bias is not None:
                into.add_(bias.to(y.dtype))

    def backward(self, grad: Tensor, grad_x: Tensor) -> None:
        """Fill ``grad_x`` [rows, d] for the outputs' gradient [rows, sum of N]."""
        if self._matrix is not None:
            _multiply(grad, self._matrix, grad_x)
            return
        found: Tensor | None = None
        for q, own in zip(self.plan.weights, grad.split(self.plan.widths, 1), strict=True):
            found = cpu.int8_product_backward(own, q.codes, q.scale, found)
        assert found is not None
        grad_x.copy_(found)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Fill ``out`` with ``left right``, by pieces: ``left`` may be one long span."""
    step = WIDE_ROWS if right.shape[0] < right.shape[1] else PIECE_ROWS
    for rows, into in zip(left.split(step), out.split(step), strict=True):
        torch.mm(rows, right, out=into)


# ---- the steps of autograd's -----------------------------------------------------------------------------------------


class _Layers(torch.autograd.Function):
    """The outputs of some layers that share their input; with ``rotary`` (cos, sin, size) the first two are rotated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: tuple[Tensor, Tensor] | None, plan: _Plan,
        rotary: tuple[Tensor, Tensor, int] | None, *_: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        y, product, lows = torch.empty(x.shape[0], sum(plan.widths), dtype=x.dtype), _Product(plan, x.dtype), []
        for piece in plan.pieces:
            own = y[piece.rows]
            product.forward(x[piece.rows], own, quantized)
            lows += plan.add(piece, x[piece.rows], own)
            if rotary:
                _rotate_(own, piece, plan, rotary)
        ctx.plan, ctx.rotary = plan, rotary
        ctx.save_for_backward(x if lows else None, *lows)
        return tuple(y.split(plan.widths, 1)) if len(plan.widths) > 1 else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *lows = ctx.saved_tensors
        plan, found, like, low = ctx.plan, Found(), grads[0], iter(lows)
        wanted = ctx.needs_input_grad[0]
        grad_x = torch.empty(like.shape[0], plan.weights[0].shape[1], dtype=like.dtype) if wanted else None
        product = _Product(plan, like.dtype) if wanted else None
        for piece in plan.pieces:
            parts = [grad[piece.rows] for grad in grads]
            grad = torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()
            if ctx.rotary:
                _rotate_(grad, piece, plan, ctx.rotary, backward=True)
            own = None if grad_x is None else grad_x[piece.rows]
            if product is not None and own is not None:
                product.backward(grad, own)
            backs = plan.backward_low(piece, grad, own)
            if piece.runs:
                plan.collect(piece, x[piece.rows], [next(low) for _ in piece.runs], grad, backs, found)
        return (grad_x, None, None, None, *plan.gradients(found))


def _rotate_(y: Tensor, piece: _Piece, plan: _Plan, rotary: tuple[Tensor, Tensor, int], backward: bool = False) -> None:
    cos, sin, size = rotary
    heads = (plan.widths[0] + plan.widths[1]) // size
    cpu_rows.rotate_(y.view(y.shape[0], -1, size)[:, :heads], cos[piece.rows], sin[piece.rows], backward)


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` is computed again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: tuple[Tensor, Tensor] | None, first: _Plan, last: _Plan, *_: Tensor
    ) -> Tensor:
        both, lows = torch.empty(x.shape[0], sum(first.widths), dtype=x.dtype), []
        y, products = torch.empty_like(x), [_Product(plan, x.dtype) for plan in (first, last)]
        for piece, second in zip(first.pieces, last.pieces, strict=True):
            rows, own = piece.rows, both[piece.rows]
            products[0].forward(x[rows], own, quantized)
            lows += first.add(piece, x[rows], own)
            h = cpu_rows.swiglu(own)
            products[1].forward(h, y[rows], None)
            lows += last.add(second, h, y[rows])
        ctx.first, ctx.last = first, last
        ctx.save_for_backward(x if lows else None, both, *lows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, both, *lows = ctx.saved_tensors
        first, last, found, low, grad = ctx.first, ctx.last, Found(), iter(lows), grad.contiguous()
        grad_x = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        products = [_Product(plan, grad.dtype) for plan in (first, last)]
        for piece, second in zip(first.pieces, last.pieces, strict=True):
            rows, own = piece.rows, grad[piece.rows]
            own_lows = [[next(low) for _ in runs] for runs in (piece.runs, second.runs)]
            h = torch.empty(own.shape[0], last.weights[0].shape[1], dtype=grad.dtype)
            products[1].backward(own, h)
            backs = last.backward_low(second, own, h)
            grad_both, h = cpu_rows.swiglu_backward_(h, both[rows])  # h is now what went into down
            last.collect(second, h, own_lows[1], own, backs, found)
            if grad_x is not None:
                products[0].backward(grad_both, grad_x[rows])
            backs = first.backward_low(piece, grad_both, None if grad_x is None else grad_x[rows])
            if piece.runs:
                first.collect(piece, x[rows], own_lows[0], grad_both, backs, found)
        return (grad_x, None, None, None, *first.gradients(found), *last.gradients(found))


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
    flat = x.reshape(-1, x.shape[-1])
    plan = _Plan(flat.shape[0], weights, biases, deltas, spans, x.dtype)
    outputs = _Layers.apply(flat, _codes(x, weights), plan, rotary, *plan.parameters())  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def swiglu(x: Tensor, weights: Sequence[QuantizedWeight], deltas: Deltas, spans: Spans) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of x [..., d], weights and deltas being those of gate, up and down."""
    flat = x.reshape(-1, x.shape[-1])
    first = _Plan(flat.shape[0], weights[:2], [None, None], deltas[:2], spans, x.dtype)
    last = _Plan(flat.shape[0], weights[2:], [None], deltas[2:], spans, x.dtype)
    parameters = (*first.parameters(), *last.parameters())
    out: Tensor = _SwiGLU.apply(flat, _codes(x, weights), first, last, *parameters)  # type: ignore[no-untyped-call]
    return out.view(x.shape)
