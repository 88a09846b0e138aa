"""Layers with the deltas of many adapters on the CPU: values and every gradient against the equations in float64, int8
products as the same to the bit in any company, and a NaN that stays with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.nn import joint_cpu
from finetuna_lightning.nn.lora import LoRALinear
from finetuna_lightning.nn.quantized import QuantizedWeight
from tests.helpers import native as helper

WIDTH, OUTPUTS, SIZE = 24, (16, 16, 8), 8  # two heads of q and k, one of v
SPANS = [(0, 6, 0), (6, 12, 1), (12, 18, 2), (18, 23, 0), (23, 24, 3), (24, 30, 1)]
# of the norm; int8 products on top: half a step of 127 on each side, and weights of a few rows
TOLERANCE = {("16bit", torch.float32): 2e-6, ("16bit", torch.bfloat16): 0.012}
TOLERANCE |= {("int8", dtype): 0.04 for dtype in (torch.float32, torch.bfloat16)}
forms = pytest.mark.parametrize(("compute", "dtype"), list(TOLERANCE))


@pytest.fixture(autouse=True, params=helper.WAYS)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces and products of a few rows; whatever is allocated and not written is NaN."""
    helper.take(request.param, monkeypatch)
    monkeypatch.setattr(joint_cpu, "CUT_ROWS", 12)
    monkeypatch.setattr(joint_cpu, "PIECE_ROWS", 5)
    monkeypatch.setattr(joint_cpu, "WIDE_ROWS", 7)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shapes: Sequence[tuple[int, int]], compute: str, scheme: str = "int8") -> list[QuantizedWeight]:
    found = [QuantizedWeight.from_weight(random(*shape, seed=i) * 0.2, scheme) for i, shape in enumerate(shapes)]
    for q in found:
        q.compute = compute
    return found


def deltas_of(shapes: Sequence[tuple[int, int]]) -> list[list[LoRALinear | None]]:
    """By layer, of four slots: two alike, one of other ranks and not on the second layer, one without any."""
    made: list[list[LoRALinear | None]] = []
    for index, (out, into) in enumerate(shapes):
        own: list[LoRALinear | None] = []
        for slot, rank in enumerate((4, 4, 3, 0)):
            if not rank or (slot == 2 and index == 1):
                own.append(None)
                continue
            delta = LoRALinear(into, out, rank, alpha=2 * rank, dropout=0.0, bias=False, generator=torch.Generator())
            delta.lora_A.data = random(rank, into, seed=slot)
            delta.lora_B.data = random(out, rank, seed=9 * slot + index)
            own.append(delta)
        made.append(own)
    return made


def parameters(deltas: Sequence[Sequence[LoRALinear | None]]) -> list[Tensor]:
    return [p for own in deltas for delta in own if delta is not None for p in (delta.lora_A, delta.lora_B)]


