"""Frozen 8-bit layers with the deltas of many adapters, as few products as there can be: one product a weight in each
direction, however many adapters there are, their deltas added while it is written.

``Y = X W^T + low B^T`` with ``low = s X A^T``; backwards ``dlow = s dY B``, ``dX = dY W + dlow A``, ``dA = dlow^T X``,
``dB = dY^T low``: each row by its own adapter's A and B (arXiv 2106.09685). W stays in its 8 bits; with
``compute="int8"`` X and dY are quantised per row, W's row scales folded into dY, so that the one stored copy serves
both directions; with ``"16bit"`` they are so in two int8 slices, 16 bits in all, where W may be ``sliced`` (not the
output head's) and there is a kernel for that (see ``hopper.py``; of bfloat16 and int8 storage), and elsewhere W is read
out into scratch for each product. A, B and their gradients are in float32, their products in the activations' type.
What a row gets does not depend on any other adapter's rows, to the bit.

Three forms: one layer; q, k and v with the rotary embedding; and a whole SwiGLU. The latter two can begin with their
RMSNorm, whose output is then never written but as the codes that the products read, and each can end with the addition
of the residual stream. What they keep for the backward pass is said at each.

Shapes: T rows of the batch, d features, N outputs, f intermediate features; n adapters, R their padded rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetuna_lightning.nn import joint_cpu
from finetuna_lightning.nn.gradients import Gradients
from finetuna_lightning.nn.lora import LoRALinear
from finetuna_lightning.nn.quantized import QuantizedWeight
from finetuna_lightning.ops import cpu_rows
from finetuna_lightning.ops.library import has_joint_kernels
from finetuna_lightning.ops.tiling import Tiling

Deltas = Sequence[Sequence[LoRALinear | None]]
"""By layer, the delta of each slot of the tiling."""


class Kept(list[Any]):
    """Deltas whose parameters are known to stay where they are, and what was ``made`` of them here. ``gradients``:
    where those of this pass go past autograd (see ``Route``)."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__(items)
        self.gradients: Gradients | None = None
        self.made: dict[int, _Lasting] = {}


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
    return delta.lora_bias is None and a.dtype == b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous()


# ---- where the adapters' matrices stand ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """The deltas of L layers that share their input, and where they stand in what is gathered.

    Args:
        ranks [L, n], scales [n, C], rank: R.
        width: d; outputs: N of each layer, which stand side by side where they are one matrix.
        at: where A [n, C, d] starts; up: where B does, [n, C, sum of N], a layer's own in its R rows and N columns,
            zeros elsewhere.
        blocks: see ``lowrank.blocks``.
        live: by layer, whether it has any delta; even: whether every adapter has one of rank R on each.
    """

    ranks: Tensor
    scales: Tensor
    rank: int
    width: int
    outputs: tuple[int, ...]
    at: int
    up: int
    blocks: tuple[Tensor, Tensor]
    live: tuple[bool, ...]
    even: bool

    def places(self, deltas: Deltas) -> Iterator[tuple[LoRALinear, int, int, int]]:
        """Each delta, its layer's outputs, and where the gradients of its A and B start in what ``outer`` writes."""
        layers, total, before = len(self.outputs), sum(self.outputs), 0
        for index, side in enumerate(self.outputs):
            for slot, delta in enumerate(deltas[index]):
                if delta is not None:
                    down, up = (slot * layers + index) * self.width * self.rank, (slot * total + before) * self.rank
                    yield delta, side, down, up
            before += side

    def views(self, deltas: Deltas, down: Tensor, up: Tensor) -> list[Tensor]:
        """The gradients of each delta's A and B, within the tensors that ``outer`` wrote."""
        found: list[Tensor] = []
        if not self.even:
            for delta, side, at, above in self.places(deltas):
                found.append(down.as_strided((delta.rank, self.width), (self.width, 1), at))
                found.append(up.as_strided((side, delta.rank), (delta.rank, 1), above))
            return found
        slots, layers, before = self.scales.shape[0], len(self.outputs), 0  # by the hundred at a time
        downs = down.view(slots * layers, self.rank, self.width).unbind()
        for index, side in enumerate(self.outputs):
            part = up.view(slots, -1).narrow(1, before * self.rank, side * self.rank)
            ups = part.unflatten(1, (side, self.rank)).unbind()
            found += chain.from_iterable(zip(downs[index::layers], ups, strict=True))
            before += side
        return found


