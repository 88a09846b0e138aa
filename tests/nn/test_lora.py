"""One low-rank delta: its equation, its initial values, its dropout, its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finetuna_lightning.nn.dropout import drop, places
from finetuna_lightning.nn.lora import LoRAEmbedding, LoRALinear


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64).to(dtype)


def excited(delta: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(delta.parameters()):
            parameter.copy_(random(*parameter.shape, seed=index))
    return delta


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 16.0), (5, 3.5), (3, 0.0)])
def test_linear_equation(rank: int, alpha: float, bias: bool) -> None:
    delta = excited(LoRALinear(11, 7, rank, alpha, bias=bias))
    x = random(2, 3, 11)
    expected = x.double() @ delta.lora_A.double().t() @ delta.lora_B.double().t()
    expected = alpha / rank * (expected + (delta.lora_bias.double() if bias else 0))
    assert delta(x).shape == (2, 3, 7) and torch.allclose(delta(x).double(), expected, atol=1e-4, rtol=1e-5)
    assert (delta.lora_bias is not None) == bias and delta.scaling == alpha / rank
    assert {name for name, _ in delta.named_parameters()} == {"lora_A", "lora_B"} | ({"lora_bias"} if bias else set())


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 16.0), (5, 3.5)])
def test_embedding_equation(rank: int, alpha: float) -> None:
    delta = excited(LoRAEmbedding(13, 7, rank, alpha))
    ids = torch.tensor([[0, 12, 5], [5, 5, 1]])
    expected = alpha / rank * (delta.lora_embedding_B @ delta.lora_embedding_A[:, ids.reshape(-1)]).t().reshape(2, 3, 7)
    assert torch.allclose(delta(ids, torch.float32), expected, atol=1e-5)
    assert delta(ids, torch.bfloat16).dtype == torch.bfloat16
    assert delta.lora_embedding_A.shape == (rank, 13) and delta.lora_embedding_B.shape == (7, rank)


def test_a_new_delta_changes_nothing() -> None:
    assert not bool(LoRALinear(11, 7, 4, 16.0, bias=True, generator=stream())(random(5, 11)).any())
    assert not bool(LoRAEmbedding(13, 7, 4, 16.0, generator=stream())(torch.arange(13), torch.float32).any())


def test_initial_values_of_a_linear_delta() -> None:
    """Kaiming-uniform as ``nn.Linear``'s own: uniform within 1 / sqrt(in)."""
    delta = LoRALinear(400, 300, 50, 16.0, bias=True, generator=stream())
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < float(delta.lora_A.detach().abs().max()) <= bound
    assert math.isclose(float(delta.lora_A.detach().std()), bound / math.sqrt(3), rel_tol=0.02)
    assert abs(float(delta.lora_A.detach().mean())) < bound * 0.02
    assert not bool(delta.lora_B.any()) and delta.lora_bias is not None and not bool(delta.lora_bias.any())


def test_initial_values_of_an_embedding_delta() -> None:
    delta = LoRAEmbedding(300, 400, 50, 16.0, generator=stream())
    assert not bool(delta.lora_embedding_A.any())
    assert math.isclose(float(delta.lora_embedding_B.detach().std()), 1.0, rel_tol=0.02)
    assert abs(float(delta.lora_embedding_B.detach().mean())) < 0.02


def test_initial_values_come_from_the_generator_alone() -> None:
    def values(seed: int) -> tuple[Tensor, Tensor]:
        linear = LoRALinear(11, 7, 4, 16.0, generator=stream(seed)).lora_A
        return linear.detach(), LoRAEmbedding(11, 7, 4, 16.0, stream(seed)).lora_embedding_B.detach()

    first = values(1)
    before = torch.random.get_rng_state()
    torch.manual_seed(77)
    again = values(1)
    torch.random.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, values(2), strict=True))
    assert torch.equal(before, torch.random.get_rng_state())  # and the global stream does not move


def test_weights_are_float32_and_computed_in_the_activations_type() -> None:
    delta = excited(LoRALinear(11, 7, 4, 8.0, bias=True))
    x = random(3, 11, dtype=torch.bfloat16)
    y = delta(x)
    assert y.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in delta.parameters())
    assert torch.allclose(y.float(), delta(x.float()), atol=0.5, rtol=0.05)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_a_linear_delta(dropout: float) -> None:
    delta = excited(LoRALinear(5, 4, 3, 7.0, dropout=dropout, bias=True)).double()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in delta.named_parameters()]
        return torch.func.functional_call(delta, dict(zip(names, parameters, strict=True)), (x, 3))

    inputs = (random(2, 5, dtype=torch.float64), *(p.detach() for p in delta.parameters()))
    assert torch.autograd.gradcheck(function, tuple(t.clone().requires_grad_() for t in inputs))


def test_gradients_of_an_embedding_delta() -> None:
    delta = excited(LoRAEmbedding(6, 4, 3, 7.0)).double()
    ids = torch.tensor([[0, 5], [5, 2]])

    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(delta, {"lora_embedding_A": a, "lora_embedding_B": b}, (ids, torch.float64))

    inputs = tuple(p.detach().clone().requires_grad_() for p in delta.parameters())
    assert torch.autograd.gradcheck(function, inputs)


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_input_and_only_with_a_seed() -> None:
    delta = excited(LoRALinear(11, 7, 4, 8.0, dropout=0.5))
    plain = excited(LoRALinear(11, 7, 4, 8.0))
    x = random(3, 11)
    assert torch.equal(delta(x), plain(x)) and torch.equal(plain(x, 3), plain(x))
    assert torch.allclose(delta(x, 3), plain(2 * drop(x, 0.5, 3)), atol=1e-6)
    assert not torch.allclose(delta(x, 3), delta(x), atol=1e-2)
    at = places(torch.tensor([1, 2]))
    assert torch.allclose(delta(x, 3, at), plain(2 * drop(x, 0.5, 3, at)), atol=1e-6)
    assert not torch.allclose(delta(x, 3, at), delta(x, 3), atol=1e-2)


def test_dropout_leaves_the_mean_as_it_is() -> None:
    delta = LoRALinear(5000, 1, 1, 1.0, dropout=0.3)
    with torch.no_grad():
        delta.lora_A.fill_(1 / 5000)
        delta.lora_B.fill_(1)
        means = torch.stack([delta(torch.ones(50, 5000), seed).mean() for seed in range(10)])
    assert abs(float(means.mean()) - 1) < 0.002