class Equation:
    """The layers in float64, row by row; ``wide`` are the deltas' parameters there."""

    def __init__(self, weights: Sequence[QuantizedWeight], deltas: Sequence[Sequence[LoRALinear | None]]) -> None:
        self.weights, self.deltas = weights, deltas
        self.wide = {id(p): p.detach().double().requires_grad_() for p in parameters(deltas)}

    def __call__(self, x: Tensor, index: int) -> Tensor:
        rows = []
        for start, stop, slot in SPANS:
            own, delta = x[start:stop], self.deltas[index][slot]
            y = own @ self.weights[index].dequantize(torch.float64).t()
            if delta is not None:
                a, b = self.wide[id(delta.lora_A)], self.wide[id(delta.lora_B)]
                y = y + delta.scaling * (own @ a.t() @ b.t())
            rows.append(y)
        return torch.cat(rows)


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = y.view(len(y), -1, SIZE)
    half = torch.cat([-heads[..., SIZE // 2 :], heads[..., : SIZE // 2]], -1)
    return (heads * cos.double()[:, None] + half * sin.double()[:, None]).flatten(1)


def check(given: Sequence[Tensor], wanted: Sequence[Tensor], inputs: Any, wide: Any, limit: float) -> None:
    grads = [random(*y.shape, seed=70 + i).to(y.dtype) for i, y in enumerate(given)]
    assert all(off(one, other) <= limit for one, other in zip(given, wanted, strict=True))
    slopes = torch.autograd.grad(given, inputs, grads)
    assert [slope.dtype for slope in slopes[1:]] == [torch.float32] * (len(slopes) - 1)
    for got, right in zip(slopes, torch.autograd.grad(wanted, wide, [g.double() for g in grads]), strict=True):
        assert off(got, right) <= 2 * limit


@forms
@pytest.mark.parametrize("rotary", [False, True])
def test_layers_that_share_their_input(compute: str, dtype: torch.dtype, rotary: bool) -> None:
    shapes = [(out, WIDTH) for out in OUTPUTS]
    weights, deltas = weights_of(shapes, compute), deltas_of(shapes)
    x = random(30, WIDTH, seed=50).to(dtype).requires_grad_()
    bias = random(OUTPUTS[1], seed=51)
    cos, sin = (random(30, SIZE, seed=60 + i).to(dtype) for i in range(2))
    tables = (cos, sin, SIZE) if rotary else None
    given = joint_cpu.layers(x.view(5, 6, WIDTH), weights, [None, bias, None], deltas, SPANS, tables)
    assert all(y.shape[:2] == (5, 6) and y.dtype == dtype for y in given)
    equation, wide = Equation(weights, deltas), x.detach().double().requires_grad_()
    wanted = [equation(wide, index) for index in range(3)]
    wanted[1] = wanted[1] + bias.double()
    if rotary:
        wanted[:2] = [turned(y, cos, sin) for y in wanted[:2]]
    inputs, own = [x, *parameters(deltas)], [wide, *equation.wide.values()]
    check([y.flatten(0, 1) for y in given], wanted, inputs, own, TOLERANCE[compute, dtype])


@forms
def test_swiglu(compute: str, dtype: torch.dtype) -> None:
    shapes = [(40, WIDTH), (40, WIDTH), (WIDTH, 40)]
    weights, deltas = weights_of(shapes, compute), deltas_of(shapes)
    x = random(30, WIDTH, seed=50).to(dtype).requires_grad_()
    equation, wide = Equation(weights, deltas), x.detach().double().requires_grad_()
    wanted = equation(F.silu(equation(wide, 0)) * equation(wide, 1), 2)
    given = joint_cpu.swiglu(x, weights, deltas, SPANS)
    check([given], [wanted], [x, *parameters(deltas)], [wide, *equation.wide.values()], 2 * TOLERANCE[compute, dtype])


@pytest.mark.parametrize("scheme", ["int8-blockwise", "fp8"])
def test_other_schemes_are_read_out(scheme: str) -> None:
    shapes = [(16, WIDTH)]
    weights, deltas, x = weights_of(shapes, "16bit", scheme), deltas_of(shapes), random(30, WIDTH, seed=50)
    (given,) = joint_cpu.layers(x, weights, [None], deltas, SPANS)
    assert off(given, Equation(weights, deltas)(x.double(), 0)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False], ids=["swiglu", "layers"])
def test_int8_in_company_is_alone_to_the_bit(dtype: torch.dtype, whole: bool) -> None:
    """Output, gradient of x, and of A and B; of a second slot whose neighbours are NaN."""
    width, hidden = 192, 2304  # sums long enough for a BLAS to cut
    shapes = [(hidden, width), (hidden, width), (width, hidden)] if whole else [(hidden, width)]
    weights, deltas = weights_of(shapes, "int8"), deltas_of(shapes)
    x, grad = random(24, width, seed=50).to(dtype), random(24, width if whole else hidden, seed=52).to(dtype)
    x[:6] = torch.nan
    deltas[0][0].lora_B.data.fill_(torch.nan)  # type: ignore[union-attr]

    def run(rows: slice, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        own = x[rows].clone().requires_grad_()
        if whole:
            y = joint_cpu.swiglu(own, weights, deltas, spans)
        else:
            (y,) = joint_cpu.layers(own, weights, [None], deltas, spans)
        mine = [p for layer in deltas for p in (layer[1].lora_A, layer[1].lora_B)]  # type: ignore[union-attr]
        slopes = torch.autograd.grad(y, [own, *mine], grad[rows])
        cut = slice(6, 12) if rows.stop == 24 else slice(0, 6)
        return [y[cut], slopes[0][cut], *slopes[1:]]

    joint = run(slice(0, 24), [(0, 6, 0), (6, 12, 1), (12, 18, 2), (18, 24, 0)])
    alone = run(slice(6, 12), [(0, 6, 1)])
    assert all(bool(part.isfinite().all()) for part in joint)
    assert all(torch.equal(one, other) for one, other in zip(joint, alone, strict=True))


def test_adapters_alike_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(16, WIDTH)]
    deltas, calls = deltas_of(shapes), []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (calls.append(len(a)), product(a, b))[1])
    joint_cpu.layers(random(12, WIDTH, seed=1).bfloat16(), weights_of(shapes, "16bit"), [None], deltas, SPANS[:2])
    assert calls == [2]


def test_without_deltas_nothing_is_kept() -> None:
    weights = weights_of([(16, WIDTH)], "16bit")
    x = random(30, WIDTH, seed=50).requires_grad_()
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (y,) = joint_cpu.layers(x, weights, [None], [[None]], [(0, 30, 0)])
    assert not kept
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert off(slope, weights[0].dequantize(torch.float64).sum(0).expand(30, -1)) < 2e-6


def test_what_it_does_not_take() -> None:
    (q,) = weights_of([(16, WIDTH)], "16bit")
    x, bias = torch.zeros(2, WIDTH, dtype=torch.bfloat16), torch.zeros(16)
    assert joint_cpu.takes(x, [q], [bias])
    assert not joint_cpu.takes(x.float(), [q], [None])
    assert not joint_cpu.takes(x[:0], [q], [None])
    assert not joint_cpu.takes(x, [q], [bias.clone().requires_grad_()])
    with torch.autocast("cpu", torch.bfloat16):
        assert not joint_cpu.takes(x, [q], [None])
    q.compute = "int8"
    assert joint_cpu.takes(x.float(), [q], [None]) and not joint_cpu.takes(x.double(), [q], [None])
    q.compute = "fp8"
    assert not joint_cpu.takes(x, [q], [None])
