"""The differentiable operator: its forward and every gradient against torch in float64, and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.ops import library, reference
from finetuna_lightning.ops.library import quantized_linear
from tests.helpers import native as helper

SCHEMES = ("int8", "int8-blockwise", "fp8")
SHAPES = [((4, 53), 37), ((53,), 37), ((2, 3, 64), 1), ((0, 16), 8), ((5, 1), 3), ((2, 1, 2, 70), 33)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stored(out: int, columns: int, scheme: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    codes, scale = reference.quantize(random(out, columns, seed=1), scheme, 64)
    return codes, scale, {"scheme": scheme, "block_size": 64}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_and_every_gradient(shape: tuple[int, ...], out: int, scheme: str, dtype: torch.dtype) -> None:
    codes, scale, options = stored(out, shape[-1], scheme)
    x = random(*shape, dtype=dtype).requires_grad_()
    bias = random(out, seed=2, dtype=dtype).requires_grad_()
    y = quantized_linear(x, codes, scale, bias, **options)
    grad = random(*y.shape, seed=3, dtype=dtype)
    y.backward(grad)

    true_x, true_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    weight = reference.dequantize(codes, scale, scheme, 64, dtype).double()
    true_y = F.linear(true_x, weight, true_bias)
    true_y.backward(grad.double())
    assert y.dtype == dtype and y.shape == (*shape[:-1], out)
    for ours, true in ((y, true_y), (x.grad, true_x.grad), (bias.grad, true_bias.grad)):
        assert ours is not None and true is not None and ours.dtype == dtype
        limit = TOLERANCE[dtype] * max(1.0, float(true.detach().abs().max()) if true.numel() else 0.0)
        assert torch.allclose(ours.double(), true, atol=limit, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradcheck(scheme: str) -> None:
    codes, scale, options = stored(6, 9, scheme)

    def function(x: Tensor, bias: Tensor) -> Tensor:
        return quantized_linear(x, codes, scale, bias, **options)

    assert torch.autograd.gradcheck(function, (random(3, 9).requires_grad_(), random(6).requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: function(x, None), (random(2, 2, 9).requires_grad_(),))  # type: ignore[arg-type]


def saved_by(function: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function()
    return saved


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_all_that_is_saved(scheme: str) -> None:
    codes, scale, options = stored(40, 30, scheme)
    x, bias = random(5, 30, dtype=torch.float32).requires_grad_(), random(40, dtype=torch.float32)
    saved = saved_by(lambda: quantized_linear(x, codes, scale, bias, **options))
    assert {t.untyped_storage().data_ptr() for t in saved} == {t.untyped_storage().data_ptr() for t in (codes, scale)}
    plain = reference.dequantize(codes, scale, scheme, 64, torch.float32)
    assert plain.data_ptr() in {t.data_ptr() for t in saved_by(lambda: F.linear(x, plain))}  # what the hook would catch


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_element_of_every_buffer_is_written(scheme: str, poisoned_memory: None) -> None:
    """``torch.empty`` gives NaN and the largest integers here."""
    assert bool(torch.empty(9).isnan().all())
    codes, scale, options = stored(7, 13, scheme)
    x, bias = random(3, 13, dtype=torch.bfloat16).requires_grad_(), random(7).requires_grad_()
    y = quantized_linear(x, codes, scale, bias, **options)
    y.sum().backward()
    assert x.grad is not None and bias.grad is not None
    assert all(bool(t.isfinite().all()) for t in (scale, y, x.grad, bias.grad))
    values = reference.dequantize(codes, scale, scheme, 64, torch.float64)
    assert bool(((values - random(7, 13, seed=1)).abs() < 0.15).all())


@pytest.mark.parametrize("way", helper.WAYS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_is_the_reference_s(
    dtype: torch.dtype, scheme: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper.take(way, monkeypatch)
    codes, scale, options = stored(37, 70, scheme)
    x, bias, grad = random(5, 70, dtype=dtype).requires_grad_(), random(37, dtype=dtype), random(5, 37, dtype=dtype)
    y = quantized_linear(x, codes, scale, bias, **options)
    y.backward(grad)
    assert torch.equal(y, reference.linear(x, codes, scale, bias, scheme, 64)) and x.grad is not None
    assert torch.equal(x.grad, reference.linear_backward(grad, codes, scale, scheme, 64))
    got = library.read_out(codes, scale, scheme, 64, dtype)
    assert torch.equal(got, reference.dequantize(codes, scale, scheme, 64, dtype))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which also fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_gradients_asked_for_are_computed(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, options = stored(6, 9, scheme)
    calls: list[int] = []
    inner = library.read_out
    monkeypatch.setattr(library, "read_out", lambda *args: calls.append(1) or inner(*args))
    bias = random(6).requires_grad_()
    quantized_linear(random(3, 9), codes, scale, bias, **options).sum().backward()
    assert calls == [1] and bias.grad is not None and torch.equal(bias.grad, torch.full((6,), 3.0, dtype=torch.float64))
    x, frozen = random(3, 9).requires_grad_(), random(6)
    quantized_linear(x, codes, scale, frozen, **options).sum().backward()
    assert calls == [1, 1, 1] and x.grad is not None and frozen.grad is None
    assert not quantized_linear(random(3, 9), codes, scale, frozen, **options).requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_computes_in_its_own_type(scheme: str) -> None:
    codes, scale, options = stored(6, 9, scheme)
    x = random(3, 9, dtype=torch.float32).requires_grad_()
    bias = random(6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized_linear(x, codes, scale, bias, **options)
    expected = quantized_linear(x.detach().bfloat16(), codes, scale, bias.detach(), **options)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert quantized_linear(x, codes, scale, bias, **options).dtype == torch.float32


def test_autocast_reads_the_weight_out_in_its_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in the 32 bits of what comes in, to be cast down by the product."""
    codes, scale, options = stored(6, 9, "int8")
    types: list[torch.dtype] = []
    inner = library.read_out
    monkeypatch.setattr(library, "read_out", lambda *args: types.append(args[-1]) or inner(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized_linear(
            random(3, 9, dtype=torch.float32).requires_grad_(), codes, scale, None, **options
        ).sum().backward()
    assert types == [torch.bfloat16, torch.bfloat16]


def test_a_bias_in_another_type_gets_its_gradient_in_its_own() -> None:
    codes, scale, options = stored(6, 9, "int8")
    bias = random(6, dtype=torch.float32).requires_grad_()
    y = quantized_linear(random(3, 9, dtype=torch.bfloat16), codes, scale, bias, **options)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_fp8_compute_without_its_device_is_16_bit_compute() -> None:
    codes, scale, options = stored(16, 32, "fp8")
    x = random(4, 32, dtype=torch.float32)
    plain = quantized_linear(x, codes, scale, None, **options)
    assert torch.equal(quantized_linear(x, codes, scale, None, compute="fp8", **options), plain)


def test_rows_in_e4m3() -> None:
    """What float8 units multiply: one scale a row, the largest of a row at the end of the range, rows of zeros zero."""
    x = random(5, 64, dtype=torch.float32) * torch.tensor([1e-6, 1.0, 1e3, 1e6, 0.0])[:, None]
    codes, scale = library._e4m3_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape and scale.shape == (5, 1)
    assert scale.dtype == torch.float32
    error = (codes.float() * scale - x).abs()
    assert bool((error <= torch.maximum(x.abs() / 15, scale * 2**-9)).all())
    assert bool((codes.float()[:4].abs().amax(1) == 448).all()) and not bool(codes[4].float().any())


def test_a_shape_that_float8_does_not_take_is_told_once() -> None:
    with pytest.warns(UserWarning, match="a 7x13 layer is computed in 16 bits: float8 needs multiples of 16"):
        library._say_not_8bit((7, 13), "float8")
    library._say_not_8bit((7, 13), "float8")
    with pytest.warns(UserWarning, match="a 7x13 layer is computed in float32: int8 needs activations in 16 bits"):
        library._say_not_8bit((7, 13), "int8", "activations in 16 bits")
