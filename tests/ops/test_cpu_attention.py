"""Causal attention of short sequences on the CPU against torch's, in float64; a sequence does not depend on others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.ops import cpu_attention
from tests.helpers import native as helper

TOLERANCE = 0.01  # of the norm: scores, weights and results are rounded to 8 bits; torch's own is 0.003 to 0.005 off


@pytest.fixture(autouse=True, params=helper.WAYS)
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    helper.take(request.param, monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(batch: int, tokens: int, heads: int, few: int, size: int) -> list[Tensor]:
    """q, k, v as layers give them, [B, T, H, D] seen as [B, H, T, D], and the gradient of the result [B, T, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, count, size) for count in (heads, few, few, heads)]
    q, k, v, grad = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    return [*(part.transpose(1, 2).requires_grad_() for part in (q, k, v)), grad]


@pytest.mark.parametrize("shape", [(3, 17, 4, 4, 8), (2, 5, 6, 2, 16), (1, 1, 2, 1, 8), (2, 128, 2, 2, 64)])
@pytest.mark.parametrize("piece", [1, 1 << 21])
def test_values_and_gradients(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "PIECE_ELEMENTS", piece)
    q, k, v, grad = inputs(*shape)
    assert cpu_attention.takes(q, k, v)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    given = cpu_attention.attend(q, k, v, 0.3)
    slopes = zip(
        torch.autograd.grad(given, (q, k, v), grad), torch.autograd.grad(wanted, wide, grad.double()), strict=True
    )
    for got, right in [(given, wanted), *slopes]:
        assert got.shape == right.shape
        # a single token has a gradient of 0 over q and k
        assert float((got.detach().double() - right.detach()).norm()) <= TOLERANCE * float(right.detach().norm()) + 1e-3


def test_a_sequence_has_the_same_bits_alone_and_keeps_its_nan() -> None:
    q, k, v, grad = inputs(4, 33, 4, 2, 16)
    v.data[3, :, 20] = torch.nan
    alone = [part.detach()[1:2].requires_grad_() for part in (q, k, v)]
    whole, own = cpu_attention.attend(q, k, v, 0.25), cpu_attention.attend(*alone, 0.25)  # type: ignore[misc]
    assert torch.equal(whole[1:2], own) and bool(whole[:3].isfinite().all())
    slopes = torch.autograd.grad(whole, (q, k, v), grad), torch.autograd.grad(own, alone, grad[1:2])
    assert all(torch.equal(one[1:2], other) for one, other in zip(*slopes, strict=True))
    assert all(bool(part[:3].isfinite().all()) for part in slopes[0])


def test_what_it_is_not_for() -> None:
    q, k, v, _ = inputs(1, 4, 2, 2, 8)
    assert not cpu_attention.takes(q.float(), k.float(), v.float())
    assert not cpu_attention.takes(q, k[:, :, :2], v[:, :, :2])
    long = torch.zeros(1, 1, cpu_attention.LONGEST + 1, 8, dtype=torch.bfloat16)
    assert not cpu_attention.takes(long, long, long)
