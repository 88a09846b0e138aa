"""The Triton kernels against float64, over odd shapes, and with every new buffer full of NaN. As a program
(``TRITON_INTERPRET=1 python -m tests.helpers.kernels``) it checks them on the CPU, in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes.functional
import torch
from torch import Tensor
from torch.nn import functional

from finetuna_lightning.ops import reference
from finetuna_lightning.ops.kernels import adam, gemm, lowrank, quantize, rows
from finetuna_lightning.ops.tiling import tiling

SPANS = [("one", 0, 70), ("two", 70, 200), ("one", 200, 233), ("three", 233, 234)]
SLOTS = {"one": 0, "two": 1, "three": 2}
SMALL = {
    True: {"BN": 64, "BK": 32, "GROUP": 8, "PERSISTENT": False, "num_warps": 4, "num_stages": 2},
    False: {"BN": 64, "BK": 32, "GROUP": 8, "PERSISTENT": True, "num_warps": 4, "num_stages": 2},
}  # for the interpreter; a GPU takes what users get


def distance(got: Tensor, wanted: Tensor) -> float:
    """Of the norm of ``wanted``."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, or of 77."""
    empty = torch.empty

    def full(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    torch.empty = full  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


class Case:
    """Random tensors on ``device``, in ``dtype`` where nothing else is said; ``bound``: of one rounding."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float16
        self.bound = 4e-3 if device == "cuda" else 6e-4
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8).to(self.device)

    def tiles(self) -> Any:
        return tiling(SPANS, torch.device(self.device))


def check_quantize(case: Case) -> None:
    for width, column in ((300, False), (300, True), (4160, True), (16400, True)):
        x, scales = case.random(7, width), case.uniform(width) if column else None
        x[3] = 0
        exact = x.double() * (1 if scales is None else scales.double())
        codes, scale = rows.quantize(x, scales)
        assert float((codes * scale[:, None].double() - exact).abs().max()) <= float(scale.max()) * 0.51
        assert torch.equal(codes[3], torch.zeros_like(codes[3])) and not scale[3]
        sliced(exact, partial(rows.quantize, x, scales))
        nearest = exact.abs().amax(1).float() / 127
        assert torch.allclose(scale, nearest, rtol=1e-6)
        of_two = rows.quantize(x, scales, 2)[1]
        between = (of_two >= nearest * (1 - 1e-6)) & (of_two <= nearest * (2 + 1e-6))
        assert torch.equal(of_two, scale) if column else bool(between.all())
        x[2, 5] = torch.nan
        for slices in (1, 2):
            whole = rows.quantize(x.nan_to_num(), scales, slices)[1]
            poisonous = rows.quantize(x, scales, slices)[1]
            assert poisonous.isfinite().tolist() == [True, True, False, True, True, True, True]
            assert torch.equal(poisonous[3:], whole[3:])


def check_cut_of_16_bits(case: Case) -> None:
    """Two slices are numbers of eight significant bits themselves, down to a 127th of the largest: of every such
    largest, and of 255, of which the next power of two is one further than of 254."""
    for width in (256, 16400):
        x = case.random(64, width, dtype=torch.bfloat16).float()
        x[:, 1] = torch.arange(128, 256)[::2] * 0.0625  # the largest, of every second significand there is
        x[-1, 1], x[-2, 1], x[-3] = 255 * 0.0625, -254 * 0.0625, 0
        codes, scale = rows.quantize(x, slices=2)
        assert torch.equal(scale[:-3], torch.full_like(scale[:-3], 0.125)) and not scale[-3]
        assert scale[-1] == 0.25 and scale[-2] == 0.125
        exact = x.double()
        near = exact.abs() >= exact.abs().amax(1, keepdim=True) / 127
        error = (together(codes) * scale.double()[:, None] - exact).abs()
        assert not error[near].any() and float(error.max()) <= 0.25 / 256 / 2 and error.any()
        assert torch.equal(rows.quantize(x * 0.25, slices=2)[1], scale * 0.25)
        for unit in (2.0**100, 2.0**-100):
            assert torch.equal(rows.quantize(x * unit, slices=2)[0], codes)
        for giant in (20.5, 128.5, 8192.5):  # where most are below a 127th of it, no scale is nearly doubled
            x[:, 1] = giant
            scale = rows.quantize(x[:-3], slices=2)[1]
            nearest, doubled = giant / 127, 2.0 ** math.ceil(math.log2(giant / 127))
            expected = doubled if giant == 20.5 else nearest
            assert torch.allclose(scale, torch.full_like(scale, expected), rtol=1e-6)


def check_quantize_as_the_reference(case: Case) -> None:
    """In the bits of the reference on a CPU: rows of several widths, in pieces, of zeros, of ties, of the smallest
    numbers, and not finite."""
    smallest = {torch.bfloat16: 1e-39 if case.device == "cuda" else 1e-30, torch.float16: 1e-7, torch.float32: 1e-39}
    for count, columns in ((37, 53), (1, 7), (5, 1), (3, 1000), (4, 4096), (2, 17000)):  # the last in two blocks
        for dtype, tiny in smallest.items():
            random = case.random(count, columns, dtype=torch.float32)
            ties = (random * 100).round().clamp(-254, 254) / 2
            ties[:, 0] = 127
            damaged = random.clone()
            damaged[0, -1], damaged[-1, 0], damaged[count // 2] = torch.nan, torch.inf, 0
            for matrix in (random, ties, random * tiny, damaged):
                weight = matrix.to(dtype)
                codes = torch.empty(count + 2, columns, dtype=torch.int8, device=case.device)
                scale = torch.empty(count + 2, device=case.device)
                for start, stop in ((0, count // 2), (count // 2, count), (count, count)):
                    quantize.quantize(weight[start:stop].reshape(-1), codes, scale, 1 + start)
                wanted = torch.empty(count, columns, dtype=torch.int8), torch.empty(count)
                reference.quantize_groups(weight.cpu().view(-1), wanted[0].view(-1), wanted[1], "int8", columns)
                got, finite = (codes[1:-1].cpu(), scale[1:-1].cpu()), wanted[1].isfinite()
                assert torch.equal(got[1].isfinite(), finite)
                assert torch.equal(got[0][finite], wanted[0][finite]) and torch.equal(got[1][finite], wanted[1][finite])
                assert bool((codes[[0, -1]] == 77).all() and scale[[0, -1]].isnan().all())  # neighbours are let alone


def check_transpose_and_dequantize(case: Case) -> None:
    codes, scale = case.codes(130, 70), case.uniform(130)
    more = [codes, case.codes(16, 70), case.codes(144, 70)]
    for count in (1, 2, 3):
        assert torch.equal(rows.transpose(more[:count]), torch.cat(more[:count]).t())
    out = rows.dequantize(codes, scale, torch.empty(130, 70, dtype=case.dtype, device=case.device))
    assert torch.equal(out, (codes.float() * scale[:, None]).to(case.dtype))


def check_norm(case: Case) -> None:
    x, weight, grad, residual = case.random(5, 304), case.random(304), case.random(5, 304), case.random(5, 304)
    exact = x.double().requires_grad_()
    y = exact * torch.rsqrt(exact.square().mean(1, keepdim=True) + 1e-6) * weight.double()
    y.backward(grad.double())
    got, none, rstd = rows.norm(x, weight, 1e-6)
    assert none is None and distance(got, y) < 2 * case.bound
    as_cut(got, lambda slices: rows.norm(x, weight, 1e-6, slices)[:2])
    for slices in (1, 2):
        assert torch.allclose(rows.norm(x, weight, 1e-6, slices)[2], rstd, rtol=1e-6)
    assert exact.grad is not None
    assert distance(rows.norm_backward(grad, x, weight, rstd), exact.grad) < case.bound
    assert distance(rows.norm_backward(grad, x, weight, rstd, residual), exact.grad + residual) < case.bound


def sliced(wanted: Tensor, given: Callable[[int], tuple[Tensor, Tensor | None]]) -> None:
    """What is ``given`` of a result in one slice and in two, where ``wanted`` is the result."""
    for slices, unit in ((1, 1.0), (2, 1 / 256)):
        codes, scale = given(slices)
        assert scale is not None
        assert float((together(codes) * scale[:, None] - wanted).abs().max()) <= float(scale.max()) * 0.51 * unit


def as_cut(wanted: Tensor, given: Callable[[int], tuple[Tensor, Tensor | None]]) -> None:
    """What is ``given`` of a result in one slice and in two is what ``quantize`` makes of the result."""
    for slices in (1, 2):
        for own, other in zip(given(slices), rows.quantize(wanted, slices=slices), strict=True):
            assert own is not None and torch.equal(own, other)


def together(codes: Tensor) -> Tensor:
    """Codes, or two slices, in units of the codes."""
    return codes.double() if codes.dim() == 2 else codes[0].double() + codes[1].double() / 256


def check_rotate(case: Case) -> None:
    batch, tokens, heads, kv, size = 2, 3, 5, 3, 24
    cos, sin = case.random(batch * tokens, size), case.random(batch * tokens, size)

    def exact(x: Tensor) -> Tensor:
        halves = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        table = (batch, tokens, 1, size)
        return x * cos.double().view(table) + halves * sin.double().view(table)

    given = [case.random(batch, tokens, count, size) for count in (heads, kv, kv)]
    doubles = [part.double().requires_grad_() for part in given]
    wanted = [exact(doubles[0]), exact(doubles[1]), doubles[2] * 1]
    grads = [case.random(batch, n, tokens, size).transpose(1, 2) for n in (heads, kv, kv)]  # as attention has them
    for y, grad in zip(wanted, grads, strict=True):
        y.backward(grad.double())
    whole = torch.empty(batch * tokens, (heads + 2 * kv) * size, dtype=case.dtype, device=case.device)
    parts = whole.split([heads * size, kv * size, kv * size], 1)
    rows.rotate(given, parts, cos, sin)
    for part, y in zip(parts, wanted, strict=True):
        assert distance(part.reshape(y.shape), y) < case.bound
    rows.rotate(grads, parts, cos, sin, backward=True)
    for part, double in zip(parts, doubles, strict=True):
        assert double.grad is not None and distance(part.reshape(double.shape), double.grad) < case.bound
    column = case.uniform(whole.shape[1])
    column[3] = 0
    for slices in (0, 1, 2):
        again, codes, scale = rows.rotate_back(grads, cos, sin, column, slices)
        assert torch.equal(again, whole)
        if slices:
            assert codes is not None and scale is not None
            assert all(
                torch.equal(a, b) for a, b in zip((codes, scale), rows.quantize(whole, column, slices), strict=True)
            )
    for part in range(3):
        damaged = [grad.clone() for grad in grads]
        damaged[part][1, 2, 1, 5] = torch.nan if part else torch.inf
        poisonous = rows.rotate_back(damaged, cos, sin, column, 2)[2]
        assert poisonous is not None and poisonous.isfinite().tolist() == [True] * 5 + [False]
    flat = [part.reshape(batch * tokens, -1) for part in given[:2]]
    rows.rotate(given[:2], flat, cos, sin)  # in place
    for part, y in zip(flat, wanted, strict=False):
        assert distance(part.view(y.shape), y) < case.bound


def check_swiglu(case: Case) -> None:
    for width in (304, 4160, 16400):
        gate, up, grad = case.random(3, width), case.random(3, width), case.random(3, width)
        gates, ups = gate.double().requires_grad_(), up.double().requires_grad_()
        h = functional.silu(gates) * ups
        h.backward(grad.double())
        assert gates.grad is not None and ups.grad is not None
        wanted, columns = torch.cat([gates.grad, ups.grad], 1), case.uniform(2 * width)
        got, none = rows.swiglu(gate, up, 0)
        assert none is None and distance(got, h) < case.bound
        as_cut(got, partial(rows.swiglu, gate, up))
        for slices in (0, 1, 2):
            own = grad.clone()
            both, codes, scale = rows.swiglu_backward(own, gate, up, columns if slices else None, slices)
            assert distance(both, wanted) < case.bound and distance(own, h) < case.bound
            if slices:
                assert codes is not None and scale is not None
                error = together(codes) * scale[:, None] - both.double() * columns.double()
                assert float(error.abs().max()) <= float(scale.max()) * 0.51 / (1, 256)[slices - 1]


def check_lowrank(case: Case) -> None:
    """Ragged ranks, adapters without a layer, several layers side by side; rows in 16 bits, in int8 and in slices."""
    cut = case.tiles()
    for rank, ranks, width in (
        (16, ((4, 16, 0), (7, 3, 16), (1, 2, 3)), 208),
        (64, ((4, 40, 0), (7, 3, 17)), 208),
        (64, ((4, 40, 0), (7, 3, 17)), 2080),  # of K in parts
    ):
        own = [[case.random(max(r, 1), width, dtype=torch.float32)[:r] for r in layer] for layer in ranks]
        columns = lowrank.columns_of(len(ranks), rank)
        pieces, turned = [], []
        for slot in range(3):
            at = slot * columns * width
            for index, layer in enumerate(own):
                as_b = slot == 1  # the same matrix, given as B is stored
                turned.append(layer[slot].t().contiguous() if as_b else layer[slot])
                address = turned[-1].data_ptr() if len(layer[slot]) else 0
                pieces.append((address, len(layer[slot]), width, not as_b, at + index * rank * width, width, rank))
            spare = columns - len(ranks) * rank
            pieces.append((0, 0, width, True, at + len(ranks) * rank * width, width, spare))
        matrices = torch.zeros(3, columns, width, device=case.device)
        for index, layer in enumerate(own):
            for slot, matrix in enumerate(layer):
                matrices[slot, index * rank : index * rank + len(matrix)] = matrix
        matrices = matrices.to(case.dtype)
        got = lowrank.gather(lowrank.jobs(pieces).to(case.device), matrices.numel(), width, case.dtype)
        assert torch.equal(got.view_as(matrices), matrices)
        x, scales, low = case.random(234, width + 32)[:, 16:-16], case.uniform(3, columns), case.random(234, columns)
        held = torch.tensor(ranks, dtype=torch.int32, device=case.device)
        for values, scale in ((x, None), rows.quantize(x), rows.quantize(x, slices=2)):
            exact = together(values) * (1 if scale is None else scale.double()[:, None])
            wanted = torch.zeros(234, columns, dtype=torch.float64, device=case.device)
            sums = torch.zeros(3, width, columns, dtype=torch.float64, device=case.device)
            for name, start, stop in SPANS:
                slot = SLOTS[name]
                wanted[start:stop] = exact[start:stop] @ matrices[slot].double().t() * scales[slot].double()
                sums[slot] += exact[start:stop].t() @ low[start:stop].double()
            assert distance(lowrank.down(values, matrices, scales, cut.tiles, row_scale=scale), wanted) < case.bound
            wide = torch.empty(234, columns + 32, dtype=case.dtype, device=case.device)
            lowrank.down(values, matrices, scales, cut.tiles, wide[:, 16 : 16 + columns], row_scale=scale)
            assert distance(wide[:, 16 : 16 + columns], wanted) < case.bound
            found = lowrank.outer(values, low, cut.chunks, cut.first, held, rank, row_scale=scale)
            bound = 1e-3 if scale is None else 2 * case.bound
            for index, layer_ranks in enumerate(ranks):
                for slot, r in enumerate(layer_ranks):
                    part = found.view(3, len(ranks), -1)[slot, index, : r * width].view(r, width).t()
                    if r:
                        assert distance(part, sums[slot][:, index * rank : index * rank + r]) < bound


def check_down_of_several(case: Case) -> None:
    """No bit depends on the company: a small rank alone, and beside large ones in which it is padded; K in parts."""
    (start, stop), r, width = SPANS[1][1:], 10, 2080
    x, weight = case.random(234, width), case.random(r, width)
    for slices in (0, 1, 2):
        values, scale = rows.quantize(x, slices=slices) if slices else (x, None)
        found = []
        for rank, spans in ((16, [("two", 0, stop - start)]), (64, SPANS), (128, SPANS)):
            alone = rank == 16
            slot, count = (0, 1) if alone else (SLOTS["two"], len(SLOTS))
            cut = slice(start, stop) if alone else slice(None)
            matrices = case.random(count, rank, width)
            matrices[slot] = 0
            matrices[slot, :r] = weight
            low = lowrank.down(
                values[..., cut, :].contiguous(), matrices, torch.ones(count, rank, device=case.device),
                tiling(spans, torch.device(case.device)).tiles, row_scale=None if scale is None else scale[cut].clone(),
            )  # fmt: skip
            found.append(low[:, :r] if alone else low[start:stop, :r])
        assert all(torch.equal(found[0], other) for other in found[1:])


def check_up_backward(case: Case) -> None:
    """Ragged ranks, adapters without a layer; layers side by side, one of them of several blocks, of which the last
    reaches into the next."""
    cut = case.tiles()
    for rank, ranks, widths in (
        (16, ((4, 16, 0), (7, 3, 16), (1, 2, 3)), (16, 2 * lowrank.UP_COLUMNS + 48, 80)),
        (64, ((4, 40, 0), (7, 3, 17)), (64, 144)),
        (128, ((4, 100, 128), (7, 128, 0), (1, 2, 70)), (16, lowrank.UP_COLUMNS + 32, 48)),  # in two slabs
    ):
        columns, width = lowrank.columns_of(len(ranks), rank), sum(widths)
        grad, low, scales = case.random(234, width + 32)[:, 16:-16], case.random(234, columns), case.uniform(3, columns)
        matrices = torch.zeros(3, columns, width, device=case.device, dtype=case.dtype)
        starts = [sum(widths[:index]) for index in range(len(widths))]
        for index, layer in enumerate(ranks):
            for slot, r in enumerate(layer):
                at = slice(index * rank, index * rank + r), slice(starts[index], starts[index] + widths[index])
                matrices[slot][at] = case.random(r, widths[index])
        wanted = torch.zeros(234, columns, dtype=torch.float64, device=case.device)
        sums = torch.zeros(3, width, columns, dtype=torch.float64, device=case.device)
        for name, start, stop in SPANS:
            slot, rows_of = SLOTS[name], grad[start:stop].double()
            wanted[start:stop] = rows_of @ matrices[slot].double().t() * scales[slot].double()
            sums[slot] += rows_of.t() @ low[start:stop].double()
        table, counts = (t.to(case.device) for t in lowrank.blocks(widths))
        held = torch.tensor(ranks, dtype=torch.int32, device=case.device)
        back, found = lowrank.up_backward(
            grad, low, matrices, scales, cut.tiles, cut.chunks, cut.first, held, rank, (table, counts)
        )
        assert distance(back, wanted) < case.bound
        assert not back[:, len(ranks) * rank :].any()
        for index, (start, side) in enumerate(zip(starts, widths, strict=True)):
            for slot, r in enumerate(ranks[index]):
                part = found[slot, start * rank : start * rank + side * r].view(side, r)
                true = sums[slot][start : start + side, index * rank : index * rank + r]
                assert not r or distance(part, true) < 1e-3


def check_up_backward_of_several(case: Case) -> None:
    """No bit depends on the company: a small rank alone, and beside a large one in which it is padded; two blocks."""
    width, rows_of, r = 2 * lowrank.UP_COLUMNS + 16, SPANS[1], 10
    start, stop = rows_of[1:]
    grad, low, weight = case.random(234, width), case.random(234, 128), case.random(r, width)
    found = []
    for rank, spans, ranks in (
        (16, [("two", 0, stop - start)], (r,)),
        (64, SPANS, (33, r, 64)),
        (128, SPANS, (65, r, 128)),
    ):
        alone = len(ranks) == 1
        slot, cut = 0 if alone else SLOTS["two"], tiling(spans, torch.device(case.device))
        matrices = case.random(len(ranks), rank, width)
        matrices[slot] = 0
        matrices[slot, :r] = weight
        given = [t[start:stop] if alone else t for t in (grad, low[:, :rank])]
        table = tuple(t.to(case.device) for t in lowrank.blocks([width]))
        held = torch.tensor([ranks], dtype=torch.int32, device=case.device)
        scales = torch.ones(len(ranks), rank, device=case.device)
        back, gradients = lowrank.up_backward(
            given[0], given[1].contiguous(), matrices, scales, cut.tiles, cut.chunks, cut.first, held, rank, table
        )
        found.append((back[:, :r] if alone else back[start:stop, :r], gradients[slot, : width * r]))
    for others in found[1:]:
        assert all(torch.equal(mine, other) for mine, other in zip(found[0], others, strict=True))


def check_gemm(case: Case, options: Callable[[bool], dict[str, Any]]) -> None:
    """Both types, with everything in the epilogue and with nothing; neighbours' NaN stay where they are."""
    cut = case.tiles()
    for outputs, inputs, columns in ((208, 112, 16), (96, 80, 64)):
        low, residual, bias = case.random(234, columns), case.random(234, outputs), case.random(outputs)
        matrices = case.random(3, 2 * columns, outputs + 32)[:, columns:, 16 : 16 + outputs]  # a part of a larger block
        delta = torch.cat([low[a:b].double() @ matrices[SLOTS[n]].double() for n, a, b in SPANS])
        x, weight, row_scale, column_scale = (
            case.codes(234, inputs), case.codes(outputs, inputs), case.uniform(234) * 1e-3, case.uniform(outputs)
        )  # fmt: skip
        exact = x.double() @ weight.double().t() * row_scale.double()[:, None] * column_scale.double()
        x16, w16 = case.random(234, inputs), case.random(outputs, inputs)
        exact16 = x16.double() @ w16.double().t()
        forms: list[tuple[tuple[Tensor, Tensor], dict[str, Any], Tensor]] = [
            ((x, weight), {"row_scale": row_scale, "column_scale": column_scale}, exact),
            ((x, weight), {"row_scale": row_scale}, exact / column_scale.double()),
            ((x16, w16), {}, exact16),
            ((x16, w16.t().contiguous()), {"b_is_kn": True}, exact16),
        ]
        for (a, b), given, wanted in forms:
            chosen = options(a.dtype == torch.int8)
            out = torch.empty(234, outputs, dtype=case.dtype, device=case.device)
            gemm.gemm(a, b, out, cut.tiles, options=chosen, **given)
            assert distance(out, wanted) < case.bound
            more = {"low": low, "matrices": matrices, "bias": bias, "residual": residual}
            gemm.gemm(a, b, out, cut.tiles, options=chosen, **given, **more)
            assert distance(out, wanted + delta + bias.double() + residual.double()) < case.bound
            bad = low.clone()
            bad[70:200] = torch.nan
            spoilt = gemm.gemm(
                a, b, torch.empty_like(out), cut.tiles, options=chosen, **given, **more | {"low": bad}
            )  # fmt: skip
            assert spoilt[70:200].isnan().all()
            assert torch.equal(spoilt[:70], out[:70]) and torch.equal(spoilt[200:], out[200:])


def advance(
    owners: Sequence[tuple[list[Tensor], list[Tensor], Tensor, Tensor, float]], starts: Sequence[int], maps: Any,
    step: int, skip: Sequence[bool], coefficient: Tensor,
) -> None:  # fmt: skip
    """A step of owners of weights, gradients, moments, scales and a learning rate."""
    device, sizes = coefficient.device, [p.numel() for p in owners[0][0]]
    at = [[[t.data_ptr() for t in own] for own in owner[:2]] for owner in owners]
    states = [[t.data_ptr() for pair in owner[2:4] for t in pair] for owner in owners]
    settings = [adam.settings_of(owner[4], (0.9, 0.95), 1e-8, 0.1, step) for owner in owners]
    adam.adamw8bit(
        adam.programs(sizes, adam.ROWS).to(device), torch.tensor([sizes, starts[:-1]]).to(device),
        *(torch.tensor(table).to(device) for table in (at, states, settings)), maps, zero=127,
        skip=torch.tensor(skip, device=device), coefficient=coefficient,
    )  # fmt: skip


def check_adamw8bit_of_several(case: Case) -> None:
    """Whoever is stepped in the same launch, and whoever of them is skipped, changes no bit of another."""
    sizes, starts = [300, 1025], [0, 512, 1792]
    maps = tuple(
        adam.nearest_map(bitsandbytes.functional.create_dynamic_map(signed=signed).float().to(case.device))
        for signed in (True, False)
    )

    def owner(seed: int, rate: float) -> Any:
        generator = torch.Generator().manual_seed(seed)
        weights, gradients = (
            [torch.randn(size, generator=generator).to(case.device) for size in sizes] for _ in range(2)
        )
        codes = torch.zeros(2, starts[-1], dtype=torch.uint8, device=case.device)
        return weights, gradients, codes, torch.ones(2, starts[-1] // 256, device=case.device), rate

    rates = (1e-2, 3e-3, 1e-3)
    together = [owner(seed, rate) for seed, rate in enumerate(rates)]
    factors = torch.tensor([1.0, 0.5, 0.25], device=case.device)
    for step in (1, 2):
        advance(together, starts, maps, step, [False, step == 2, False], factors)
    for index, rate in enumerate(rates):
        alone = owner(index, rate)
        for step in (1, 2) if index != 1 else (1,):
            advance([alone], starts, maps, step, [False], factors[index : index + 1])
        for mine, others in zip((*alone[0], *alone[2:4]), (*together[index][0], *together[index][2:4]), strict=True):
            assert torch.equal(mine, others)


def check_norms(case: Case) -> None:
    """Of several owners, against float64; infinities show, and only at their owner."""
    sizes = [5000, 1, 4096, 300_000]
    owners = [[case.random(size, dtype=torch.float32) * (index + 1) for size in sizes] for index in range(3)]
    table = adam.programs(sizes, adam.NORM_ROWS).to(case.device)
    lengths = torch.tensor(sizes).to(case.device)

    def found() -> Tensor:
        at = torch.tensor([[g.data_ptr() for g in own] for own in owners]).to(case.device)
        return adam.norms(table, lengths, at)

    first = found()
    for norm, own in zip(first, owners, strict=True):
        assert distance(norm, torch.cat(own).double().norm()) < 1e-6
    owners[1][3][-1] = torch.inf
    again = found()
    assert torch.equal(again[::2], first[::2]) and again[1].isinf()


def check_adamw8bit(case: Case) -> None:
    """Against the definition over the same codes, and what bitsandbytes makes of the state."""
    sizes = [300, 4096 * 2 + 17, 256, 1]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    values = [
        bitsandbytes.functional.create_dynamic_map(signed=signed).float().to(case.device) for signed in (True, False)
    ]
    maps = adam.nearest_map(values[0]), adam.nearest_map(values[1])
    weights = [case.random(size, dtype=torch.float32) for size in sizes]
    moments = torch.zeros(2, starts[-1], dtype=torch.uint8, device=case.device)
    moments[0] = 127
    absmax = torch.zeros(2, starts[-1] // 256, device=case.device)
    half = torch.tensor([0.5], device=case.device)
    for step in range(1, 4):
        gradients = [case.random(size, dtype=torch.float32) * step for size in sizes]
        gradients[1][3] = 0 if step == 1 else torch.inf
        wanted = []
        for index, (p, g) in enumerate(zip(weights, gradients, strict=True)):
            cut = slice(starts[index], starts[index] + sizes[index])
            scale = absmax.repeat_interleave(256, 1)[:, cut].double()
            m, v = (values[row][moments[row, cut].long()].double() * scale[row] for row in range(2))
            g = g.double() * 0.5
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            rate = (1 - 0.95**step) ** 0.5
            new = p.double() * (1 - 1e-3) - 1e-2 * rate / (1 - 0.9**step) * m / (v.sqrt() + rate * 1e-8)
            wanted.append((torch.where(g.isfinite(), new, p.double()), m.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)))
        before = [t.clone() for t in (*weights, moments, absmax)]
        for skip in (True, False):
            advance([(weights, gradients, moments, absmax, 1e-2)], starts, maps, step, [skip], half)
            if skip:
                assert all(torch.equal(a, b) for a, b in zip(before, (*weights, moments, absmax), strict=True))
        for index, (p, (new, m, v)) in enumerate(zip(weights, wanted, strict=True)):
            assert float((p - new).abs().max()) < 1e-6
            cut = slice(starts[index], starts[index] + sizes[index])
            scale = absmax.repeat_interleave(256, 1)[:, cut]
            for row, true in enumerate((m, v)):
                code = moments[row, cut].long()
                assert bool((true.abs() <= scale[row] * (1 + 1e-5)).all())
                ratio = (true / scale[row].clamp(min=1e-30)).float()
                best = torch.searchsorted(maps[row].bounds[:-1].contiguous(), ratio)
                sign = (true < 0) & (values[row][best] >= 0) if row == 0 else torch.zeros_like(best, dtype=torch.bool)
                assert float((code != best - sign.long()).float().mean()) < 2e-3  # but for a ratio on the very edge


def check_all(device: str) -> list[str]:
    """Run every check on ``device``; their names."""
    options = gemm.config if device == "cuda" else SMALL.__getitem__
    checks: dict[str, Callable[[Case], None]] = {
        name: function for name, function in globals().items() if name.startswith("check_") and name != "check_all"
    }
    for name, check in checks.items():
        with poisoned():
            if name == "check_gemm":
                check_gemm(Case(device), options)
            else:
                check(Case(device))
    return list(checks)


if __name__ == "__main__":
    print("\n".join(check_all("cpu")), "\nchecked")
