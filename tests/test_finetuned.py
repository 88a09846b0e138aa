"""The finetuna API: several fine-tuned models over one base."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bitsandbytes.optim import AdamW8bit, Lion8bit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import finetuna_lightning as ft
from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.backbone import quantized_layers
from finetuna_lightning.errors import CheckpointError, ConfigError, RouteError, TargetError
from finetuna_lightning.finetuned import adapter_of
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear
from tests.helpers.models import (
    ARCHITECTURES,
    LABELS,
    VOCAB_SIZE,
    PlainNet,
    excite,
    logits_of,
    plain_net,
    tiny_inputs,
    tiny_model,
)

KINDS = [*ARCHITECTURES, "plain"]


def make(kind: str = "llama", **more: Any) -> nn.Module:
    return plain_net() if kind == "plain" else tiny_model(kind, scale=3.0, **more)


def inputs(kind: str = "llama", seed: int = 0) -> dict[str, Tensor]:
    return tiny_inputs("llama" if kind == "plain" else kind, rows=3, length=8, seed=seed)


def logits(model: nn.Module, kind: str = "llama") -> Tensor:
    with torch.no_grad():
        return logits_of(model, inputs(kind))


def train(model: nn.Module, kind: str = "llama", steps: int = 3, optimizer: Any = torch.optim.AdamW) -> list[float]:
    """Fit random classes; the losses."""
    steps_of, losses = optimizer(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        steps_of.zero_grad()
        out = logits_of(model, inputs(kind))
        goal = torch.randint(out.shape[-1], out.shape[:-1], generator=torch.Generator().manual_seed(1))
        loss = F.cross_entropy(out.reshape(-1, out.shape[-1]), goal.reshape(-1))
        model.backward(loss)  # type: ignore[operator]
        steps_of.step()
        losses.append(float(loss.detach()))
    return losses


def own_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# ---- one storage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "plain"])
def test_every_frozen_tensor_is_the_base_s(kind: str, count: int) -> None:
    base = ft.prepare_base_model(make(kind))
    alone = ft.get_model_mem_consumption(base)
    models = [ft.new_finetuned(base) for _ in range(count)]
    theirs = dict([*base.named_parameters(), *base.named_buffers()])
    for model in models:
        mine = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if not t.requires_grad}
        assert mine.keys() == theirs.keys()
        assert all(tensor.data_ptr() == theirs[name].data_ptr() for name, tensor in mine.items())
    assert ft.get_model_mem_consumption(base, *models) == alone + sum(map(own_bytes, models))
    assert own_bytes(models[0]) > 0


@pytest.mark.filterwarnings("ignore:.*got no gradient")  # T5's shared table, which is called by other names
@pytest.mark.parametrize("kind", KINDS)
def test_training_one_changes_no_other(kind: str) -> None:
    base = ft.prepare_base_model(make(kind))
    first, second = ft.new_finetuned(base), ft.new_finetuned(base, plain_layers=())
    excite(adapter_of(second))
    before, others = logits(base, kind), logits(second, kind)
    assert torch.equal(logits(first, kind), before) and not torch.equal(others, before)
    state = {name: tensor.clone() for name, tensor in (*base.named_parameters(), *base.named_buffers())}
    first.train()
    train(first, kind)
    assert not torch.equal(logits(first.eval(), kind), before)
    assert torch.equal(logits(base, kind), before) and torch.equal(logits(second, kind), others)
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        assert torch.equal(tensor, state[name]), name


def test_running_statistics_of_the_base_stay() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    base = ft.prepare_base_model(net().eval())
    model: Any = ft.new_finetuned(base, modules_not_to_freeze=["3"]).train()
    assert len(model) == 5 and model[-1] is model[4]
    for _ in range(2):
        model(torch.randn(5, 6))
    assert torch.equal(base.get_buffer("1.running_mean"), torch.zeros(8))
    assert torch.equal(base.get_buffer("3.running_mean"), torch.zeros(8))
    assert not torch.equal(model.get_buffer("finetuna_adapters.finetuned.plain.3.running_mean"), torch.zeros(8))


def test_parameters_are_what_it_trains() -> None:
    base = make()
    model = ft.new_finetuned(base, adapt_layers=["q_proj"], plain_layers=["norm"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(name.startswith("finetuna_adapters.") for name in names)
    assert {id(p) for p in model.parameters()} == {id(p) for n, p in model.named_parameters() if n in names}
    assert not any(p.requires_grad for p in base.parameters())
    assert model.dtype == base.dtype and model.device == base.device
    model.requires_grad_(False)
    assert not list(model.parameters()) and model.device == base.device
    model.requires_grad_(True)
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_that_is_let_go_is_gone() -> None:
    base = ft.prepare_base_model(make())
    model = ft.new_finetuned(base)
    gone = [weakref.ref(p) for p in model.parameters()]
    copied = copy.deepcopy(model)
    gone += [weakref.ref(p) for p in copied.parameters()]
    del model, copied
    assert not any(ref() is not None for ref in gone)


# ---- any order, nested, threads -------------------------------------------------------------------------------------


def pair(kind: str = "llama") -> tuple[nn.Module, nn.Module, nn.Module]:
    base = ft.prepare_base_model(make(kind))
    first, second = ft.new_finetuned(base, seed=1), ft.new_finetuned(base, ["q_proj"], plain_layers=(), seed=2)
    excite(adapter_of(first), 1)
    excite(adapter_of(second), 2)
    return base, first, second


def test_nested_in_one_another_s_forward() -> None:
    base, first, second = pair()
    wanted = [logits(model) for model in (base, first, second)]
    inner: list[Tensor] = []
    for layer in (first.model.layers[0].mlp, first.lm_head):  # type: ignore[union-attr, index]
        layer.register_forward_hook(lambda *_: inner.extend([logits(second), logits(base)]))  # type: ignore[union-attr]
    assert torch.equal(logits(first), wanted[1])
    assert len(inner) == 4
    for index, found in enumerate(inner):
        assert torch.equal(found, wanted[2 - 2 * (index % 2)])


def test_two_threads() -> None:
    """Both train at once, as they do one after the other."""
    alone: list[dict[str, Tensor]] = []
    for model in pair()[1:]:
        train(model, steps=10)
        alone.append(ft.state_dict(model))
    models = pair()[1:]
    threads = [threading.Thread(target=train, args=(model,), kwargs={"steps": 10}) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, wanted in zip(models, alone, strict=True):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ft.state_dict(model).items())


def test_a_route_does_not_reach_a_stand_alone_model() -> None:
    base, first, _ = pair()
    wanted = logits(first)
    bank = AdapterBank(base)
    excite(bank.add("one", targets=["q_proj"]))
    with bank.route(["one"] * 3):
        assert torch.equal(logits(first), wanted)
        assert not torch.equal(logits(base), wanted)
    with pytest.raises(RouteError, match="takes no route"), first.finetuna_adapters.bare():  # type: ignore[union-attr]
        pass


# ---- names and configurations ---------------------------------------------------------------------------------------


def ranks(model: nn.Module) -> dict[str, int]:
    return {key.replace("/", "."): delta.rank for key, delta in adapter_of(model).deltas.items()}  # type: ignore[misc]


def test_by_default_every_layer_but_the_head_is_adapted() -> None:
    model = ft.new_finetuned(make())
    adapted = {path.rsplit(".", 1)[-1] for path in ranks(model)}
    assert adapted == {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert list(adapter_of(model).plain) == ["lm_head"]
    assert set(ranks(model).values()) == {4}
    net = ft.new_finetuned(plain_net())  # no lm_head; a head of fewer outputs than the rank
    assert set(ranks(net)) == {"table", "block.0", "block.2", "first", "second", "head"}
    delta: Any = adapter_of(net).deltas["head"]
    assert delta.scaling == 0.25 and delta.lora_bias is not None and delta.lora_B.shape == (LABELS, 4)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["q_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["layers.1.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        (["model.layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj"}),
        ([r".*\.0\..*\.[qk]_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}),
        ({"embed_tokens"}, {"model.embed_tokens"}),
    ],
)
def test_names(names: Any, found: set[str]) -> None:
    assert set(ranks(ft.new_finetuned(make(), adapt_layers=names))) == found


def test_configurations_by_name() -> None:
    model = ft.new_finetuned(
        make(),
        adapt_layers=["q_proj", "v_proj", "embed_tokens"],
        linear_config={
            "q_proj": ft.LinearAdapterConfig(r=2, alpha=8, dropout=0.5),
            "layers.1.self_attn.q_proj": ft.LinearAdapterConfig(r=6),
            "v_proj": ft.LinearAdapterConfig(r=3, bias=False),
        },
        embedding_config=ft.EmbeddingAdapterConfig(r=5, alpha=2),
        plain_layers=(),
    )
    q, v = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
    assert ranks(model) == {
        "model.embed_tokens": 5, q.format(0): 2, v.format(0): 3, q.format(1): 6, v.format(1): 3,
    }  # fmt: skip
    deltas: Any = adapter_of(model).deltas
    first, other = deltas[q.format(0).replace(".", "/")], deltas[v.format(0).replace(".", "/")]
    assert (first.scaling, first.dropout, first.lora_bias is None) == (4.0, 0.5, False)
    assert other.lora_bias is None and deltas["model/embed_tokens"].scaling == 0.4


def test_the_signature_is_the_original_s() -> None:
    names = "model adapt_layers plain_layers embedding_config linear_config modules_not_to_quantize"
    names += " modules_not_to_freeze do_not_quantize"
    assert list(inspect.signature(ft.new_finetuned).parameters)[:8] == names.split()
    for function in (ft.new_finetuned, ft.prepare_base_model):
        for parameter in inspect.signature(function).parameters.values():
            assert not isinstance(parameter.default, set | list | dict), parameter  # shared between calls
    assert ft.LinearAdapterConfig() == ft.LinearAdapterConfig(r=4, alpha=1, dropout=0.0, bias=True)
    assert ft.EmbeddingAdapterConfig() == ft.EmbeddingAdapterConfig(r=4, alpha=1)


def test_arguments_are_left_as_they_were_given() -> None:
    plain, kept, thawed = {"lm_head"}, {"up_proj"}, {"norm"}
    ft.new_finetuned(make(), {"q_proj"}, plain, None, None, kept, thawed)
    assert (plain, kept, thawed) == ({"lm_head"}, {"up_proj"}, {"norm"})
    base = make()
    ft.new_finetuned(base, modules_not_to_quantize={"up_proj"})
    other = make()
    ft.new_finetuned(other)
    assert isinstance(other.get_submodule("model.layers.0.mlp.up_proj"), QuantizedLinear)


def test_adaptable_modules() -> None:
    base = ft.prepare_base_model(make())
    everything = ft.get_lora_adaptable_modules(base)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert everything == layers | {"embed_tokens", "lm_head"}
    assert everything == ft.get_lora_adaptable_modules(make())
    assert ft.get_lora_adaptable_modules(base, ["q_proj", r".*mlp\..*"]) == {
        "q_proj",
        "up_proj",
        "down_proj",
        "gate_proj",
    }
    assert ft.get_lora_adaptable_modules(base, [nn.Embedding, "q_proj"]) == {"embed_tokens", "q_proj"}
    assert ft.get_lora_adaptable_modules(plain_net()) == {"table", "block.0", "block.2", "first", "second", "head"}
    first = ft.get_lora_adaptable_modules(base, [r".*layers\.0\.mlp.*"])  # a last component would name more
    assert first == {f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")}
    with pytest.raises(TargetError, match="did you mean 'q_proj'"):
        ft.get_lora_adaptable_modules(base, ["q_porj"])


# ---- what is quantised, frozen, private -----------------------------------------------------------------------------


def quantized(model: nn.Module) -> set[str]:
    kinds = QuantizedLinear | QuantizedEmbedding
    return {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if isinstance(module, kinds)}


def test_prepare_base_model() -> None:
    model = make()
    assert ft.prepare_base_model(model) is model
    assert quantized(model) == ft.get_lora_adaptable_modules(model) - {"lm_head"}
    assert not any(p.requires_grad for p in model.parameters())
    before = logits(model)
    assert torch.equal(logits(ft.prepare_base_model(model)), before)
    assert "lm_head" in quantized(ft.prepare_base_model(make(), modules_not_to_quantize=()))
    assert quantized(ft.prepare_base_model(make(), {"mlp", "lm_head"})).isdisjoint({"up_proj", "lm_head"})
    with pytest.raises(TargetError, match="did you mean"):
        ft.prepare_base_model(make(), {"lm_haed"})


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8"])
def test_every_scheme(scheme: str) -> None:
    base = ft.prepare_base_model(make(), scheme=scheme)
    model = ft.new_finetuned(base)
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.quantized.scheme == scheme
    losses = train(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("prepared", [True, False])
def test_do_not_quantize_at_every_depth(prepared: bool) -> None:
    base = make()
    if prepared:
        ft.prepare_base_model(base, do_not_quantize=True)
        first = ft.new_finetuned(base)
    else:
        first = ft.new_finetuned(base, do_not_quantize=True)
    second = ft.new_finetuned(base)  # over the base as it was prepared
    for model in (base, first, second):
        assert not quantized(model)
        assert not any(module.__class__.__name__ == "QuantizedWeight" for module in model.modules())
    assert torch.equal(logits(first), logits(make()))


def test_layers_that_stay_in_their_own_type() -> None:
    model = ft.new_finetuned(
        make(), adapt_layers=["up_proj", "q_proj"], plain_layers=["o_proj"], modules_not_to_quantize=["up_proj"],
        modules_not_to_freeze=["norm"],
    )  # fmt: skip
    assert {"up_proj", "o_proj"}.isdisjoint(quantized(model)) and {"q_proj", "lm_head"} <= quantized(model)
    assert {path.rsplit(".", 1)[-1] for path in ranks(model)} == {"up_proj", "q_proj"}
    assert {key.rsplit("/", 1)[-1] for key in adapter_of(model).plain} == {"o_proj", "norm"}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert "model.layers.0.mlp.up_proj.weight" in frozen and "model.norm.weight" in frozen
    train(model)
    assert all(p.grad is not None for p in model.parameters())


def test_plain_layers_are_private_copies() -> None:
    base = ft.prepare_base_model(make())
    models = [ft.new_finetuned(base, adapt_layers=["q_proj"]) for _ in range(2)]
    weights = [adapter_of(model).plain["lm_head"].get_parameter("weight") for model in models]
    head = base.get_parameter("lm_head.weight")
    assert all(torch.equal(weight, head) and weight.data_ptr() != head.data_ptr() for weight in weights)
    train(models[0])
    assert not torch.equal(weights[0], head) and torch.equal(weights[1], head)


TWO = ft.LinearAdapterConfig(r=2, bias=False)
LINEAR = ft.LinearAdapterConfig()
EDGES: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "adapted and plain": (lambda b: ft.new_finetuned(b, ["q_proj", "lm_head"]), TargetError, "'lm_head' is both"),
    "adapted in what is plain": (
        lambda b: ft.new_finetuned(make(), ["q_proj"], ["self_attn"]), TargetError, "q_proj' is both in adapt_layers"
    ),
    "adapted and not to freeze": (
        lambda b: ft.new_finetuned(make(), ["q_proj"], modules_not_to_freeze=["q_proj"]), TargetError, "is both"
    ),
    "plain but quantised": (lambda b: ft.new_finetuned(b, plain_layers=["up_proj"]), ConfigError, "quantised already"),
    "plain around quantised": (lambda b: ft.new_finetuned(b, plain_layers=["mlp"]), ConfigError, "quantised already"),
    "not to quantise but quantised": (
        lambda b: ft.new_finetuned(b, modules_not_to_quantize=["up_proj"]), ConfigError, "quantised already"
    ),
    "thawed but quantised": (
        lambda b: ft.new_finetuned(b, ["q_proj"], modules_not_to_freeze=["up_proj"]), ConfigError, "quantised already"
    ),
    "prepared again, otherwise": (lambda b: ft.prepare_base_model(b, ["up_proj"]), ConfigError, "quantised already"),
    "a name left out": (
        lambda b: ft.new_finetuned(b, ["q_proj", "v_proj"], linear_config={"q_proj": ft.LinearAdapterConfig()}),
        ValueError, r"linear_config has no entry for 'model\.layers\.0\.self_attn\.v_proj'",
    ),
    "an embedding left out": (
        lambda b: ft.new_finetuned(b, ["embed_tokens"], embedding_config={}),
        ValueError, "has no entry for 'model.embed",
    ),
    "a name too many": (
        lambda b: ft.new_finetuned(b, ["q_proj"], linear_config=dict.fromkeys(["q_proj", "o_proj"], LINEAR)),
        TargetError, "'o_proj' names no adapted layer",
    ),
    "the wrong configuration": (
        lambda b: ft.new_finetuned(b, ["q_proj"], linear_config=ft.EmbeddingAdapterConfig()),
        ConfigError, "must be a LinearAdapterConfig",
    ),
    "no such layer": (lambda b: ft.new_finetuned(b, ["q_porj"]), TargetError, "did you mean 'q_proj'"),
    "no such plain layer": (lambda b: ft.new_finetuned(b, ["q_proj"], ["lm_haed"]), TargetError, "mean 'lm_head'"),
    "no regular expression": (lambda b: ft.new_finetuned(b, ["q_proj("]), TargetError, "regular expression"),
    "no name": (lambda b: ft.new_finetuned(b, [3]), TargetError, "must be names"),  # type: ignore[list-item]
    "rank": (lambda b: ft.LinearAdapterConfig(r=0), ConfigError, "r must be an integer >= 1, not 0"),
    "alpha": (lambda b: ft.EmbeddingAdapterConfig(alpha=0), ConfigError, "alpha must be a number > 0"),
    "dropout": (lambda b: ft.LinearAdapterConfig(dropout=1.0), ConfigError, "dropout must be a number >= 0 and < 1"),
    "no such scheme": (lambda b: ft.prepare_base_model(make(), scheme="int4"), ConfigError, "did you mean 'int8'"),
    "another scheme": (lambda b: ft.prepare_base_model(b, scheme="fp8"), ConfigError, "quantised already, to int8"),
    "nothing to train": (lambda b: ft.new_finetuned(b, (), ()), TargetError, "nothing to train"),
    "twice": (lambda b: ft.new_finetuned(ft.new_finetuned(b)), ConfigError, "give the base that it was made from"),
    "nothing to adapt": (lambda b: ft.new_finetuned(nn.Sequential(nn.ReLU())), TargetError, "to adapt"),
    "the layer itself": (lambda b: ft.new_finetuned(nn.Linear(4, 4)), TargetError, "to adapt"),
    "state of a base": (ft.state_dict, ConfigError, "not made by new_finetuned"),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_edge_rules(edge: str) -> None:
    call, kind, message = EDGES[edge]
    base = ft.prepare_base_model(make())
    before = {name: tensor.data_ptr() for name, tensor in base.named_buffers()}
    with pytest.raises(kind, match=message):
        call(base)
    assert {name: tensor.data_ptr() for name, tensor in base.named_buffers()} == before


def test_a_call_that_fails_leaves_the_base_as_it_was() -> None:
    for settings in ({"adapt_layers": ["q_porj"]}, {"linear_config": 3}, {"plain_layers": ["lm_haed"]}):
        base = make()
        with pytest.raises(ft.FinetunaError):
            ft.new_finetuned(base, **settings)  # type: ignore[arg-type]
        assert not quantized(base) and all(p.requires_grad for p in base.parameters())


def test_a_quantised_head_stays_frozen_and_it_is_said() -> None:
    base = ft.prepare_base_model(make(), modules_not_to_quantize=())
    with pytest.warns(UserWarning, match="lm_head is quantised already and stays frozen"):
        model = ft.new_finetuned(base)
    assert not adapter_of(model).plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "lm_head" in ranks(ft.new_finetuned(base, plain_layers=()))


# ---- embeddings -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is also the head, read through BART's scaled embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = BartScaledWordEmbedding(VOCAB_SIZE, 16, padding_idx=0, embed_scale=4.0)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, VOCAB_SIZE, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.table(input_ids)))  # type: ignore[no-any-return]


def test_scaled_and_tied() -> None:
    torch.manual_seed(0)
    base = ft.prepare_base_model(Tied(), modules_not_to_quantize=())
    assert base.table.quantized is base.lm_head.quantized
    model = ft.new_finetuned(base, ["table"], plain_layers=())
    assert model.table.quantized is model.lm_head.quantized and model.table.quantized is not base.table.quantized
    excite(adapter_of(model))
    ids = inputs()["input_ids"]
    delta: Any = adapter_of(model).deltas["table"]
    added = delta.lora_embedding_A.t()[ids] @ delta.lora_embedding_B.t() * delta.scaling
    wanted = 4.0 * (model.table.weight.clone()[ids] + added)  # the delta is scaled too
    torch.testing.assert_close(model.table(ids), wanted)
    head = ft.new_finetuned(ft.prepare_base_model(Tied()), ["body"])  # the head is plain: a copy that is tied no more
    assert not quantized(head) - {"body"}
    train(head, "plain")
    assert not torch.equal(
        adapter_of(head).plain["lm_head"].get_parameter("weight"), head.get_parameter("table.weight")
    )


def test_opt_s_offset() -> None:
    base = ft.prepare_base_model(make("opt"))
    model = ft.new_finetuned(base, ["embed_positions"], plain_layers=())
    table: Any = model.get_submodule("model.decoder.embed_positions")
    excite(adapter_of(model))
    delta: Any = adapter_of(model).deltas["model/decoder/embed_positions"]
    full = table.weight.clone() + (delta.lora_embedding_B @ delta.lora_embedding_A * delta.scaling).t()
    mask = torch.ones(1, 5, dtype=torch.long)
    torch.testing.assert_close(table(mask), full[torch.arange(2, 7)][None])


# ---- torch's own tools ----------------------------------------------------------------------------------------------


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_backward_reports_a_loss_that_trains_nothing() -> None:
    _, first, second = pair()
    other = logits_of(second, inputs()).mean()
    with pytest.raises(RouteError, match="does not depend on anything that this model trains"):
        first.backward(other)  # type: ignore[operator]
    with pytest.raises(RouteError, match="does not depend"):
        first.backward(logits(first).mean())  # type: ignore[operator]
    first.backward(logits_of(first, inputs()).mean())  # type: ignore[operator]
    once = grads(first)
    first.backward(logits_of(first, inputs()).mean())  # type: ignore[operator]
    for grad, before in zip(grads(first), once, strict=True):
        torch.testing.assert_close(grad, 2 * before)  # type: ignore[operator]


def recompute(model: nn.Module, reentrant: bool) -> None:
    older: Any = getattr(model, "gradient_checkpointing_enable", None)  # the name before transformers 5.20 or so
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:.*got no gradient")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    results = []
    for enabled in (False, True):
        base = make(kind, use_cache=False)
        model = ft.new_finetuned(base, linear_config=ft.LinearAdapterConfig(dropout=0.3), seed=3).train()
        excite(adapter_of(model))
        if enabled:
            recompute(model, reentrant)
        torch.manual_seed(5)
        model.backward(logits_of(model, inputs(kind)).square().mean())  # type: ignore[operator]
        results.append(grads(model))
    unused = 2 if kind == "t5" else 0  # its shared table, which encoder and decoder have under other names
    assert sum(plain is None for plain in results[0]) == unused
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_that_would_train_nothing() -> None:
    base = make(use_cache=False)
    model = ft.new_finetuned(base, ["q_proj"]).train()  # the embedding is frozen; the head is private and would train
    recompute(model, reentrant=True)
    if hasattr(model, "_require_grads_hooks"):  # newer transformers do this by themselves
        model.disable_input_require_grads()  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RouteError, match="would train nothing"):
            model(**inputs())
        with torch.no_grad():
            model(**inputs())
    model.enable_input_require_grads()  # type: ignore[operator]
    model.backward(model(**inputs()).logits.mean())  # type: ignore[operator]
    assert all(grad is not None for grad in grads(model))


def test_reentrant_checkpointing_of_any_module() -> None:
    class Net(PlainNet):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids).mean(1)
            return self.head(checkpoint(self.block, x, use_reentrant=True))  # type: ignore[no-any-return]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RouteError, match="would train nothing"):
            ft.new_finetuned(Net(), ["block.0", "head"])(**inputs())
        ft.new_finetuned(Net(), ["head"])(**inputs())  # nothing is adapted within


def test_dropout_is_torch_s() -> None:
    model = ft.new_finetuned(make(), ["q_proj"], linear_config=ft.LinearAdapterConfig(dropout=0.5))
    excite(adapter_of(model))
    calm = logits(model.eval())
    assert torch.equal(logits(model), calm)
    model.train()
    torch.manual_seed(3)
    first = logits(model)
    assert not torch.equal(logits(model), first) and not torch.equal(first, calm)
    torch.manual_seed(3)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = ft.new_finetuned(make())
    excite(adapter_of(model))
    wide = logits(model)
    with torch.autocast("cpu", dtype=dtype):
        out = model(**inputs()).logits
        loss = out.float().square().mean()
    model.backward(loss)  # type: ignore[operator]
    assert (out.float() - wide).abs().max() < 0.05 * wide.abs().max()
    assert all(
        grad is not None and grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads(model)
    )


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_casts_leave_the_codes_and_the_others(cast: Callable[[nn.Module], nn.Module]) -> None:
    base, first, second = pair()
    before = [logits(base), logits(second)]
    codes = {n: b.clone() for n, b in first.named_buffers() if ".quantized." in n}
    cast(first)
    now = dict(first.named_buffers())
    assert all(now[name].dtype == code.dtype and torch.equal(now[name], code) for name, code in codes.items())
    assert torch.equal(logits(base), before[0]) and torch.equal(logits(second), before[1])
    out = logits(first)
    assert out.dtype == first.dtype and bool(out.isfinite().all())


def test_models_that_are_moved_share_what_they_moved_to() -> None:
    base, first, second = pair()
    first.double()
    alone = ft.get_model_mem_consumption(base, first, second)
    second.double()
    grown = ft.get_model_mem_consumption(base, first, second) - alone
    own = sum(p.numel() * 4 for p in second.parameters())  # 8 bytes instead of 4
    assert grown == own
    assert first.get_parameter("model.norm.weight").data_ptr() == second.get_parameter("model.norm.weight").data_ptr()
    with torch.no_grad():
        second.get_parameter("model.norm.weight").mul_(2)  # whoever writes into a shared tensor ...
    base.double()  # ... is not followed by others
    assert torch.equal(base.get_parameter("model.norm.weight"), torch.ones(32, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo's own, of autograd functions
@pytest.mark.parametrize("compute", ["16bit", "int8"])
@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_compile(kind: str, compute: str) -> None:
    """Products in int8 are then torch's own, one layer after another, which round the deltas elsewhere."""
    torch._dynamo.reset()
    model = ft.new_finetuned(make(kind, **({} if kind == "plain" else {"use_cache": False, "num_hidden_layers": 1})))
    for quantized in quantized_layers(model).values():
        quantized.compute = compute
    excite(adapter_of(model))
    wanted = logits_of(model, inputs(kind))
    model.backward(wanted.square().mean())  # type: ignore[operator]
    eager = grads(model)
    model.zero_grad()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = logits_of(compiled, inputs(kind))
    torch.testing.assert_close(out, wanted)
    out.square().mean().backward()  # type: ignore[no-untyped-call]
    for grad, before in zip(grads(model), eager, strict=True):
        torch.testing.assert_close(grad, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generate(kind: str) -> None:
    base = ft.prepare_base_model(make(kind))
    model = ft.new_finetuned(base)
    excite(adapter_of(model))
    ids = inputs(kind)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, **options)  # type: ignore[operator]
    assert not torch.equal(out, base.generate(ids, **options))  # type: ignore[operator]
    if kind != "t5":
        wanted = ids
        for _ in range(6):
            with torch.no_grad():
                wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
        done = (wanted[:, 8:] == 2).int().cumsum(1).roll(1, 1) > 0
        done[:, 0] = False
        assert torch.equal(out[:, 8:], wanted[:, 8:][:, : out.shape[1] - 8].masked_fill(done[:, : out.shape[1] - 8], 0))


