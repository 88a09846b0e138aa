"""int8 products on the CPU: forward and every gradient against float64, rows that do not depend on one another, memory
that was not zero before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from finetuna_lightning.ops import cpu, library, reference

SHAPES = [(1, 1, 1), (3, 5, 7), (17, 33, 65), (16, 1, 130), (130, 64, 96), (257, 704, 256)]  # (tokens, out, in)
# Each side is off by at most half a step of its scale, max|row| / 254: uniform in it, so 0.29 / 127 of the row's
# maximum on average, and the maximum of a normal row is about 3 of its deviations. A hundredth of the result's norm is
# a bit more than that.
TOLERANCE = 0.012


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever is allocated and not written is NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(out: int, into: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and a bias."""
    generator = torch.Generator().manual_seed(seed)
    codes, scale = reference.quantize(torch.randn(out, into, generator=generator) * 0.02, "int8")
    return codes, scale, torch.randn(out, generator=generator) * 0.02


def dense(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double()[:, None]


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return library.quantized_linear(x, codes, scale, bias, scheme="int8", block_size=64, compute="int8")


def off(got: Tensor, wanted: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return float((got.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, out, into = shape
    codes, scale, bias = layer(out, into)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, into, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(tokens, out, generator=generator).to(dtype)
    own_bias = bias.clone().requires_grad_()
    y = int8_linear(x, codes, scale, own_bias)
    y.backward(grad)
    weight = dense(codes, scale)
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype and own_bias.grad is not None
    assert off(y, x.detach().double() @ weight.T + bias.double()) < TOLERANCE
    assert off(x.grad, grad.double() @ weight) < TOLERANCE
    assert off(own_bias.grad, grad.double().sum(0)) < {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5)


def test_the_product_is_exact_but_for_what_quantising_does() -> None:
    codes, scale, _ = layer(70, 48)
    x = torch.randn(9, 48)
    x_codes, x_scale = cpu.quantize_rows(x)
    wanted = (x_codes.double() * x_scale.double()) @ dense(codes, scale).T
    assert off(int8_linear(x, codes, scale), wanted) < 1e-6


def test_quantising_rounds_to_the_nearest_of_127_steps() -> None:
    x = torch.tensor([[127.0, 0.49, 0.51, -1.49, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1e-3, 0.0, 0.0, 0.0, -5e-4]])
    codes, scale = cpu.quantize_rows(x)
    assert codes.tolist() == [[127, 0, 1, -1, -127], [0] * 5, [127, 0, 0, 0, -64]]
    assert scale[0].item() == 1.0 and scale[2].item() == pytest.approx(1e-3 / 127)
    factor = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5])
    assert torch.equal(cpu.quantize_rows(x, factor)[0], cpu.quantize_rows(x * factor)[0])


def test_rows_of_zeros_give_zeros_and_no_gradient_of_nan() -> None:
    codes, scale, _ = layer(12, 20)
    scale[3] = 0.0  # a row of W that was zero
    x = torch.randn(5, 20)
    x[2] = 0.0
    x.requires_grad_()
    y = int8_linear(x, codes, scale)
    assert (y[2] == 0).all() and (y[:, 3] == 0).all()
    grad = torch.randn(5, 12)
    grad[4] = 0.0
    y.backward(grad)
    assert x.grad is not None and (x.grad[4] == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(bad: float) -> None:
    codes, scale, _ = layer(12, 20)
    x = torch.randn(4, 20)
    clean = int8_linear(x.clone(), codes, scale)
    x[1, 7] = bad
    y = int8_linear(x, codes, scale)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_tiny_and_huge_rows(size: float) -> None:
    codes, scale, _ = layer(12, 20)
    x = torch.randn(4, 20)
    assert off(int8_linear(x * size, codes, scale).double() / size, x.double() @ dense(codes, scale).T) < TOLERANCE


@pytest.mark.parametrize("shape", [(1024, 256, 96), (700, 3000, 40)])
def test_a_row_does_not_depend_on_its_neighbours(shape: tuple[int, int, int]) -> None:
    """Bit for bit, forward and backward: joint = alone."""
    tokens, out, into = shape
    codes, scale, bias = layer(out, into)
    x, grad = torch.randn(tokens, into), torch.randn(tokens, out)

    def both(part: slice) -> tuple[Tensor, Tensor]:
        own = x[part].clone().requires_grad_()
        y = int8_linear(own, codes, scale, bias)
        y.backward(grad[part])
        assert own.grad is not None
        return y.detach(), own.grad

    joint = both(slice(None))
    for part in (slice(0, 1), slice(3, 20), slice(tokens - 257, tokens)):
        for whole, alone in zip(joint, both(part), strict=True):
            assert torch.equal(whole[part], alone)


def test_leading_dimensions_strides_and_empty_batches() -> None:
    codes, scale, _ = layer(12, 20)
    x = torch.randn(20, 3, 4).permute(1, 2, 0).requires_grad_()  # not contiguous
    y = int8_linear(x, codes, scale)
    assert y.shape == (3, 4, 12)
    assert torch.equal(y, int8_linear(x.detach().contiguous(), codes, scale))
    y.backward(torch.randn(12, 4, 3).permute(2, 1, 0))
    empty = torch.randn(0, 20, requires_grad=True)
    int8_linear(empty, codes, scale).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 20)


def test_sums_longer_than_an_int32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    length = cpu.LONGEST_SUM + 5_000  # 127 * 127 * that does not fit
    codes = torch.full((8, length), 127, dtype=torch.int8)
    y = int8_linear(torch.ones(2, length), codes, torch.full((8,), 1 / 127))
    assert off(y, torch.full((2, 8), float(length)).double()) < 1e-6


def test_nothing_of_the_input_is_kept_for_the_backward_pass() -> None:
    codes, scale, _ = layer(12, 20)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        int8_linear(torch.randn(6, 20, requires_grad=True), codes, scale)
    assert {t.data_ptr() for t in kept} == {codes.data_ptr(), scale.data_ptr()}


def test_shared_inputs_are_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, _ = layer(12, 20)
    calls = []
    real = cpu.quantize_rows
    monkeypatch.setattr(cpu, "quantize_rows", lambda *args: calls.append(1) or real(*args))
    x = torch.randn(6, 20)
    first = int8_linear(x, codes, scale)
    assert torch.equal(first, int8_linear(x, codes, scale)) and len(calls) == 1
    x[0] += 1.0  # in place: the same tensor, other values
    assert not torch.equal(first, int8_linear(x, codes, scale)) and len(calls) == 2
    int8_linear(x.clone(), codes, scale)
    assert len(calls) == 3
    with torch.inference_mode():
        y = torch.ones(6, 20)
        before = int8_linear(y, codes, scale)
        y.mul_(2)
        assert torch.equal(int8_linear(y, codes, scale), before * 2)


def test_each_thread_has_its_own_last_activations() -> None:
    codes, scale, _ = layer(12, 20)
    x = torch.randn(6, 20)
    wanted = int8_linear(x, codes, scale)
    seen: list[bool] = []

    def other() -> None:
        seen.append(cpu._last.quantized is None)
        int8_linear(torch.zeros(6, 20), codes, scale)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [True] and torch.equal(int8_linear(x, codes, scale), wanted)


def test_other_schemes_and_computes_are_left_as_they_are() -> None:
    codes, scale = reference.quantize(torch.randn(12, 20), "fp8")
    x = torch.randn(6, 20)
    got = library.quantized_linear(x, codes, scale, None, scheme="fp8", block_size=64, compute="int8")
    assert torch.equal(got, reference.linear(x, codes, scale, None, "fp8", 64))


def test_autocast_sets_the_type() -> None:
    codes, scale, _ = layer(12, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert int8_linear(torch.randn(6, 20), codes, scale).dtype == torch.bfloat16
