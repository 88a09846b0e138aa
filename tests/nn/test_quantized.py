"""Frozen 8-bit layers: no cast reaches the codes, tied layers share one storage, subclasses keep their own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from finetuna_lightning.nn import joint
from finetuna_lightning.nn.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    dequantize_,
    is_conv1d,
    quantizable,
    quantize_,
    quantize_embedding_,
    quantize_linear_,
)

SCHEMES = ("int8", "int8-blockwise", "fp8")


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def state(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return weight.codes.clone(), weight.scale.clone()


# ---- casts and moves ------------------------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to(dtype)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "there and back": (lambda m: m.half().float(), torch.float32),
    "to(device)": (lambda m: m.to("cpu"), torch.float32),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_no_cast_touches_codes_or_scales(kind: Callable[..., nn.Module], cast: str, scheme: str) -> None:
    layer: Any = quantize_(kind(53, 37), scheme)
    codes, scale = state(layer.quantized)
    mark, shared = layer.quantized.fingerprint(), layer.quantized
    change, dtype = CASTS[cast]
    change(nn.Sequential(layer))
    assert layer.quantized is shared and layer.quantized.fingerprint() == mark
    assert layer.quantized.codes.dtype == codes.dtype and torch.equal(layer.quantized.codes, codes)
    assert layer.quantized.scale.dtype == torch.float32 and torch.equal(layer.quantized.scale, scale)
    assert layer.quantized.dtype == layer.weight.dtype == dtype
    x = torch.randn(2, 53, dtype=dtype) if kind is nn.Linear else torch.tensor([1, 2])
    assert layer(x).dtype == dtype
    if kind is nn.Linear:
        assert layer.bias.dtype == dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_move_and_a_cast_at_once_moves_the_bytes(scheme: str) -> None:
    layer: Any = quantize_(nn.Linear(8, 8), scheme)
    layer.to("meta", torch.bfloat16)
    weight = layer.quantized
    assert weight.codes.device.type == weight.scale.device.type == "meta" and weight.dtype == torch.bfloat16
    assert weight.scale.dtype == torch.float32 and weight.codes.itemsize == 1


def tied() -> Any:
    model: Any = nn.Module()
    model.embed, model.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
    shared = QuantizedWeight.from_weight(model.embed.weight, "int8")
    quantize_embedding_(model.embed, shared)
    quantize_linear_(model.head, shared)
    return model


@pytest.mark.parametrize(
    "change",
    [lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.half().float(), copy.deepcopy, lambda m: m.to("meta")],
)
def test_tied_layers_share_one_storage(change: Callable[[Any], Any]) -> None:
    model = change(tied())
    assert model.embed.quantized is model.head.quantized
    tensors = list(model.buffers())
    assert len(tensors) == 2 and not list(model.parameters())
    assert sum(t.numel() for t in tensors) == 50 * 24 + 50


def test_a_move_leaves_nothing_behind() -> None:
    """Where it was, scales put together for one product would keep their memory."""
    pair = [QuantizedWeight.from_weight(torch.randn(4, 16), "int8") for _ in range(2)]
    together = joint._scales(pair)
    assert torch.equal(together, torch.cat([weight.scale for weight in pair])) and joint._scales(pair) is together
    pair[0].to("meta")
    assert pair[0].joined_scales is None


def test_a_deep_copy_has_its_own_storage() -> None:
    model = tied()
    twin = copy.deepcopy(model)
    twin.head.quantized.codes.zero_()
    assert bool(model.head.quantized.codes.any()) and not bool(twin.embed.quantized.codes.any())


def test_one_and_the_same_table_serves_lookup_and_product() -> None:
    model = tied()
    table = model.embed.weight
    assert torch.equal(model.embed(torch.tensor([3, 0])), table[torch.tensor([3, 0])])
    x = torch.randn(2, 24)
    assert torch.allclose(model.head(x), x @ table.t(), atol=1e-6)


def test_nothing_of_the_backbone_is_in_a_state_dict() -> None:
    assert set(quantize_(nn.Linear(4, 4), "int8").state_dict()) == {"bias"}
    assert not tied().state_dict()


def test_an_empty_weight_has_a_shape_and_no_bytes() -> None:
    weight = QuantizedWeight.empty((50, 24), "int8-blockwise", 64, torch.bfloat16)
    assert (
        weight.shape == (50, 24)
        and weight.codes.is_meta
        and weight.scale.shape == (19,)
        and weight.dtype == torch.bfloat16
    )


# ---- the fingerprint of a matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_changed_code_scale_scheme_or_shape_changes_the_fingerprint(scheme: str) -> None:
    weight = QuantizedWeight.from_weight(torch.randn(8, 16), scheme)
    marks = [weight.fingerprint()]
    weight.codes[3, 4] += 1
    marks.append(weight.fingerprint())
    weight.scale[-1] *= 1 + 2**-20
    marks.append(weight.fingerprint())
    other = {"int8": "fp8", "fp8": "int8", "int8-blockwise": "fp8"}[scheme]
    marks.append(QuantizedWeight(weight.codes, weight.scale, other, 64, weight.dtype).fingerprint())
    marks.append(QuantizedWeight(weight.codes.view(16, 8), weight.scale, scheme, 64, weight.dtype).fingerprint())
    marks.append(QuantizedWeight(weight.codes, weight.scale, scheme, 128, weight.dtype).fingerprint())
    assert len(set(marks)) == len(marks) and all(len(mark) == 16 for mark in marks)


# ---- layer.weight ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_the_weight_is_read_out_only_when_used(kind: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = quantize_(kind(53, 37), "int8")
    calls: list[int] = []
    inner = QuantizedWeight.dequantize
    monkeypatch.setattr(QuantizedWeight, "dequantize", lambda self, *a: calls.append(1) or inner(self, *a))
    weight = layer.weight
    assert weight.shape == ((37, 53) if kind is nn.Linear else (53, 37))
    assert (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.numel() == 37 * 53
    )
    assert not weight.requires_grad and "8-bit" in repr(weight) and isinstance(weight, Tensor)
    layer(torch.randn(1, 53) if kind is nn.Linear else torch.tensor([0]))
    assert not calls
    assert torch.equal(weight + 0, inner(layer.quantized)) and calls == [1]
    x = torch.randn(2, weight.shape[1])
    assert torch.allclose(F.linear(x, weight), x @ inner(layer.quantized).t(), atol=1e-5)
    assert type(weight + 0) is Tensor


# ---- the layers and what they were ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_that_of_its_codes(scheme: str, bias: bool) -> None:
    layer: Any = nn.Linear(53, 37, bias=bias)
    before = layer.bias
    same = quantize_(layer, scheme)
    assert same is layer and type(layer) is QuantizedLinear
    assert (layer.in_features, layer.out_features) == (53, 37) and not layer.conv1d
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])
    x = torch.randn(4, 53)
    expected = F.linear(x, layer.quantized.dequantize(), before)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert bias is False or not layer.bias.requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv1d_keeps_its_meaning(scheme: str) -> None:
    layer: Any = Conv1D(37, 53)  # 53 in, 37 out, weight [in, out]
    nn.init.normal_(layer.bias)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert is_conv1d(layer) and quantizable(layer)
    quantize_(layer, scheme)
    assert type(layer) is QuantizedLinear and layer.conv1d and not is_conv1d(layer) and not quantizable(layer)
    assert layer.quantized.shape == (37, 53) and (layer.in_features, layer.out_features) == (53, 37)
    x = torch.randn(2, 3, 53)
    assert torch.allclose(layer(x), x @ layer.quantized.dequantize().t() + bias, atol=1e-5)
    assert (layer(x) - (x @ weight + bias)).norm() / (x @ weight).norm() < 0.05


class NoForward(nn.Linear):
    """A subclass that computes what its parent does."""


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class InputNorm(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / (1 + input.norm()))


def test_linear_subclasses_with_the_plain_forward_are_taken() -> None:
    for kind in (NoForward, FalconLinear):
        layer: Any = kind(8, 6)
        x, weight, bias = torch.randn(2, 8), layer.weight.detach(), layer.bias
        quantize_(layer, "int8")
        assert type(layer) is QuantizedLinear
        assert torch.allclose(layer(x), F.linear(x, weight, bias), atol=0.05)


@pytest.mark.parametrize("kind", [Scaled, InputNorm])
def test_linear_subclasses_with_a_forward_of_their_own_are_refused(kind: type[nn.Linear]) -> None:
    layer = kind(8, 6)
    before = layer.weight
    with pytest.raises(TypeError, match=f"{kind.__name__} is a linear layer with a forward of its own"):
        quantize_(layer, "int8")
    assert type(layer) is kind and layer.weight is before


def scaled_gemma() -> nn.Embedding:
    return Gemma3TextScaledWordEmbedding(50, 24, 0, embed_scale=4.9)


def scaled_bart() -> nn.Embedding:
    return BartScaledWordEmbedding(50, 24, 0, embed_scale=3.0)


def plain_embedding() -> nn.Embedding:
    return nn.Embedding(50, 24, padding_idx=0)


def offset_opt() -> nn.Embedding:
    return OPTLearnedPositionalEmbedding(48, 24)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [plain_embedding, scaled_gemma, scaled_bart, offset_opt])
def test_embeddings_keep_their_scale_and_offset(make: Callable[[], nn.Embedding], scheme: str) -> None:
    layer = make()
    twin = copy.deepcopy(layer)
    original = type(layer)
    quantize_embedding_(layer, QuantizedWeight.from_weight(layer.weight, scheme))
    assert isinstance(layer, original) and isinstance(layer, QuantizedEmbedding) and not quantizable(layer)
    assert not list(layer.parameters()) and layer.padding_idx == twin.padding_idx
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
    inputs = (torch.tensor([[1, 1, 1], [0, 1, 1]]), 0) if make is offset_opt else (torch.tensor([[0, 7], [49, 7]]),)
    assert torch.allclose(layer(*inputs), twin(*inputs), atol=1e-6)
    layer.bfloat16()
    assert layer(*inputs).dtype == torch.bfloat16


def test_one_class_serves_every_layer_of_a_kind() -> None:
    first, second = quantize_(scaled_gemma(), "int8"), quantize_(scaled_gemma(), "int8")
    assert type(first) is type(second) and "Gemma3TextScaledWordEmbedding" in type(first).__name__


def test_what_is_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert not quantizable(attention.out_proj)
    assert not quantizable(nn.Embedding(4, 4, max_norm=1.0))
    assert not quantizable(nn.Conv1d(4, 4, 1)) and not quantizable(nn.LayerNorm(4))
    assert not quantizable(quantize_(nn.Linear(4, 4), "int8"))
    assert quantizable(nn.Linear(4, 4)) and quantizable(nn.Embedding(4, 4)) and quantizable(Conv1D(4, 4))


def test_reset_parameters_does_nothing() -> None:
    for layer in (quantize_(nn.Linear(4, 4), "int8"), quantize_(nn.Embedding(4, 4), "int8")):
        mark = layer.quantized.fingerprint()  # type: ignore[union-attr, operator]
        layer.reset_parameters()  # type: ignore[operator]
        assert layer.quantized.fingerprint() == mark  # type: ignore[union-attr, operator]


def test_layers_made_directly() -> None:
    weight = QuantizedWeight.from_weight(torch.randn(6, 4), "int8")
    bias, x = torch.randn(6), torch.randn(3, 4)
    linear = QuantizedLinear(weight, bias)
    assert torch.allclose(linear(x), F.linear(x, weight.dequantize(), bias), atol=1e-6) and not linear.conv1d
    assert QuantizedLinear(weight, conv1d=True).conv1d and QuantizedLinear(weight).bias is None
    assert str(linear).startswith("QuantizedLinear(\n  in_features=4, out_features=6, bias=True")
    embedding = QuantizedEmbedding(weight, padding_idx=1)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (6, 4, 1)
    assert torch.equal(embedding(torch.tensor([5, 0])), weight.dequantize()[[5, 0]])
    assert str(embedding).startswith("QuantizedEmbedding(\n  6, 4, padding_idx=1") and "6x4, int8" in str(embedding)
    assert linear.quantized is embedding.quantized and linear.quantized.half() is weight


def test_layers_without_storage_can_be_filled_later() -> None:
    """On the meta device no forward can be tried, and none is."""
    with torch.device("meta"):
        layers = [nn.Linear(4, 6), FalconLinear(4, 6), Scaled(4, 6)]
    for layer in layers:
        weight = QuantizedWeight.from_weight(torch.randn(6, 4), "int8")
        assert type(quantize_linear_(layer, weight)) is QuantizedLinear


# ---- and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(24, 50), plain_embedding, scaled_gemma, scaled_bart, offset_opt, lambda: Conv1D(50, 24)]
)
def test_dequantize_is_the_way_back(make: Callable[[], nn.Module], scheme: str) -> None:
    layer: Any = make()
    original = nn.Linear if is_conv1d(layer) else type(layer)
    quantize_(layer, scheme)
    values = layer.quantized.dequantize()
    inputs: tuple[Any, ...] = (torch.tensor([[1, 1]]),)
    if not isinstance(layer, nn.Embedding):
        inputs = (torch.randn(2, 24),)
    elif original is OPTLearnedPositionalEmbedding:
        inputs = (*inputs, 0)
    before = layer(*inputs)
    assert dequantize_(layer) is layer and type(layer) is original
    assert (
        torch.equal(layer.weight, values) and isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    )
    assert "quantized" not in layer._modules and torch.allclose(layer(*inputs), before, atol=1e-5)


def test_dequantize_to_a_type_and_of_other_modules() -> None:
    layer: Any = dequantize_(quantize_(nn.Linear(4, 4), "int8"), torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    norm = nn.LayerNorm(4)
    assert dequantize_(norm) is norm and type(norm) is nn.LayerNorm


def test_quantising_twice_returns_the_same_values() -> None:
    layer: Any = quantize_(nn.Linear(24, 50), "int8")
    mark = layer.quantized.fingerprint()
    assert quantize_(dequantize_(layer), "int8").quantized.fingerprint() == mark  # type: ignore[union-attr, operator]