@pytest.mark.parametrize("optimizer", [AdamW8bit, Lion8bit, torch.optim.SGD])
def test_optimizers(optimizer: Any) -> None:
    model = ft.new_finetuned(make(), plain_layers=())
    if optimizer is Lion8bit:
        losses = train(model, steps=5, optimizer=lambda p, lr: Lion8bit(p, lr=lr / 5))
    else:
        losses = train(model, steps=5, optimizer=optimizer)
    assert losses[-1] < losses[0]


# ---- copies and files -----------------------------------------------------------------------------------------------


def test_deepcopy_shares_the_base_and_nothing_else() -> None:
    base, first, second = pair()
    copied = copy.deepcopy(first)
    assert torch.equal(logits(copied), logits(first))
    total = ft.get_model_mem_consumption(base, first, second)
    assert ft.get_model_mem_consumption(base, first, second, copied) == total + own_bytes(copied)
    before = logits(first)
    train(copied)
    assert torch.equal(logits(first), before) and not torch.equal(logits(copied), before)
    averaged = torch.optim.swa_utils.AveragedModel(first)
    averaged.update_parameters(copied)
    averaged.update_parameters(first)
    assert torch.equal(logits(base), logits(ft.prepare_base_model(make())))
    for mean, one, other in zip(averaged.module.parameters(), copied.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(mean, (one + other) / 2)
    wrapped = copy.deepcopy(nn.ModuleDict({"inner": first}))
    assert torch.equal(logits(wrapped["inner"]), before)


def test_state_dict_is_what_differs(tmp_path: Path) -> None:
    base, first, _ = pair()
    state = ft.state_dict(first)
    assert {t.data_ptr() for t in state.values()} == {p.data_ptr() for p in first.parameters()}
    assert set(state) <= set(first.state_dict())
    safetensors.torch.save_file(state, tmp_path / "first.safetensors")
    torch.save(state, tmp_path / "first.pt")
    torch.save(first.state_dict(), tmp_path / "whole.pt")
    for loaded in (
        safetensors.torch.load_file(tmp_path / "first.safetensors"),
        torch.load(tmp_path / "first.pt", weights_only=True),
        torch.load(tmp_path / "whole.pt", weights_only=True),
    ):
        for load in (
            lambda m, s: m.load_state_dict(s),
            ft.load_state_dict,
            lambda m, s: m.load_state_dict(s, strict=False),
        ):
            other = ft.new_finetuned(base)
            load(other, loaded)
            assert torch.equal(logits(other), logits(first))


def test_states_that_do_not_fit() -> None:
    base, first, second = pair()
    state, whole = ft.state_dict(first), first.state_dict()
    key = next(iter(state))
    fewer = {k: v for k, v in state.items() if k != key}
    other = ft.new_finetuned(base)
    with pytest.raises(RuntimeError, match="Missing key"):
        ft.load_state_dict(other, fewer)
    assert ft.load_state_dict(other, fewer, strict=False).missing_keys == [key]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ft.load_state_dict(other, state | {"what": state[key]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        ft.load_state_dict(ft.new_finetuned(base, linear_config=ft.LinearAdapterConfig(r=2)), state)
    norm = base.get_parameter("model.norm.weight").clone()
    with pytest.raises(CheckpointError, match=r"another base: 'model\.norm\.weight'"):
        ft.load_state_dict(other, whole | {"model.norm.weight": norm + 1})
    assert torch.equal(base.get_parameter("model.norm.weight"), norm)
    with pytest.raises(CheckpointError, match="not pickled"):
        torch.save(second, "/dev/null")


def test_folders(tmp_path: Path) -> None:
    base = ft.prepare_base_model(make())
    model = ft.new_finetuned(
        base, ["embed_tokens", "q_proj", "v_proj"], ["lm_head", "norm"],
        linear_config={"q_proj": ft.LinearAdapterConfig(r=3, alpha=7), "v_proj": TWO},
    )  # fmt: skip
    excite(adapter_of(model))
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "notes").mkdir()
    (tmp_path / "one" / "notes" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "one", state_dict=model.state_dict(), safe_serialization=True)  # as a Trainer does
    assert (tmp_path / "one" / "notes" / "README.md").read_text() == "mine"
    with contextlib.chdir(tmp_path / "one"), pytest.raises(CheckpointError, match="a folder of its own"):
        model.save_pretrained(".")
    again = ft.load_finetuned(base, tmp_path / "one")
    assert torch.equal(logits(again), logits(model)) and ranks(again) == ranks(model)
    bank = AdapterBank(ft.prepare_base_model(make()))
    bank.load("x", tmp_path / "one")
    with bank.route(["x"] * 3):
        assert torch.equal(logits(bank.backbone), logits(model))
    with pytest.raises(CheckpointError, match="fingerprint"):
        ft.load_finetuned(ft.prepare_base_model(make(seed=1)), tmp_path / "one")


# ---- to a bank and back ---------------------------------------------------------------------------------------------


def test_an_adapter_of_a_bank_stands_alone() -> None:
    base = ft.prepare_base_model(make())
    bank = AdapterBank(base)
    for name, targets, plain in (("a", ["q_proj", "embed_tokens"], ["lm_head"]), ("b", ["up_proj"], [])):
        excite(bank.add(name, targets=targets, plain=plain))
    alone = {name: ft.finetuned_from_bank(bank, name) for name in bank}
    total = ft.get_model_mem_consumption(base, bank)
    assert ft.get_model_mem_consumption(base, bank, *alone.values()) == total
    train(alone["a"])
    for name, model in alone.items():
        with bank.route([name] * 3):
            assert torch.equal(logits(model), logits(base))
    with bank.bare():
        assert torch.equal(logits(ft.new_finetuned(base)), logits(base))  # the base of a bank is a base still
    with pytest.raises(ConfigError, match="there is no adapter 'c'"):
        ft.finetuned_from_bank(bank, "c")


def test_a_model_moves_into_a_bank() -> None:
    base, first, second = pair()
    bank = AdapterBank(base)
    for name, model in (("a", first), ("b", second)):
        bank.adopt(name, adapter_of(model))
    names = ["a", "b", "a"]
    with bank.route(names):
        joint = logits(base)
    for row, name in enumerate(names):
        torch.testing.assert_close(joint[row], logits(first if name == "a" else second)[row])
    with pytest.raises(ConfigError, match="already an adapter"):
        bank.adopt("a", adapter_of(first))
    with pytest.raises(TargetError, match="which this backbone has not"):
        AdapterBank(ft.prepare_base_model(make("gpt2"))).adopt("x", adapter_of(first))


# ---- modules of all sorts -------------------------------------------------------------------------------------------


def test_an_average_of_a_model_whose_root_has_parameters() -> None:
    class Rooted(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(LABELS))

        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) * self.scale

    base = ft.prepare_base_model(Rooted())
    before = logits(base, "plain")
    model = ft.new_finetuned(base)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model, "plain")
    averaged.update_parameters(model)
    assert torch.equal(logits(averaged, "plain"), logits(model, "plain"))
    assert torch.equal(logits(base, "plain"), before) and not torch.equal(logits(model, "plain"), before)


