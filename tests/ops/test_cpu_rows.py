"""What stands between products on the CPU: values and gradients against plain torch in float64; many pieces are one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.ops import cpu_rows, reference
from tests.helpers import native as helper

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the norm: a few roundings of 24 and of 8 bits
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, params=helper.WAYS)
def poisoned_small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of a few rows, the last one short; what is not written is NaN."""
    helper.take(request.param, monkeypatch)
    monkeypatch.setattr(cpu_rows, "PIECE_ELEMENTS", 3 * 24)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    assert got.dtype == dtype and got.shape == wanted.shape
    return float((got.double() - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_read_out_as_the_reference_does(dtype: torch.dtype) -> None:
    codes, scale = reference.quantize(random(17, 24), "int8")
    out = cpu_rows.dequantize_rows_(codes, scale, torch.empty(17, 24, dtype=dtype))
    assert torch.equal(out, reference.dequantize(codes, scale, "int8", 64, dtype))


@dtypes
def test_rms_norm_and_its_gradient(dtype: torch.dtype) -> None:
    x, weight, grad = (part.to(dtype) for part in (random(10, 24), random(24, seed=1), random(10, 24, seed=2)))
    x.requires_grad_()
    y = cpu_rows.rms_norm(x, weight, 1e-5)
    (slope,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    wanted = F.rms_norm(wide, (24,), weight.double(), 1e-5)
    assert close(y.detach(), wanted.detach(), dtype)
    assert close(slope, torch.autograd.grad(wanted, wide, grad.double())[0], dtype)


@dtypes
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    both, grad = random(10, 48).to(dtype), random(10, 24, seed=1).to(dtype)
    wide = both.double().requires_grad_()
    wanted = F.silu(wide[:, :24]) * wide[:, 24:]
    (slope,) = torch.autograd.grad(wanted, wide, grad.double())
    assert close(cpu_rows.swiglu(both), wanted.detach(), dtype)
    got, again = cpu_rows.swiglu_backward_(grad, both)
    assert again is grad and torch.equal(again, cpu_rows.swiglu(both))
    assert close(got, slope, dtype)


@dtypes
def test_rotary_embedding_with_halves_that_differ(dtype: torch.dtype) -> None:
    x, cos, sin, grad = (random(*s, seed=i).to(dtype) for i, s in enumerate([(7, 3, 8), (7, 8), (7, 8), (7, 3, 8)]))
    wide = x.double().requires_grad_()
    turned = torch.cat([-wide[..., 4:], wide[..., :4]], -1)
    wanted = wide * cos.double()[:, None] + turned * sin.double()[:, None]
    (slope,) = torch.autograd.grad(wanted, wide, grad.double())
    assert close(cpu_rows.rotate_(x.clone(), cos, sin), wanted.detach(), dtype)
    assert close(cpu_rows.rotate_(grad.clone(), cos, sin, backward=True), slope, dtype)


def test_a_row_does_not_depend_on_its_company() -> None:
    x, grad, weight = (part.bfloat16() for part in (random(10, 24), random(10, 24, seed=1), random(24)))
    x.requires_grad_()
    alone = x.detach()[4:6].requires_grad_()
    y, own = cpu_rows.rms_norm(x, weight, 1e-5), cpu_rows.rms_norm(alone, weight, 1e-5)
    assert torch.equal(y[4:6], own)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0][4:6], torch.autograd.grad(own, alone, grad[4:6])[0])
