"""Every layer and adapter kind in float64: ``gradcheck``, and values and gradients are those of the equation in plain
torch, without which a wrong forward would pass with gradients that agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.backbone import quantize_model_
from finetuna_lightning.nn.dropout import drop
from finetuna_lightning.nn.lora import LoRAEmbedding, LoRALinear
from finetuna_lightning.nn.quantized import quantize_
from finetuna_lightning.ops.reference import dynamic_tree
from tests.helpers.models import excite

IN, OUT, BLOCK = 3, 5, 4  # 15 weights: blocks of 4 run over the ends of rows, and the last one is short
LINEARS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear-no-bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}
ROUTES = [
    ["low", "low", "low"],
    ["low", "high", "high"],
    ["high", "single", "low"],
    ["low", "elsewhere", "high"],  # which has no delta on this layer
    ["high", "low", "high"],
]
schemes = pytest.mark.parametrize("scheme", ["none", "int8", "int8-blockwise", "fp8"])
shapes = pytest.mark.parametrize("shape", [(3, 2, IN), (6, IN)], ids=["rows-tokens", "flattened"])
routes = pytest.mark.parametrize("names", ROUTES, ids="-".join)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def check(function: Callable[[], Tensor], equation: Callable[[], Any] | None, inputs: Sequence[Tensor]) -> None:
    """``function`` reads ``inputs``, which gradcheck changes in place."""
    out = function()
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, weights)
    assert all(tensor.dtype == torch.float64 for tensor in (out, *inputs))
    assert all(gradient.any() for gradient in gradients)  # zeros would agree with zeros
    if equation is not None:
        wanted = equation()
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, torch.autograd.grad(wanted, inputs, weights), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *_: function(), tuple(inputs))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def matrix(layer: Any) -> Any:
    """The weight as [out, in], or the table; of codes, by the formulas of ``ops.reference``."""
    if not hasattr(layer, "quantized"):
        return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    weight, codes, scale = layer.quantized, layer.quantized.codes, layer.quantized.scale.double()
    if weight.scheme == "int8-blockwise":
        values = torch.tensor(dynamic_tree(), dtype=torch.float64)[codes.long()]
        return values * scale.repeat_interleave(weight.block_size)[: codes.numel()].view(codes.shape)
    return (codes.view(torch.float8_e4m3fn) if weight.scheme == "fp8" else codes).double() * scale[:, None]


def delta(own: Any, x: Tensor) -> Any:
    """``alpha / r * (x A^T B^T + b)``, or ``A[:, ids]^T`` for x A^T; nothing where there is no delta."""
    if own is None:
        return 0
    if isinstance(own, LoRAEmbedding):
        return own.alpha / own.rank * (own.lora_embedding_A.t()[x] @ own.lora_embedding_B.t())
    return (
        own.alpha / own.rank * (x @ own.lora_A.t() @ own.lora_B.t() + (0 if own.lora_bias is None else own.lora_bias))
    )


def linear(layer: Any, x: Tensor, own: Any = None) -> Any:
    return x @ matrix(layer).t() + (0 if layer.bias is None else layer.bias) + delta(own, x)


def by_rows(names: Sequence[str], x: Tensor, row: Callable[[str, Tensor], Tensor]) -> Tensor:
    return torch.cat([row(name, part) for name, part in zip(names, x.chunk(len(names)), strict=True)])


def made(make: Callable[[], nn.Module], scheme: str) -> Any:
    layer: Any = make().double()
    before = matrix(layer).detach()
    if scheme != "none":
        quantize_(layer, scheme, BLOCK)
    assert (matrix(layer) - before).norm() < 0.1 * before.norm()
    return layer


@schemes
@pytest.mark.parametrize("kind", LINEARS)
@shapes
def test_linear_layers(shape: tuple[int, ...], kind: str, scheme: str) -> None:
    layer, x = made(LINEARS[kind], scheme), random(*shape)
    if layer.bias is not None:
        nn.init.normal_(layer.bias.requires_grad_())  # a Conv1D's is zero
    check(lambda: layer(x), lambda: linear(layer, x), [x] if layer.bias is None else [x, layer.bias])


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (1, 2.5), (3, 16.0)], ids=["rank-1", "rank-1-scaled", "rank-3"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no-dropout", "dropout"])
@shapes
def test_linear_delta(shape: tuple[int, ...], dropout: float, bias: bool, rank: int, alpha: float) -> None:
    layer, x = LoRALinear(IN, OUT, rank, alpha, dropout, bias).double(), random(*shape)
    excite(layer)
    keep = drop(torch.ones_like(x), dropout, seed=3) != 0
    assert keep.any() and bool(keep.all()) == (dropout == 0)
    check(
        lambda: layer(x, 3),
        lambda: delta(layer, x * keep / (1 - round(dropout * 65536) / 65536)),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 16.0)], ids=["rank-1", "rank-3"])
def test_embedding_delta_with_repeated_ids(rank: int, alpha: float) -> None:
    layer, ids = LoRAEmbedding(9, IN, rank, alpha).double(), torch.tensor([[3, 3, 0], [8, 3, 0]])
    excite(layer)
    check(lambda: layer(ids, torch.float64), lambda: delta(layer, ids), list(layer.parameters()))


def bank_of(layer: nn.Module, target: str = "layer", dropout: float = 0.0, plain: Sequence[str] = ()) -> AdapterBank:
    bank = AdapterBank(nn.ModuleDict({"layer": layer, "other": nn.Linear(IN, IN)}).double())
    for name, rank, alpha in (("single", 1, 1.0), ("low", 2, 3.0), ("high", 3, 16.0)):
        bank.add(name, rank=rank, alpha=alpha, bias=name == "high", dropout=dropout, targets=[target])
    bank.add("elsewhere", rank=2, targets=["other"])
    bank.add("own", targets=[], plain=plain)
    excite(bank.double())
    return bank


def call(bank: AdapterBank, names: Sequence[str], *args: Any, training: bool = False) -> Any:
    for adapter in bank.adapters():
        adapter.calls = 0  # the same dropout masks each time
    with bank.route(names, training=training):
        return bank.backbone.get_submodule("layer")(*args)


def trained(bank: AdapterBank, names: Sequence[str], path: str = "layer") -> list[Tensor]:
    """The parameters of the deltas at ``path``."""
    deltas = [bank.delta(name, path) for name in dict.fromkeys(names)]
    return [parameter for own in deltas if own is not None for parameter in own.parameters()]


@routes
@schemes
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@shapes
def test_routed_linear(shape: tuple[int, ...], kind: str, scheme: str, names: list[str]) -> None:
    layer, x = made(LINEARS[kind], scheme), random(*shape)
    bank = bank_of(layer)
    check(
        lambda: call(bank, names, x),
        lambda: by_rows(names, x, lambda name, part: linear(layer, part, bank.delta(name, "layer"))),
        [x, layer.bias.requires_grad_(), *trained(bank, names)],
    )


@routes
@shapes
def test_routed_dropout(shape: tuple[int, ...], names: list[str]) -> None:
    x, bank = random(*shape), bank_of(made(LINEARS["linear"], "int8"), dropout=0.4)
    assert not torch.equal(call(bank, names, x, training=True), call(bank, names, x))
    check(lambda: call(bank, names, x, training=True), None, [x, *trained(bank, names)])


IDS, MASK = torch.tensor([[3, 3, 0], [8, 3, 1], [0, 8, 8]]), torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0]])
# the layer, its arguments, the rows of the table that they name, the factor
EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], Tensor, float]] = {
    "plain": (lambda: nn.Embedding(9, IN, padding_idx=7), (IDS,), IDS, 1.0),
    "one-row-for-the-batch": (lambda: nn.Embedding(9, IN), (IDS[:1],), IDS[:1].expand(3, -1), 1.0),
    "gemma": (lambda: Gemma3TextScaledWordEmbedding(9, IN, 7, embed_scale=1.5), (IDS,), IDS, 1.5),
    "bart": (lambda: BartScaledWordEmbedding(9, IN, 7, embed_scale=3.0), (IDS,), IDS, 3.0),
    "opt": (lambda: OPTLearnedPositionalEmbedding(7, IN), (MASK,), MASK * MASK.cumsum(1) + 1, 1.0),
    "opt-position-ids": (lambda: OPTLearnedPositionalEmbedding(7, IN), (MASK, 0, IDS % 7), IDS % 7 + 2, 1.0),
}


@pytest.mark.parametrize("names", ROUTES[2:], ids="-".join)
@schemes
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_routed_embedding(kind: str, scheme: str, names: list[str]) -> None:
    make, args, at, factor = EMBEDDINGS[kind]
    layer = made(make, scheme)
    bank, table = bank_of(layer), matrix(layer)
    check(
        lambda: call(bank, names, *args),
        lambda: by_rows(names, at, lambda name, ids: factor * (table[ids] + delta(bank.delta(name, "layer"), ids))),
        trained(bank, names),
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(OUT, IN), nn.Linear(IN, OUT, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.tanh(self.embed(ids)))


@schemes
def test_tied_embedding_and_head(scheme: str) -> None:
    tied, names, ids = Tied().double(), ["low", "both", "low"], IDS % OUT
    quantize_model_(tied, scheme, BLOCK)
    assert scheme == "none" or tied.head.quantized is tied.embed.quantized
    bank, table = bank_of(tied, "embed"), matrix(tied.embed)
    excite(bank.add("both", rank=2, targets=["embed", "head"]).double())

    def row(name: str, part: Tensor) -> Any:
        hidden = torch.tanh(table[part] + delta(bank.delta(name, "layer.embed"), part))
        return hidden @ table.t() + delta(bank.delta(name, "layer.head"), hidden)

    inputs = trained(bank, names, "layer.embed") + trained(bank, names, "layer.head")
    check(lambda: call(bank, names, ids), lambda: by_rows(names, ids, row), inputs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.tanh(self.up(x)))


# the module, the layer that the other adapters change, the equation of the module or a copy
PLAIN: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any, Tensor, Any], Tensor]]] = {
    "linear": (LINEARS["linear"], "layer", linear),
    "conv1d": (LINEARS["conv1d"], "layer", linear),
    "norm": (lambda: nn.LayerNorm(IN), "other", lambda m, x, _: F.layer_norm(x, (IN,)) * m.weight + m.bias),
    "block": (Block, "layer.up", lambda m, x, own: x + linear(m.down, torch.tanh(linear(m.up, x, own)))),
}


@pytest.mark.parametrize("names", [["own", "own", "own"], ["own", "low", "high"], ["own", "low", "own"]], ids="-".join)
@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("kind", PLAIN)
@shapes
def test_private_copy(shape: tuple[int, ...], kind: str, scheme: str, names: list[str]) -> None:
    make, target, equation = PLAIN[kind]
    layer, x = quantize_model_(make().double(), scheme, BLOCK), random(*shape)
    bank = bank_of(layer, target, plain=["layer"])

    def row(name: str, part: Tensor) -> Tensor:
        return equation(bank.plain_copy(name, "layer") or layer, part, bank.delta(name, target))

    inputs = [x, *bank["own"].parameters(), *(trained(bank, names, target) if kind != "norm" else [])]
    check(lambda: call(bank, names, x), lambda: by_rows(names, x, row), inputs)


@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_new_private_copy_is_the_float64_module(kind: str, scheme: str) -> None:
    layer, x = quantize_model_(PLAIN[kind][0]().double(), scheme, BLOCK), random(6, IN)
    bank = AdapterBank(nn.ModuleDict({"layer": layer}))
    bank.add("own", targets=[], plain=["layer"])
    inputs = [x, *bank.parameters()]  # never cast
    check(lambda: call(bank, ["own"] * 3, x), None, inputs)
    torch.testing.assert_close(call(bank, ["own"] * 3, x), PLAIN[kind][2](layer, x, None), rtol=1e-12, atol=1e-12)