@pytest.mark.filterwarnings("ignore:.*nested_tensor")
@pytest.mark.parametrize("whole", [False, True])
def test_torch_s_encoder_is_fine_tuned_in_evaluation_too(whole: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    base = nn.Sequential(nn.TransformerEncoder(layer, 2) if whole else layer).eval()
    x = torch.randn(2, 5, 16)
    model = ft.new_finetuned(base)
    excite(adapter_of(model))
    with torch.no_grad():
        assert not torch.equal(model(x), base(x))
        torch.testing.assert_close(model.eval()(x), model.train()(x))


def test_hooks_of_a_plain_module_run_once() -> None:
    base = plain_net()
    base.head.register_forward_hook(lambda module, given, out: out * 2)
    base.head.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    model = ft.new_finetuned(base, ["first"], ["head"], do_not_quantize=True)
    assert torch.equal(logits(model, "plain"), logits(base, "plain"))


def test_tied_plain_modules_stay_tied() -> None:
    model = ft.new_finetuned(plain_net(), (), ["first", "second"], do_not_quantize=True)
    first, second = (adapter_of(model).plain[name].get_parameter("weight") for name in ("first", "second"))
    assert first is second and own_bytes(model) == first.numel() * 4


@pytest.mark.parametrize(("name", "message"), [("layers", "nobody calls"), ("out_proj", "nobody calls")])
def test_modules_that_nobody_calls_are_refused(name: str, message: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])
            self.attention = nn.MultiheadAttention(4, 2)

    with pytest.raises(TargetError, match=message):
        ft.new_finetuned(Net(), ["layers.0"] if name == "out_proj" else (), [name])