@dataclass(frozen=True)
class _Table:
    """What to gather (see ``lowrank.jobs``), and where each group finds its own there."""

    jobs: Tensor
    size: int
    widest: int
    groups: tuple[_Group, ...]


Entry = tuple[int, int, int, float]
"""Of one delta: the addresses of A and B, its rank and its scaling."""

_TABLES: WeakKeyDictionary[LoRALinear, dict[Any, _Table]] = WeakKeyDictionary()
"""By the first delta of each: a table leaves the device with it."""
_KEPT = 32  # tables of one delta, which has one for each company that it trains in
_NONE: Entry = (0, 0, 0, 0.0)


def _table(groups: Sequence[Deltas], sides: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> _Table | None:
    """The table of some groups, made once for parameters that stay where they are; ``sides``: by group, the features
    and each layer's outputs. None where there is no delta at all."""
    entries = tuple(
        tuple(
            tuple(_NONE if d is None else (d.lora_A.data_ptr(), d.lora_B.data_ptr(), d.rank, d.scaling) for d in layer)
            for layer in group
        )
        for group in groups
    )
    first = next((d for group in groups for layer in group for d in layer if d is not None), None)
    if first is None:
        return None
    tables, key = _TABLES.setdefault(first, {}), (device, entries)
    if key not in tables:
        if len(tables) >= _KEPT:
            tables.clear()
        tables[key] = _make_table(entries, sides, device)
    return tables[key]


def _make_table(
    groups: Sequence[Sequence[Sequence[Entry]]], sides: Sequence[tuple[int, Sequence[int]]], device: torch.device
) -> _Table:
    from finetuna_lightning.ops.kernels import lowrank

    pieces: list[lowrank.Piece] = []
    made: list[_Group] = []
    size = 0
    for group, (width, outputs) in zip(groups, sides, strict=True):
        slots, total = len(group[0]), sum(outputs)
        rank = lowrank.padded_rank(max(entry[2] for layer in group for entry in layer))
        columns = lowrank.columns_of(len(group), rank)
        spare = columns - len(group) * rank
        start, up = size, size + slots * columns * width
        size = up + slots * columns * total
        scales = torch.zeros(slots, columns, dtype=torch.float32)
        for slot in range(slots):
            at, above = start + slot * columns * width, up + slot * columns * total
            for index, layer in enumerate(group):
                a, b, own, scaling = layer[slot]
                scales[slot, index * rank : (index + 1) * rank] = scaling
                pieces.append((a, own, width, True, at, width, rank))
                at += rank * width
                first = above + index * rank * total
                for other, side in enumerate(outputs):
                    pieces.append((b if other == index else 0, own, side, False, first, total, rank))
                    first += side
            if spare:
                pieces.append((0, 0, width, True, at, width, spare))
                pieces.append((0, 0, total, True, above + len(group) * rank * total, total, spare))
        blocks, counts = lowrank.blocks(outputs)
        ranks = torch.tensor([[entry[2] for entry in layer] for layer in group], dtype=torch.int32)
        made.append(_Group(
            ranks.to(device), scales.to(device), rank, width, tuple(outputs), start, up,
            (blocks.to(device), counts.to(device)), tuple(any(entry[2] for entry in layer) for layer in group),
            all(entry[2] == rank for layer in group for entry in layer),
        ))  # fmt: skip
    return _Table(lowrank.jobs(pieces).to(device), size, max(piece[2] for piece in pieces), tuple(made))


def _parameters(groups: Sequence[Deltas]) -> list[Tensor]:
    return [
        p for group in groups for layer in group for delta in layer if delta is not None
        for p in (delta.lora_A, delta.lora_B)
    ]  # fmt: skip


# ---- products --------------------------------------------------------------------------------------------------------


@dataclass
class _Operand:
    """Rows as the products take them: codes, or two slices, with a scale a row; or, ``scale`` being None, 16-bit
    values."""

    values: Tensor
    scale: Tensor | None = None


def _slices(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> int:
    """Of activations in ``dtype``, in int8, for the products with weights that share their input, of one compute; 0: as
    they are."""
    from finetuna_lightning.ops.kernels import hopper

    if weights[0].compute == "int8":
        return 1
    longest = max(weights[0].shape[1], sum(q.shape[0] for q in weights))  # summed over, forwards and backwards
    if dtype != torch.bfloat16 or longest > hopper.LONGEST_SLICED:
        return 0
    if not all(q.sliced and q.scheme == "int8" for q in weights):
        return 0
    return 2 if hopper.takes_slices(weights[0].codes.device, dtype) else 0


def _swiglu_slices(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> int:
    """The same of gate and up, and down."""
    return min(_slices(weights[:2], dtype), _slices(weights[2:], dtype))


def _operand(x: Tensor, slices: int, column_scale: Tensor | None = None) -> _Operand:
    from finetuna_lightning.ops.kernels import rows

    return _Operand(*rows.quantize(x, column_scale, slices)) if slices else _Operand(x)


def _fitted(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As the kernels take it: in ``dtype``, contiguous features, each row from a multiple of 16 bytes on."""
    t = t.to(dtype or t.dtype)
    apart = t.dim() < 2 or (t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) >= t.shape[1])  # not expanded
    fits = t.stride(-1) == 1 and apart and t.data_ptr() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _forward(
    x: _Operand, q: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, tiles: Tensor,
    delta: tuple[Tensor | None, Tensor | None], residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from finetuna_lightning.ops.kernels.gemm import gemm

    outputs = q.shape[0]
    if x.values.dim() == 3:  # Triton's kernel would take anything
        bias, residual = (t if t is None else _fitted(t, dtype) for t in (bias, residual))
    out = torch.empty(x.values.shape[-2], outputs, dtype=dtype, device=x.values.device)
    if x.scale is not None:
        weight, column_scale = _fitted(q.codes), _fitted(q.scale, torch.float32)
    else:
        weight, column_scale = q.dequantize(dtype), None
    return gemm(
        x.values, weight, out, tiles, row_scale=x.scale, column_scale=column_scale, bias=bias, residual=residual,
        low=delta[0], matrices=delta[1],
    )  # fmt: skip


def _backward(
    grad: _Operand, weights: Sequence[QuantizedWeight], dtype: torch.dtype, tiles: Tensor,
    delta: tuple[Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """The gradient of the layers' common input: [T, d] from theirs side by side [T, sum of N]. An int8 ``grad`` has
    the weights' row scales within, in one slice or two."""
    from finetuna_lightning.ops.kernels import rows
    from finetuna_lightning.ops.kernels.gemm import gemm

    inputs, outputs = weights[0].shape[1], sum(q.shape[0] for q in weights)
    device = grad.values.device
    out = torch.empty(grad.values.shape[-2], inputs, dtype=dtype, device=device)
    low, matrices = delta
    start = 0
    if grad.scale is None:
        scratch = torch.empty(outputs, inputs, dtype=dtype, device=device)
        for q in weights:
            q.dequantize(out=scratch[start : start + q.shape[0]])
            start += q.shape[0]
        return gemm(grad.values, scratch, out, tiles, low=low, matrices=matrices, b_is_kn=True)
    turned = rows.transpose([q.codes for q in weights])
    return gemm(grad.values, turned, out, tiles, row_scale=grad.scale, low=low, matrices=matrices)


def _scales(weights: Sequence[QuantizedWeight]) -> Tensor:
    """The row scales of all weights, put together once and kept with the first."""
    if len(weights) == 1:
        return weights[0].scale
    own = [q.scale for q in weights]
    state = [(id(scale), scale._version) for scale in own]
    kept = weights[0].joined_scales
    if kept is None or kept[0] != state:
        kept = weights[0].joined_scales = (state, own, torch.cat(own))
    found: Tensor = kept[2]
    return found


class _Lasting:
    """What does not depend on the rows: the deltas of the layers of one autograd function, by groups that share an
    input, where their matrices stand, and their parameters in the order of the gradients."""

    def __init__(
        self, groups: Sequence[Deltas], weights: Sequence[Sequence[QuantizedWeight]], device: torch.device
    ) -> None:
        sides = [(own[0].shape[1], [q.shape[0] for q in own]) for own in weights]
        self.groups, self.table, self.parameters = groups, _table(groups, sides, device), _parameters(groups)

    def _groups(self) -> Iterator[tuple[Deltas, _Group]]:
        return zip(self.groups, () if self.table is None else self.table.groups, strict=False)

    # ---- a source of gradients (see nn.gradients): two tensors a group are written ----

    def views(self, written: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of ``parameters``, within those tensors."""
        left = iter(written)
        return [*chain.from_iterable(group.views(own, next(left), next(left)) for own, group in self._groups())]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """In which of them each stands, and from which byte on."""
        found = []
        for number, (own, group) in enumerate(self._groups()):
            for _, _, down, up in group.places(own):
                found += [(2 * number, 4 * down), (2 * number + 1, 4 * up)]
        which, at = torch.tensor(found, dtype=torch.int64).view(-1, 2).unbind(1)
        return which, at


class _Plan:
    """The same for the rows of one batch."""

    def __init__(self, lasting: _Lasting, tiling: Tiling, gradients: Gradients | None) -> None:
        self.lasting, self.tiling = lasting, tiling
        self.gradients = gradients if lasting.parameters else None

    @property
    def any(self) -> bool:
        """Whether there is a delta at all."""
        return self.lasting.table is not None

    def trained(self, device: torch.device) -> list[Tensor]:
        """What autograd is to see as trained: the deltas' parameters, or one tensor in their place."""
        if self.gradients is None:
            return self.lasting.parameters
        return [torch.empty((), device=device, requires_grad=True)]

    def given(self, written: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """What autograd is to get for ``trained``, of the tensors that ``_Deltas.gradients`` wrote for each group."""
        if self.gradients is None:
            return self.lasting.views(written)
        self.gradients.put(self.lasting, written)
        return [None]

    def gathered(self, dtype: torch.dtype) -> list[_Deltas]:
        """The groups, with their matrices in ``dtype``."""
        from finetuna_lightning.ops.kernels import lowrank

        table, groups = self.lasting.table, self.lasting.groups
        if table is None:
            return [_Deltas(None, group, self.tiling, None) for group in groups]
        flat = lowrank.gather(table.jobs, table.size, table.widest, dtype)
        return [_Deltas(own, group, self.tiling, flat) for own, group in zip(table.groups, groups, strict=True)]


def _plan(
    deltas: Sequence[Any],
    groups: Sequence[Deltas],
    weights: Sequence[Sequence[QuantizedWeight]],
    tiling: Tiling,
    device: torch.device,
) -> _Plan:
    kept = deltas.made if isinstance(deltas, Kept) else {}
    if len(groups) not in kept:
        kept[len(groups)] = _Lasting(groups, weights, device)
    return _Plan(kept[len(groups)], tiling, deltas.gradients if isinstance(deltas, Kept) else None)


_NOTHING: tuple[Tensor | None, Tensor | None] = (None, None)


class _Deltas:
    """The low-rank side of some layers that share their input, in one pass."""

    def __init__(self, group: _Group | None, deltas: Deltas, tiling: Tiling, flat: Tensor | None) -> None:
        self.group, self.deltas, self.tiling, self.flat = group, deltas, tiling, flat

    def _inner(self) -> Tensor:
        """The layers' A [n, C, d]."""
        assert self.group is not None and self.flat is not None
        shape = (*self.group.scales.shape, self.group.width)
        return self.flat.as_strided(shape, (shape[1] * shape[2], shape[2], 1), self.group.at)

    def _up(self, index: int | None = None) -> Tensor:
        """The layers' B [n, C, sum of N], or one's [n, R, N]."""
        group = self.group
        assert group is not None and self.flat is not None
        (slots, columns), total = group.scales.shape, sum(group.outputs)
        strides = (columns * total, total, 1)
        if index is None:
            return self.flat.as_strided((slots, columns, total), strides, group.up)
        at = group.up + index * group.rank * total + sum(group.outputs[:index])
        return self.flat.as_strided((slots, group.rank, group.outputs[index]), strides, at)

    def low(self, x: _Operand) -> Tensor | None:
        """``s X A^T`` of all layers side by side [T, C]."""
        from finetuna_lightning.ops.kernels import lowrank

        if self.group is None:
            return None
        return lowrank.down(x.values, self._inner(), self.group.scales, self.tiling.tiles, row_scale=x.scale)

    def outputs(self, index: int, low: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the product of layer ``index`` adds: its part of ``low`` [T, R], and its B [n, R, N]."""
        if low is None or self.group is None or not self.group.live[index]:
            return _NOTHING
        return low.narrow(1, index * self.group.rank, self.group.rank), self._up(index)

    def backward(self, grad: Tensor, low: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """From the gradients of the layers' outputs side by side: ``s dY B`` of all layers side by side [T, C], and the
        gradients of all B (see ``lowrank.up_backward``)."""
        from finetuna_lightning.ops.kernels import lowrank

        group, cut = self.group, self.tiling
        if group is None or low is None:
            return _NOTHING
        return lowrank.up_backward(
            grad, low, self._up(), group.scales, cut.tiles, cut.chunks, cut.first, group.ranks, group.rank, group.blocks
        )

    def inputs(self, back: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the product for the input's gradient adds: ``back`` [T, C] and A [n, C, d]."""
        return _NOTHING if back is None else (back, self._inner())

    def gradients(self, x: _Operand, back: Tensor | None, up: Tensor | None) -> list[Tensor]:
        """Those of the deltas' parameters: of all A (see ``lowrank.outer``), and ``up``, of all B."""
        from finetuna_lightning.ops.kernels import lowrank

        group, cut, self.flat = (
            self.group,
            self.tiling,
            None,
        )  # what was gathered has been used: its memory is for these
        if group is None or back is None or up is None:
            return []
        return [
            lowrank.outer(x.values, back, cut.chunks, cut.first, group.ranks, group.rank, row_scale=x.scale), up
        ]  # fmt: skip


# ---- the three forms -------------------------------------------------------------------------------------------------

Norm = tuple[Tensor, float]
"""Weight [d] and epsilon of the RMSNorm before some layers."""


def _normed(x: Tensor, norm: Norm | None, slices: int) -> tuple[_Operand, _Operand, Tensor | None]:
    """What the products take, what is kept of it for the backward pass, and 1 / rms [T] where there is a norm."""
    from finetuna_lightning.ops.kernels import rows

    if norm is None:
        return _operand(x, slices), _Operand(x), None
    values, scale, rstd = rows.norm(x, *norm, slices)
    operand = _Operand(values, scale)
    return operand, operand, rstd


class _Linear(torch.autograd.Function):
    """One layer, plus ``residual`` where given. Keeps x, and ``low``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, q: QuantizedWeight, bias: Tensor | None, plan: _Plan, *_: Tensor
    ) -> Tensor:
        (side,) = plan.gathered(x.dtype)
        low = side.low(_Operand(x))
        ctx.q, ctx.plan, ctx.dtype = q, plan, x.dtype
        ctx.save_for_backward(x if plan.any else None, low)
        operand = _operand(x, _slices([q], x.dtype))
        return _forward(operand, q, bias, x.dtype, plan.tiling.tiles, side.outputs(0, low), residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, plan = ctx.q, ctx.plan
        x, low = ctx.saved_tensors
        given, grad = grad, _fitted(grad)
        (side,) = plan.gathered(ctx.dtype)
        back, up = side.backward(grad, low)
        grad_x = None
        if ctx.needs_input_grad[0]:
            operand = _operand(grad, _slices([q], ctx.dtype), q.scale)
            grad_x = _backward(operand, [q], ctx.dtype, plan.tiling.tiles, side.inputs(back))
        grad_residual = given if ctx.needs_input_grad[1] else None
        return (grad_x, grad_residual, None, None, None, *plan.given(side.gradients(_Operand(x), back, up)))


class _Attention(torch.autograd.Function):
    """q, k, v with the rotary embedding on q and k, of x or of its RMSNorm; x itself comes back as the fourth, so that
    the residual stream's gradient meets the norm's in one pass. Keeps x, the norm's output as the products read it, and
    ``low``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm | None, cos: Tensor, sin: Tensor, shape: tuple[int, int, int],
        weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], plan: _Plan, *_: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        from finetuna_lightning.ops.kernels import rows

        batch, tokens, size = shape
        (side,) = plan.gathered(x.dtype)
        operand, kept, rstd = _normed(x, norm, _slices(weights, x.dtype))
        low = side.low(kept)
        tiles, flat = plan.tiling.tiles, []
        for index, (q, bias) in enumerate(zip(weights, biases, strict=True)):
            flat.append(_forward(operand, q, bias, x.dtype, tiles, side.outputs(index, low)))
        heads = [y.view(batch, tokens, -1, size) for y in flat]
        rows.rotate(heads[:2], flat[:2], cos, sin)
        ctx.weights, ctx.plan, ctx.norm = weights, plan, norm
        ctx.save_for_backward(x, *(() if rstd is None else (rstd, kept.values, kept.scale)), low, cos, sin)
        turned = [y.transpose(1, 2) for y in heads]
        return turned[0], turned[1], turned[2], x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        from finetuna_lightning.ops.kernels import rows

        x, *saved, low, cos, sin = ctx.saved_tensors
        weights, plan = ctx.weights, ctx.plan
        slices = _slices(weights, x.dtype) if ctx.needs_input_grad[0] else 0
        heads = [grad.transpose(1, 2) for grad in grads[:3]]
        heads = [h if h.stride(-1) == 1 else h.contiguous() for h in heads]
        whole, codes, scale = rows.rotate_back(heads, cos, sin, _scales(weights) if slices else None, slices)
        (side,) = plan.gathered(x.dtype)
        back, up = side.backward(whole, low)
        grad_x = grads[3]
        if ctx.needs_input_grad[0]:
            operand = _Operand(whole) if codes is None else _Operand(codes, scale)
            del codes, scale
            inner = _backward(operand, weights, x.dtype, plan.tiling.tiles, side.inputs(back))
            del operand
            if ctx.norm is None:
                grad_x = grad_x + inner
            else:
                grad_x = rows.norm_backward(inner, x, ctx.norm[0], saved[0], _fitted(grad_x))
        kept = _Operand(x) if ctx.norm is None else _Operand(*saved[1:])
        return (grad_x, *[None] * 7, *plan.given(side.gradients(kept, back, up)))


class _SwiGLU(torch.autograd.Function):
    """``down(silu(gate) * up)`` of x; or of its RMSNorm, and x itself is added then. Keeps x, the norm's output as the
    products read it, the gate's and up's outputs, and both ``low``; ``silu(gate) * up`` is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm | None, weights: Sequence[QuantizedWeight], plan: _Plan, *_: Tensor
    ) -> Tensor:
        from finetuna_lightning.ops.kernels import rows

        slices, dtype, tiles = _swiglu_slices(weights, x.dtype), x.dtype, plan.tiling.tiles
        first, last = plan.gathered(dtype)
        operand, kept, rstd = _normed(x, norm, slices)
        low = first.low(kept)
        gate, up = (
            _forward(operand, q, None, dtype, tiles, first.outputs(index, low)) for index, q in enumerate(weights[:2])
        )
        del operand
        h = _Operand(*rows.swiglu(gate, up, slices))
        low_h = last.low(h)
        ctx.weights, ctx.plan, ctx.norm = weights, plan, norm
        ctx.save_for_backward(x, *(() if rstd is None else (rstd, kept.values, kept.scale)), gate, up, low, low_h)
        return _forward(h, weights[2], None, dtype, tiles, last.outputs(0, low_h), None if norm is None else x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from finetuna_lightning.ops.kernels import rows

        x, *saved, gate, up, low, low_h = ctx.saved_tensors
        weights, plan = ctx.weights, ctx.plan
        slices, dtype, tiles = _swiglu_slices(weights, gate.dtype), gate.dtype, plan.tiling.tiles
        grad = _fitted(grad)
        first, last = plan.gathered(dtype)
        back_h, up_h = last.backward(grad, low_h)
        h = _backward(_operand(grad, slices, weights[2].scale), weights[2:], dtype, tiles, last.inputs(back_h))
        column_scale = _scales(weights[:2]) if slices else None
        both, codes, scale = rows.swiglu_backward(h, gate, up, column_scale, slices)
        outer_grads = last.gradients(_Operand(h), back_h, up_h)  # h is now what went into down
        del h
        back, up = first.backward(both, low)
        grad_x = None
        if ctx.needs_input_grad[0]:
            operand = _Operand(both) if codes is None else _Operand(codes, scale)
            grad_x = _backward(operand, weights[:2], dtype, tiles, first.inputs(back))
            del operand
            if ctx.norm is not None:
                grad_x = rows.norm_backward(grad_x, x, ctx.norm[0], saved[0], grad)
        del codes, scale
        kept = _Operand(x) if ctx.norm is None else _Operand(*saved[1:])
        inner_grads = first.gradients(kept, back, up)
        return (grad_x, None, None, None, *plan.given(inner_grads + outer_grads))


def linear(
    x: Tensor, q: QuantizedWeight, bias: Tensor | None, deltas: Sequence[LoRALinear | None], tiling: Tiling,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + bias`` plus each row's own delta, plus ``residual`` [..., N]: x [..., d], result [..., N]."""
    if x.device.type == "cpu":
        out = joint_cpu.layers(x, [q], [bias], [deltas], tiling.spans)[0]
        return out if residual is None else out + residual
    plan = _plan(deltas, [[deltas]], [[q]], tiling, x.device)
    if residual is not None:
        residual = residual.reshape(-1, q.shape[0])
    flat = _fitted(x.reshape(-1, x.shape[-1]))
    with torch.cuda.device_of(x):  # Triton launches on the current one
        y: Tensor = _Linear.apply(flat, residual, q, bias, plan, *plan.trained(x.device))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def attention_inputs(
    x: Tensor, cos: Tensor, sin: Tensor, size: int, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None],
    deltas: Deltas, tiling: Tiling, norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v of x [B, T, d], or of its RMSNorm, each [B, heads, T, size], q and k rotated by cos and sin [B or 1,
    T, size]; and x again, for the residual stream."""
    batch, tokens, features = x.shape
    cos, sin = (table.expand(batch, -1, -1).reshape(batch * tokens, size) for table in (cos, sin))
    if x.device.type == "cpu":
        out = joint_cpu.layers(x, weights, biases, deltas, tiling.spans, (cos, sin, size))
        q, k, v = (y.view(batch, tokens, -1, size).transpose(1, 2) for y in out)
        return q, k, v, x
    plan = _plan(deltas, [deltas], [weights], tiling, x.device)
    flat = _fitted(x.reshape(-1, features))
    with torch.cuda.device_of(x):
        q, k, v, same = _Attention.apply(  # type: ignore[no-untyped-call]
            flat, norm, cos, sin, (batch, tokens, size), weights, biases, plan, *plan.trained(x.device)
        )
    return q, k, v, same.view(x.shape)


def swiglu(
    x: Tensor, weights: Sequence[QuantizedWeight], deltas: Deltas, tiling: Tiling, norm: Norm | None = None
) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of x [..., d], weights and deltas being those of gate, up, down; with ``norm``,
    of x's RMSNorm, and x is added."""
    if x.device.type == "cpu":
        return joint_cpu.swiglu(x, weights, deltas, tiling.spans)
    plan = _plan(deltas, [deltas[:2], deltas[2:]], [weights[:2], weights[2:]], tiling, x.device)
    flat = _fitted(x.reshape(-1, x.shape[-1]))
    with torch.cuda.device_of(x):
        out: Tensor = _SwiGLU.apply(flat, norm, weights, plan, *plan.trained(x.device))  # type: ignore[no-untyped-call]
    return out.view(x.shape)


class _Norm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from finetuna_lightning.ops.kernels import rows

        y, _, rstd = rows.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from finetuna_lightning.ops.kernels import rows

        x, weight, rstd = ctx.saved_tensors
        return rows.norm_backward(_fitted(grad), x, weight, rstd), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., d] with a frozen weight, in one pass each way."""
    flat = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        return cpu_rows.rms_norm(flat, weight, eps).view(x.shape)
    with torch.cuda.device_of(x):
        out: Tensor = _Norm.apply(flat, weight, eps)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels compute the RMSNorm of x: a Hopper GPU, 16-bit activations, a frozen weight of their type. On
    the CPU, ``ops.cpu_rows`` does, in bfloat16."""
    if torch.compiler.is_compiling():
        return False
    if x.device.type == "cpu":
        known = x.dtype == torch.bfloat16
    else:
        known = has_joint_kernels(x.device) and x.dtype in (torch.bfloat16, torch.float16)
    return known and weight.dtype == x.dtype and not weight.requires_grad and x.stride(-1) == 1 and x.numel() > 0
