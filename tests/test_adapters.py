"""The bank: what patterns name, what names are allowed, adding and removing live, bytes, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from finetuna_lightning.adapters import (
    AdapterBank,
    layer_shape,
    match_modules,
    matches,
    output_head,
    resolve_plain,
    resolve_targets,
    tensor_bytes,
)
from finetuna_lightning.backbone import quantize_model_
from finetuna_lightning.errors import ConfigError, TargetError
from finetuna_lightning.nn.lora import LoRAEmbedding, LoRALinear
from finetuna_lightning.nn.routing import is_routed
from tests.helpers.models import ATTENTION, PlainNet, cut, excite, logits_of, plain_net, tiny_inputs, tiny_model

LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def bank_over(name: str = "llama", scheme: str = "int8", **more: Any) -> tuple[nn.Module, AdapterBank]:
    model = quantize_model_(tiny_model(name, scale=3.0, **more), scheme)
    return model, AdapterBank(model)


# ---- naming modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("q_proj.x", "q_proj", False),
        (r".*layers\.[01]\..*(q|v)_proj", "model.layers.0.self_attn.q_proj", True),
        (r".*layers\.[01]\..*(q|v)_proj", "model.layers.2.self_attn.q_proj", False),
        (r".*layers\.[01]", "model.layers.0.self_attn.q_proj", False),  # all of the path
    ],
)
def test_a_pattern_is_a_suffix_a_path_or_an_expression(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def test_a_broken_expression_is_one_line() -> None:
    with pytest.raises(TargetError, match=r"'\(q_proj' is neither a module's name nor a regular expression"):
        matches("(q_proj", "q_proj")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (["model.layers.1.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        (
            ["0.self_attn.q_proj", "down_proj"],
            {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"},
        ),
        ([r".*\.0\..*(q|v)_proj"], {f"model.layers.0.self_attn.{p}_proj" for p in "qv"}),
        (
            ["all-linear"],
            {f"model.layers.{i}.{'self_attn' if n in ATTENTION else 'mlp'}.{n}" for i in (0, 1) for n in LINEAR},
        ),
        (["embed_tokens", "lm_head"], {"model.embed_tokens", "lm_head"}),
    ],
)
def test_targets(patterns: list[str], expected: set[str]) -> None:
    model = tiny_model("llama")
    found = resolve_targets(model, patterns)
    assert found.keys() == expected
    order = [path for path, _ in model.named_modules()]
    assert list(found) == sorted(found, key=order.index)
    _, bank = bank_over()
    adapter = bank.add("a", rank=2, targets=patterns)
    assert {key.replace("/", ".") for key in adapter.deltas} == expected


def test_all_linear_leaves_out_the_head_and_what_is_trained_in_full() -> None:
    model = tiny_model("llama")
    found = resolve_targets(model, ["all-linear"], excluded=["model.layers.0.mlp"])
    assert "lm_head" not in found and len(found) == 11 and not any("layers.0.mlp" in path for path in found)
    assert output_head(model) is model.lm_head and output_head(PlainNet()) is None
    assert resolve_targets(plain_net(), ["all-linear"]).keys() == {"block.0", "block.2", "first", "second", "head"}


def test_all_linear_of_gpt2_is_its_conv1d() -> None:
    found = resolve_targets(tiny_model("gpt2"), ["all-linear"])
    assert {path.rsplit(".", 1)[-1] for path in found} == {"c_attn", "c_proj", "c_fc"} and len(found) == 8


@pytest.mark.parametrize("patterns", [["q_porj"], ["v_proj", "q_porj"], ["q_porj", "v_proj"]])
def test_a_typo_names_the_nearest(patterns: list[str]) -> None:
    _, bank = bank_over()
    with pytest.raises(
        TargetError, match=r"no layer matches 'q_porj'; did you mean 'q_proj'\?.*k_proj.*lm_head"
    ) as error:
        bank.add("a", targets=patterns)
    assert "\n" not in str(error.value) and not bank
    with pytest.raises(TargetError, match=r"no module matches 'lm_haed'; did you mean 'lm_head'"):
        bank.add("a", plain=["lm_haed"])
    assert not bank


def test_a_container_says_what_is_inside() -> None:
    _, bank = bank_over()
    with pytest.raises(
        TargetError,
        match=r"'self_attn' names 'model.layers.0.self_attn', a LlamaAttention.*inside it are: k_proj, o_proj, q_proj",
    ):
        bank.add("a", targets=["self_attn"])
    with pytest.raises(
        TargetError, match=r"'norm' names 'model.norm', a LlamaRMSNorm, which is no linear layer or embedding$"
    ):
        bank.add("a", targets=["norm"])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "target", ["experts", "gate_up_proj", "down_proj", "gate_proj", "w1", "model.layers.0.mlp.experts"]
)
def test_expert_targets_say_so(name: str, target: str) -> None:
    model = tiny_model(name)
    bank = AdapterBank(model)
    with pytest.raises(TargetError, match=f"'{target}' names expert weights.*attention projections instead"):
        bank.add("a", targets=["q_proj", target])
    bank.add("a", rank=2, targets=ATTENTION)
    assert len(bank["a"].deltas) == 8  # type: ignore[arg-type, union-attr]


def test_without_experts_the_same_names_are_a_plain_mistake() -> None:
    with pytest.raises(TargetError, match="no layer matches 'experts' "):
        AdapterBank(tiny_model("llama")).add("a", targets=["experts"])


def test_plain_modules_outermost_only() -> None:
    model = tiny_model("llama")
    assert resolve_plain(model, ["lm_head", "norm"]).keys() == {"lm_head", "model.norm"}
    assert resolve_plain(model, ["mlp", "up_proj"]).keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert resolve_plain(model, [r"model\.layers\.1\.mlp.*"]).keys() == {"model.layers.1.mlp"}


def test_both_adapted_and_trained_in_full_is_an_error() -> None:
    _, bank = bank_over()
    for targets, plain in (
        (["lm_head"], ["lm_head"]),
        (["up_proj"], ["mlp"]),
        (["q_proj", "0.mlp.up_proj"], ["layers.0"]),
    ):
        with pytest.raises(TargetError, match=r"both adapted and trained in full.*choose one"):
            bank.add("a", targets=targets, plain=plain)
    assert not bank
    bank.add("a", targets=["all-linear"], plain=["lm_head", "1.mlp"])


def test_a_module_with_two_paths_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = self.one

    model = Twice()
    assert match_modules(model, "two") == {"one": model.one} and match_modules(model, "(one|two)") == {"one": model.one}
    bank = AdapterBank(model)
    bank.add("a", rank=1, targets=["two"])
    assert list(bank["a"].deltas) == ["one"]  # type: ignore[arg-type, union-attr]


def test_attention_output_projection_of_torch_is_not_called_and_so_no_target() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert resolve_targets(model, ["all-linear"]).keys() == {"linear1", "linear2"}


def test_layer_shapes() -> None:
    gpt2 = tiny_model("gpt2")
    assert layer_shape(gpt2.transformer.h[0].attn.c_attn) == (32, 96)  # type: ignore[union-attr, index]
    quantize_model_(gpt2)
    assert layer_shape(gpt2.transformer.h[0].attn.c_attn) == (32, 96)  # type: ignore[union-attr, index]
    assert layer_shape(nn.Linear(3, 5)) == (3, 5) and layer_shape(nn.Embedding(9, 2)) == (9, 2)


# ---- names ----------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    "a.b",
    "../x",
    "/tmp/x",
    "a b",
    "-a",
    "_a",
    "a/b",
    "é",
    "a\n",
    "forward",
    "keys",
    "train",
    "names",
    "add",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be(name: str) -> None:
    _, bank = bank_over()
    with pytest.raises(ConfigError, match="adapter name") as error:
        bank.add(name)
    assert "\n" not in str(error.value) and not bank


def test_every_attribute_of_the_bank_is_reserved() -> None:
    _, bank = bank_over()
    attributes = {name for name in (*dir(bank), *vars(bank)) if not name.startswith("_")}
    assert {"load", "delta", "bare", "adapters", "follow", "origin"} <= attributes
    for name in attributes:
        with pytest.raises(ConfigError, match="not allowed"):
            bank.add(name)


@pytest.mark.parametrize("name", ["lm_head", "model", "layers", "q_proj", "self_attn", "0"])
def test_the_backbones_own_names_are_taken(name: str) -> None:
    _, bank = bank_over()
    with pytest.raises(ConfigError, match=f"{name!r} is the name of a backbone module; '{name}_adapter' would work"):
        bank.add(name)
    bank.add(f"{name}_adapter", rank=2)


def test_duplicates_also_by_case() -> None:
    _, bank = bank_over()
    first = bank.add("sql", rank=2)
    with pytest.raises(ConfigError, match="already an adapter 'sql'"):
        bank.add("sql", rank=2)
    with pytest.raises(ConfigError, match="'SQL' is a duplicate of 'sql'"):
        bank.add("SQL", rank=2)
    assert dict(bank) == {"sql": first}
    bank.remove("sql")
    bank.add("SQL", rank=2)


@pytest.mark.parametrize("name", ["a", "A1", "0a", "sql-2024_v1", "x" * 80])
def test_names_that_can_be(name: str) -> None:
    _, bank = bank_over()
    assert bank.add(name, rank=2).name == name and name in bank


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "8"])
def test_a_rank_is_a_positive_integer(rank: Any) -> None:
    _, bank = bank_over()
    with pytest.raises(ConfigError, match="rank"):
        bank.add("a", rank=rank)
    assert not bank


def test_a_rank_larger_than_the_layer() -> None:
    _, bank = bank_over()
    with pytest.raises(
        ConfigError, match=r"rank 17 is larger than layer 'model.layers.0.self_attn.k_proj' \(32 x 16\): use at most 16"
    ):
        bank.add("a", rank=17, targets=["q_proj", "k_proj"])
    bank.add("a", rank=16, targets=["q_proj", "k_proj"])
    bank.add("b", rank=32, targets=["q_proj"])


# ---- one adapter ----------------------------------------------------------------------------------------------------


def test_what_an_adapter_is_told_is_what_its_deltas_are() -> None:
    _, bank = bank_over()
    adapter = bank.add(
        "a", rank=3, alpha=5.0, dropout=0.25, bias=True, targets=["q_proj", "embed_tokens"], plain=["norm"], seed=4
    )
    assert {type(delta) for delta in adapter.deltas.values()} == {LoRALinear, LoRAEmbedding}
    for delta in adapter.deltas.values():
        assert delta.rank == 3 and delta.alpha == 5.0
        if isinstance(delta, LoRALinear):
            assert delta.dropout == 0.25 and delta.lora_bias is not None
    assert adapter.target_modules == ["embed_tokens", "q_proj"] and adapter.plain_modules == ["model.norm"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())
    assert list(bank.adapters()) == [adapter]


def test_initial_values_depend_on_the_seed_and_the_path_alone() -> None:
    def values(name: str, seed: int, company: int, targets: list[str]) -> dict[str, torch.Tensor]:
        _, bank = bank_over()
        torch.manual_seed(company)
        for index in range(company):
            bank.add(f"other{index}", rank=2, seed=seed)
        return dict(bank.add(name, rank=2, targets=targets, seed=seed).named_parameters())

    with torch.random.fork_rng(devices=[]):
        first, again = values("a", 1, 0, ["all-linear"]), values("b", 1, 3, ["q_proj"])
        other = values("a", 2, 0, ["q_proj"])
    assert again and all(torch.equal(first[key], tensor) for key, tensor in again.items())
    drawn = [key for key in other if key.endswith("lora_A")]
    assert drawn and not any(torch.equal(first[key], other[key]) for key in drawn)
    assert len({float(first[key].detach()[0, 0]) for key in first if key.endswith("lora_A")}) == 14


def test_full_paths_are_kept_where_suffixes_would_name_more() -> None:
    _, bank = bank_over()
    assert bank.add("a", rank=2, targets=["model.layers.1.self_attn.q_proj"]).target_modules == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert bank.add("b", rank=2, targets=[r".*[qv]_proj"]).target_modules == ["q_proj", "v_proj"]
    _, bank = bank_over("gpt2")
    assert bank.add("a", rank=2, targets=["attn.c_proj"]).target_modules == [
        f"transformer.h.{i}.attn.c_proj" for i in (0, 1)
    ]


# ---- live -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adding_and_removing_live(name: str, scheme: str) -> None:
    model, bank = bank_over(name, scheme)
    inputs = tiny_inputs(name)
    bare = logits_of(model, inputs)
    classes = [type(module) for module in model.modules()]

    excite(bank.add("a", rank=2))
    with bank.route(["a"] * 4):
        first = logits_of(model, inputs)
    excite(bank.add("b", rank=3, plain=["lm_head"]))
    with bank.route(["a"] * 4):
        assert torch.equal(logits_of(model, inputs), first)
    with bank.route(["b", "a", "b", "a"]):
        joint = logits_of(model, inputs)
    assert torch.allclose(joint[[1, 3]], first[[1, 3]], atol=1e-5) and not torch.allclose(joint[0], first[0], atol=1e-2)
    assert bank.remove("a").name == "a" and list(bank) == ["b"]
    with bank.route(["b"] * 4):
        assert torch.allclose(logits_of(model, inputs)[[0, 2]], joint[[0, 2]], atol=1e-5)
    bank.remove("b")
    assert [type(module) for module in model.modules()] == classes and not any(map(is_routed, model.modules()))
    assert torch.equal(logits_of(model, inputs), bare)


def test_a_new_adapter_changes_nothing() -> None:
    model, bank = bank_over()
    inputs = tiny_inputs("llama")
    bare = logits_of(model, inputs)
    bank.add("a", targets=["all-linear", "embed_tokens"], plain=["lm_head", "norm"], bias=True, dropout=0.5)
    with bank.route(["a"] * 4, training=True):
        assert torch.allclose(logits_of(model, inputs), bare, atol=1e-5)


def test_an_unknown_name_is_told_the_nearest() -> None:
    _, bank = bank_over()
    bank.add("sql", rank=2)
    for function in (lambda: bank.remove("sqll"), lambda: bank.route(["sql", "sqll"])):
        with pytest.raises(ConfigError, match=r"no adapter 'sqll'; did you mean 'sql'\?"):
            function()


def test_the_backbone_is_frozen_and_no_child() -> None:
    model = tiny_model("llama")
    assert any(p.requires_grad for p in model.parameters())
    bank = AdapterBank(model)
    assert not any(p.requires_grad for p in model.parameters())
    bank.add("a", rank=2)
    assert list(bank.children()) == [bank["a"]] and list(dict(bank.named_children())) == ["a"]
    backbone = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not backbone & {id(t) for t in (*bank.parameters(), *bank.buffers())}
    assert not any("lora" in key for key in model.state_dict())
    assert bank.backbone is model


def test_a_second_bank_over_one_backbone_is_an_error() -> None:
    model, bank = bank_over()
    bank.add("a", rank=2)
    with pytest.raises(ConfigError, match="has a bank already"):
        AdapterBank(model)


def test_a_private_copy_is_real_float32_and_its_own() -> None:
    model, bank = bank_over()
    adapter = bank.add("a", targets=[], plain=["lm_head", "model.layers.0"])
    assert not any(hasattr(m, "quantized") or is_routed(m) for m in adapter.modules())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert torch.equal(adapter.plain["lm_head"].weight, model.lm_head.weight + 0)  # type: ignore[union-attr, operator]
    again = bank.add("b", targets=["q_proj"], plain=["lm_head"])  # copied from a layer that is routed by now
    assert torch.equal(again.plain["lm_head"].weight, adapter.plain["lm_head"].weight)
    assert again.plain["lm_head"].weight.data_ptr() != adapter.plain["lm_head"].weight.data_ptr()  # type: ignore[union-attr, operator]


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8", "none"])
@pytest.mark.parametrize("tie", [True, False])
def test_bytes_of_everything_are_the_backbones_and_each_adapters(scheme: str, tie: bool) -> None:
    model, bank = bank_over("llama", scheme, tie_word_embeddings=tie)
    alone = tensor_bytes(model)
    for index in range(8):
        plain = [["lm_head"], ["norm"], [], ["layers.1.mlp"]][index % 4]
        bank.add(
            f"a{index}", rank=2 + index, targets=["q_proj", "v_proj", "embed_tokens"][: 1 + index % 3], plain=plain
        )
    everything = {id(t): t.numel() * t.itemsize for m in (model, bank) for t in (*m.parameters(), *m.buffers())}
    assert bank.backbone_nbytes == alone
    assert sum(everything.values()) == bank.backbone_nbytes + sum(adapter.nbytes for adapter in bank.adapters())
    assert tensor_bytes(model, bank) == sum(everything.values())
    for adapter in bank.adapters():
        assert adapter.nbytes == sum(p.numel() * 4 for p in adapter.parameters()) > 0
    bank.remove("a3")
    assert tensor_bytes(model, bank) == alone + sum(adapter.nbytes for adapter in bank.adapters())


def test_bytes_by_hand() -> None:
    model = quantize_model_(nn.Sequential(nn.Linear(10, 6), nn.Embedding(7, 10)))
    assert tensor_bytes(model) == (60 + 6 * 4 + 6 * 4) + (70 + 7 * 4)
    bank = AdapterBank(model)
    assert bank.add("a", rank=3, targets=["0"], bias=True).nbytes == 4 * (3 * 10 + 6 * 3 + 6)
    assert bank.add("b", rank=2, targets=["1"], plain=["0"]).nbytes == 4 * (2 * 7 + 10 * 2 + 60 + 6)


# ---- copies ---------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.adapters = bank_over()

    def forward(self, names: list[str]) -> torch.Tensor:
        with self.adapters.route(names):
            return logits_of(self.backbone, cut(tiny_inputs("llama"), list(range(len(names)))))


def test_a_deep_copy_routes_to_the_copied_bank() -> None:
    holder = Holder()
    excite(holder.adapters.add("a", rank=2, plain=["lm_head"]))
    twin = copy.deepcopy(holder)
    before = holder(["a", "a"])
    assert torch.equal(twin(["a", "a"]), before)
    assert twin.adapters.backbone is twin.backbone and twin.backbone is not holder.backbone
    excite(twin.adapters["a"], seed=3)
    assert torch.equal(holder(["a", "a"]), before) and not torch.allclose(twin(["a", "a"]), before, atol=1e-2)
    twin.adapters.add("b", rank=2)
    twin.adapters.remove("a")
    assert list(holder.adapters) == ["a"] and torch.equal(holder(["a", "a"]), before)
    twin(["b", "b"])


def test_dropout_positions_are_counted_per_adapter() -> None:
    model, bank = bank_over()
    for name in ("a", "b"):
        excite(bank.add(name, rank=2, dropout=0.5, seed=1))
    inputs = tiny_inputs("llama")
    with bank.route(["a"] * 4, training=True):
        first = logits_of(model, inputs)
    with bank.route(["a", "b", "a", "b"]):
        pass  # no training: the streams stay where they are
    assert bank["a"].calls == 1 and bank["b"].calls == 0
    with bank.route(["b"] * 4, training=True):
        same_seed = logits_of(model, inputs)
    assert torch.equal(first, same_seed)
    with bank.route(["a"] * 4, training=True):
        assert not torch.allclose(logits_of(model, inputs), first, atol=1e-3)