def test_parameters_that_no_loss_reaches_are_named() -> None:
    class Net(PlainNet):
        def forward(self, input_ids: Tensor) -> Tensor:
            return F.linear(self.block(self.table(input_ids).mean(1)), self.head.weight)

    model: Any = ft.new_finetuned(Net(), ["block.0", "head"])
    excite(adapter_of(model))
    with pytest.warns(UserWarning, match=r"3 of 6 parameters .* no gradient from its first loss \(deltas.head.lora_A"):
        model.backward(model(**inputs("plain")).sum())
    model.backward(model(**inputs("plain")).sum())  # said once


def test_the_base_s_own_parameters_cannot_be_thawed_by_hand() -> None:
    model = ft.new_finetuned(make())
    model.get_parameter("model.norm.weight").requires_grad = True
    with pytest.raises(ConfigError, match=r"'model.norm.weight' is the base's.*modules_not_to_freeze"):
        torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_module_around_it_cannot_write_into_the_base() -> None:
    base, first, _ = pair()
    before = logits(base)
    state = nn.ModuleDict({"inner": first}).state_dict()
    nn.ModuleDict({"inner": ft.new_finetuned(base)}).load_state_dict(state)
    with pytest.raises(CheckpointError, match="another base"):
        nn.ModuleDict({"inner": first}).load_state_dict(state | {"inner.model.norm.weight": torch.zeros(32)})
    assert torch.equal(logits(base), before)


def test_a_plain_normalisation_over_a_16_bit_base() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).bfloat16().eval()
    x = torch.randn(3, 6).bfloat16()
    model = ft.new_finetuned(base, ["0"], ["1"])
    torch.testing.assert_close(model(x), base(x))


def test_constants_and_kept_activations() -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.constant = torch.ones(8)

        def forward(self, input_ids: Tensor) -> Tensor:
            self.kept = super().forward(input_ids)
            return self.kept

    base = Net()
    base(**inputs("plain"))
    model: Any = ft.new_finetuned(base)
    assert model.constant.data_ptr() == base.constant.data_ptr()
    copy.deepcopy(model)


def test_a_prepared_base_can_be_pickled() -> None:
    base = ft.prepare_base_model(plain_net(), do_not_quantize=True)
    again = pickle.loads(pickle.dumps(base))
    assert torch.equal(logits(ft.new_finetuned(again), "plain"), logits(base, "plain"))
