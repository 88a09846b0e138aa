"""PEFT's format, with PEFT itself at the other end: our folders there, its folders here, and nothing lost silently."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.backbone import fingerprint, load_backbone, quantize_model_
from finetuna_lightning.errors import CheckpointError, ConfigError
from finetuna_lightning.peft_io import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder, load_folder, save_folder
from tests.helpers.models import LABELS, excite, logits_of, plain_net, task_of, tiny_inputs, tiny_model

# peft 0.21, where a target is an embedding: it then saves the base's table too, and says so
EMBEDDINGS_SAVED = r"ignore:Setting `save_embedding_layers` to `True`:UserWarning"
# peft 0.21: a model made from a configuration has no name
NO_NAME = r"ignore:Could not find a config file in:UserWarning"
# peft 0.21 and transformers' Conv1D
FAN_IN = r"ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
# peft 0.21, where the head is trained in full over tied embeddings
TIED = r"ignore:Model has `tie_word_embeddings=True`:UserWarning"
# peft 0.21 with transformers 5.23
OLD_NAME = r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
# peft 0.21: a bias beside a layer that has none cannot be merged
NO_BIAS = r"ignore:`lora_bias=True` was passed but the targeted layer:UserWarning"
# peft 0.21: it finds fault with the shape of its own biases
BIAS_SHAPE = r"ignore:Adapter 'default'.*LoRA tensor.*have invalid shape.*lora_B.bias:UserWarning"
FILTERS = (EMBEDDINGS_SAVED, NO_NAME, FAN_IN, TIED, OLD_NAME, NO_BIAS, BIAS_SHAPE)
pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, attention": ("llama", dict(rank=4, alpha=16.0, targets=["q_proj", "v_proj"])),
    "llama, all linear": ("llama", dict(rank=3, alpha=5.0, targets=["all-linear"], dropout=0.1)),
    "llama, bias": ("llama", dict(rank=4, alpha=2.0, targets=["q_proj", "down_proj"], bias=True)),
    "llama, embedding": ("llama", dict(rank=5, alpha=7.0, targets=["embed_tokens", "k_proj"])),
    "llama, head": ("llama", dict(rank=5, targets=["lm_head", "k_proj"])),
    "llama, one layer": ("llama", dict(rank=4, targets=["model.layers.1.self_attn.q_proj"])),
    "llama, plain head": ("llama", dict(rank=2, targets=["o_proj"], plain=["lm_head"])),
    "llama, plain norm": ("llama", dict(rank=2, targets=["o_proj"], plain=["model.norm"])),
    "gpt2, all linear": ("gpt2", dict(rank=4, targets=["all-linear"])),
    "gpt2, embeddings": ("gpt2", dict(rank=4, targets=["wte", "wpe", "c_attn"])),
    "gpt2, plain conv1d": ("gpt2", dict(rank=4, targets=["c_attn"], plain=["h.1.mlp.c_fc"])),
    "bert, classifier": ("bert", dict(rank=4, targets=["query", "value"], plain=["classifier"])),
    "t5": ("t5", dict(rank=4, targets=["q", "v", "wo"])),
    "opt": ("opt", dict(rank=4, targets=["fc1", "embed_tokens"])),
}


def make(name: str, scheme: str = "none") -> nn.Module:
    return quantize_model_(tiny_model(name, scale=3.0), scheme)


def bank_over(model: nn.Module, name: str) -> AdapterBank:
    return AdapterBank(model, {"task": task_of(name), "backbone": None, "revision": None, "fingerprint": None})


def ours(model: nn.Module, bank: AdapterBank, name: str, adapter: str = "a") -> Tensor:
    with bank.route([adapter] * 4), torch.no_grad():
        return logits_of(model, tiny_inputs(name))


def close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= 1e-5 * max(1.0, float(right.abs().max())))


def saved(folder: Path, case: str) -> tuple[nn.Module, AdapterBank, Tensor]:
    name, options = CASES[case]
    model = make(name)
    bank = bank_over(model, name)
    excite(bank.add("a", **options), std=0.1)
    bank["a"].save_pretrained(folder)  # type: ignore[union-attr, operator]
    return model, bank, ours(model, bank, name)


@pytest.mark.parametrize("case", CASES)
def test_our_folder_in_peft(case: str, tmp_path: Path) -> None:
    name = CASES[case][0]
    _, _, expected = saved(tmp_path / "a", case)
    base = make(name)
    with torch.no_grad():
        bare = logits_of(base, tiny_inputs(name))
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
        logits = logits_of(theirs, tiny_inputs(name))
    assert close(logits, expected) and not torch.allclose(logits, bare, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_our_folder_here_again(case: str, tmp_path: Path) -> None:
    name = CASES[case][0]
    _, bank, expected = saved(tmp_path / "a", case)
    model = make(name)
    again = bank_over(model, name)
    again.load("b", tmp_path / "a")
    assert torch.equal(ours(model, again, name, "b"), expected)
    first, second = bank["a"].state_dict(), again["b"].state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for field in ("rank", "alpha", "dropout", "bias", "target_modules", "plain_modules", "conv1d"):
        assert getattr(bank["a"], field) == getattr(again["b"], field), field


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8"])
def test_over_8_bits_the_weights_are_the_same(scheme: str, tmp_path: Path) -> None:
    """A private copy of a Conv1D is [out, in] over codes, and [in, out] in the file."""
    for case in ("gpt2, plain conv1d", "llama, embedding", "llama, plain head"):
        name, options = CASES[case]
        model = make(name, scheme)
        bank = bank_over(model, name)
        excite(bank.add("a", **options), std=0.1)
        bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
        expected = ours(model, bank, name)
        plain = make(name)
        tensors, shapes = load_file(tmp_path / "a" / WEIGHTS_NAME), {k: v.shape for k, v in plain.state_dict().items()}
        for key, tensor in tensors.items():
            path = key.removeprefix("base_model.model.")
            assert "lora" in path or tensor.shape == shapes[path]
        bank.load("b", tmp_path / "a")
        assert torch.equal(ours(model, bank, name, "b"), expected)
        other = bank_over(plain, name)
        other.load("a", tmp_path / "a")
        assert (ours(plain, other, name) - expected).norm() / expected.norm() < 0.15


def lora_config(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**dict(r=4, lora_alpha=6, lora_dropout=0.1) | more)


THEIRS: dict[str, tuple[str, Callable[[], peft.LoraConfig]]] = {
    "llama": ("llama", lambda: lora_config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "llama, all-linear": ("llama", lambda: lora_config(target_modules="all-linear")),
    "llama, regex": ("llama", lambda: lora_config(target_modules=r".*layers\.1.*(up|down)_proj")),
    "llama, bias": ("llama", lambda: lora_config(target_modules=["q_proj", "o_proj"], lora_bias=True)),
    "llama, rslora": ("llama", lambda: lora_config(target_modules=["q_proj"], use_rslora=True)),
    "llama, some layers": ("llama", lambda: lora_config(target_modules=["q_proj"], layers_to_transform=[1])),
    "llama, embedding": ("llama", lambda: lora_config(target_modules=["embed_tokens", "q_proj"])),
    "llama, head": ("llama", lambda: lora_config(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "llama, embedding in full": (
        "llama",
        lambda: lora_config(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "gpt2": ("gpt2", lambda: lora_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2, position": ("gpt2", lambda: lora_config(target_modules=["wpe"])),
    "bert": ("bert", lambda: lora_config(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "t5": ("t5", lambda: lora_config(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
}


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_folder_here(case: str, tmp_path: Path) -> None:
    name, config = THEIRS[case]
    theirs = peft.get_peft_model(make(name), config()).eval()
    trained = [p for key, p in theirs.named_parameters() if "lora" in key or "modules_to_save" in key]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        expected = logits_of(theirs, tiny_inputs(name))
    theirs.save_pretrained(str(tmp_path / "a"))
    model = make(name)
    bank = bank_over(model, name)
    adapter = bank.load("a", tmp_path / "a")
    assert close(ours(model, bank, name), expected)
    assert sum(p.numel() for p in adapter.parameters()) == sum(p.numel() for p in trained)
    adapter.save_pretrained(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "b")).eval()
    with torch.no_grad():
        assert close(logits_of(again, tiny_inputs(name)), expected)


# ---- what the files say ---------------------------------------------------------------------------------------------


def test_names_shapes_and_settings_in_the_files(tmp_path: Path) -> None:
    model = make("llama")
    bank = AdapterBank(
        model, {"task": "causal-lm", "backbone": "org/model", "revision": "main", "fingerprint": "0123456789abcdef"}
    )
    bank.add("a", rank=3, alpha=6.0, dropout=0.25, bias=True, targets=["q_proj", "embed_tokens"], plain=["lm_head"])
    assert bank["a"].save_pretrained(tmp_path / "x" / "a") == tmp_path / "x" / "a"  # type: ignore[union-attr, operator]
    assert sorted(f.name for f in (tmp_path / "x" / "a").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    q = "base_model.model.model.layers.{}.self_attn.q_proj"
    expected = {
        **{f"{q.format(i)}.lora_A.weight": (3, 32) for i in (0, 1)},
        **{f"{q.format(i)}.lora_B.weight": (32, 3) for i in (0, 1)},
        **{f"{q.format(i)}.lora_B.bias": (32,) for i in (0, 1)},
        "base_model.model.model.embed_tokens.lora_embedding_A": (3, 99),
        "base_model.model.model.embed_tokens.lora_embedding_B": (32, 3),
        "base_model.model.lm_head.weight": (99, 32),
    }
    tensors = load_file(tmp_path / "x" / "a" / WEIGHTS_NAME)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected
    with safe_open(tmp_path / "x" / "a" / WEIGHTS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt", "backbone_fingerprint": "0123456789abcdef"}
    assert json.loads((tmp_path / "x" / "a" / CONFIG_NAME).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/model",
        "revision": "main",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.25,
        "target_modules": ["embed_tokens", "q_proj"],
        "bias": "none",
        "lora_bias": True,
        "fan_in_fan_out": False,
        "modules_to_save": ["lm_head"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "inference_mode": True,
    }


def test_alpha_is_an_integer_where_it_is_one() -> None:
    """Ollama wants one."""
    for alpha in (16.0, 2.5):
        folder = AdapterFolder(
            2, alpha, 0.0, False, ["0"], [], {"0": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}}, {}
        )
        save_folder("a", folder)
        text = Path("a", CONFIG_NAME).read_text()
        assert f'"lora_alpha": {"16" if alpha == 16 else "2.5"},' in text and load_folder("a").alpha == alpha


def test_saving_again_replaces(tmp_path: Path) -> None:
    _, bank, _ = saved(tmp_path / "a", "llama, attention")
    (tmp_path / "a" / "stray").write_text("x")
    excite(bank["a"], seed=1)
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME, "stray"]
    assert (tmp_path / "a" / "stray").read_text() == "x"  # a user's file is not ours to delete
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    parameter = bank["a"].deltas["model/layers/0/self_attn/q_proj"].lora_A  # type: ignore[union-attr, index]
    assert torch.equal(load_file(tmp_path / "a" / WEIGHTS_NAME)[key], parameter)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_other_files_stay_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bank, _ = saved(tmp_path / "a", "llama, attention")
    (tmp_path / "a" / "stray").write_text("x")

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    assert (tmp_path / "a" / "stray").read_text() == "x"


# ---- nothing is lost silently ---------------------------------------------------------------------------------------


def change(folder: Path, tensors: Callable[[dict[str, Tensor]], Any] | None = None, **config: Any) -> None:
    if tensors is not None:
        content = load_file(folder / WEIGHTS_NAME)
        tensors(content)
        save_file(content, folder / WEIGHTS_NAME)
    values = json.loads((folder / CONFIG_NAME).read_text()) | config
    (folder / CONFIG_NAME).write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a missing A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), r"missing \['model.layers.0.self_attn.q_proj.lora_A'\]"),
    "a missing B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), r"missing \['model.layers.0.self_attn.q_proj.lora_B'\]"),
    "a missing plain weight": (lambda t: t.pop(HEAD), r"missing \['lm_head.weight'\]"),
    "an unexpected bias": (
        lambda t: t.update({f"{Q0}.lora_B.bias": torch.zeros(32)}),
        r"unexpected \[.*q_proj.lora_bias'\]",
    ),
    "an unexpected plain weight": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
        r"unexpected \['model.norm.weight'\]",
    ),
    "an unknown kind": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.zeros(32)}),
        r"unexpected \[.*lora_magnitude_vector'\]",
    ),
    "a module that is not there": (
        lambda t: t.update({"base_model.model.model.layers.7.q_proj.lora_A.weight": torch.zeros(4, 32)}),
        r"lacks: \['model.layers.7.q_proj'\]",
    ),
    "an embedding's delta on a linear layer": (
        lambda t: t.update({f"{Q0}.lora_embedding_A": torch.zeros(4, 32)}),
        r"unexpected \[.*lora_embedding_A'\]",
    ),
    "another prefix": (
        lambda t: t.update({"model.norm.weight": torch.zeros(32)}),
        "unexpected key 'model.norm.weight'; keys start with 'base_model.model.'",
    ),
    "another rank": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(2, 32)}),
        r"q_proj.lora_A is \(2, 32\), not \(4, 32\)",
    ),
    "another shape": (lambda t: t.update({HEAD: torch.zeros(98, 32)}), r"lm_head.weight is \(98, 32\), not \(99, 32\)"),
    "a NaN in a delta": (
        lambda t: t[f"{Q0}.lora_A.weight"][3].fill_(math.nan),
        "q_proj.lora_A.weight' holds NaN or infinity",
    ),
    "an infinity in a head": (lambda t: t[HEAD][98].fill_(math.inf), "lm_head.weight' holds NaN or infinity"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_every_key_is_accounted_for(fault: str, tmp_path: Path) -> None:
    model = make("llama")
    bank = bank_over(model, "llama")
    excite(bank.add("a", rank=4, targets=["q_proj"], plain=["lm_head"]))
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    expected = ours(model, bank, "llama")
    tensors, message = BROKEN[fault]
    change(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        bank.load("b", tmp_path / "a")
    assert "\n" not in str(error.value) and list(bank) == ["a"] and torch.equal(ours(model, bank, "llama"), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported; expected False"),
        ({"rank_pattern": {"q_proj": 0}}, "r=0 of q_proj is not an integer >= 1"),
        ({"rank_pattern": {"q_proj": 8}}, "shapes .*q_proj"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha='8' of q_proj is not a number"),
        ({"alpha_pattern": [8]}, "is no mapping"),
        ({"alpha_pattern": {"q_proj(": 8}}, "no regular expression"),
        ({"bias": "all"}, "bias='all' is not supported; expected 'none'"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"peft_type": "IA3"}, "holds a IA3 adapter; only LORA can be loaded"),
        ({"peft_type": "absent"}, "only LORA can be loaded"),
        ({"r": "absent"}, "r=None is not"),
        ({"lora_alpha": "absent"}, "lora_alpha=None is not"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters="),
    ],
)
def test_a_kind_that_cannot_be_kept_is_an_error(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, bank, _ = saved(tmp_path / "a", "llama, attention")
    change(tmp_path / "a", **config)
    with pytest.raises(CheckpointError, match=message) as error:
        bank.load("b", tmp_path / "a")
    assert "\n" not in str(error.value) and list(bank) == ["a"]


@pytest.mark.parametrize("rank", [0, 2.5, "4", None])
def test_a_rank_that_is_none(rank: Any, tmp_path: Path) -> None:
    _, bank, _ = saved(tmp_path / "a", "llama, attention")
    change(tmp_path / "a", r=rank)
    with pytest.raises(CheckpointError, match=f"r={rank!r} is not"):
        bank.load("b", tmp_path / "a")


def test_settings_that_peft_leaves_out_or_empty_are_allowed(tmp_path: Path) -> None:
    model, bank, expected = saved(tmp_path / "a", "llama, attention")
    change(
        tmp_path / "a",
        rank_pattern=None,
        alpha_pattern="absent",
        use_dora=False,
        lora_bias="absent",
        use_rslora="absent",
        modules_to_save=None,
        lora_dropout="absent",
        bias=None,
        target_modules="q_proj",
    )
    bank.load("b", tmp_path / "a")
    assert torch.equal(ours(model, bank, "llama", "b"), expected)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    _, bank, _ = saved(tmp_path / "a", "llama, attention")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        content = (tmp_path / "a" / name).read_bytes()
        for broken in (content[: len(content) // 2], b"", b"\xff\xfe rubbish"):
            (tmp_path / "a" / name).write_bytes(broken)
            with pytest.raises(CheckpointError, match="cannot be read"):
                load_folder(tmp_path / "a")
        (tmp_path / "a" / name).unlink()
        with pytest.raises(CheckpointError, match=f"is no PEFT adapter folder: {name} is missing"):
            bank.load("b", tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(content)
    for other in ("3", "[1]", '"LORA"', "[]"):
        (tmp_path / "a" / CONFIG_NAME).write_text(other)
        with pytest.raises(CheckpointError, match=r"cannot be read|only LORA"):
            load_folder(tmp_path / "a")


def test_another_backbone_is_told_by_its_fingerprint(tmp_path: Path) -> None:
    model = make("llama", "int8")
    origin = {"task": "causal-lm", "backbone": "this", "revision": None, "fingerprint": fingerprint(model)}
    bank = AdapterBank(model, origin)
    bank.add("a", rank=2)
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    other = make("llama", "fp8")
    other_bank = AdapterBank(other, origin | {"backbone": "that", "fingerprint": fingerprint(other)})
    with pytest.raises(
        CheckpointError,
        match=f"trained over backbone this .*{fingerprint(model)}.* but this one is that .*{fingerprint(other)}",
    ):
        other_bank.load("a", tmp_path / "a")
    assert not other_bank
    bank.load("b", tmp_path / "a")
    AdapterBank(make("llama")).load("a", tmp_path / "a")  # a bank that knows no fingerprint takes it


def test_names_are_checked_on_the_way_in_too(tmp_path: Path) -> None:
    _, bank, _ = saved(tmp_path / "a", "llama, attention")
    for name in ("../x", "a", "A", "model"):
        with pytest.raises(ConfigError):
            bank.load(name, tmp_path / "a")


def test_a_layer_whose_name_ends_anothers(tmp_path: Path) -> None:
    """'0' is a suffix of 'block.0' and a path of its own."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    bank = AdapterBank(model)
    bank.add("a", rank=2, targets=["(0)"])
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    assert list(bank.load("b", tmp_path / "a").deltas) == ["0"]


def test_a_plain_module_of_any_model(tmp_path: Path) -> None:
    model = quantize_model_(plain_net())
    bank = AdapterBank(model)
    excite(bank.add("a", rank=2, targets=["first", "table"], plain=["block", "head", "norm"]))
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    expected = ours(model, bank, "llama")
    assert expected.shape == (4, LABELS)
    bank.load("b", tmp_path / "a")
    assert torch.equal(ours(model, bank, "llama", "b"), expected)


def test_a_new_classification_head_goes_with_the_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_model("llama").save_pretrained(folder)  # type: ignore[operator]
    options: dict[str, Any] = {"task": "sequence-classification", "num_labels": LABELS, "scheme": "none"}
    model = load_backbone(str(folder), **options)
    model.config.pad_token_id = 0  # type: ignore[union-attr]
    bank = AdapterBank(
        model, {"task": "sequence-classification", "backbone": str(folder), "revision": None, "fingerprint": None}
    )
    excite(bank.add("a", rank=2, targets=["q_proj"], plain=["score"]))
    bank["a"].save_pretrained(tmp_path / "a")  # type: ignore[union-attr, operator]
    expected = ours(model, bank, "llama")
    theirs = peft.PeftModel.from_pretrained(load_backbone(str(folder), **options), str(tmp_path / "a")).eval()
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        assert close(logits_of(theirs, tiny_inputs("llama")), expected)


def test_plain_modules_of_no_model_are_left_out_if_they_hold_nothing(tmp_path: Path) -> None:
    """PEFT lists both 'classifier' and 'score' for every sequence classifier."""
    model, bank, expected = saved(tmp_path / "a", "llama, plain norm")
    change(tmp_path / "a", modules_to_save=["model.norm", "score"])
    bank.load("b", tmp_path / "a")
    assert torch.equal(ours(model, bank, "llama", "b"), expected)
    change(tmp_path / "a", modules_to_save=["nrom"])
    with pytest.raises(CheckpointError, match=r"unexpected \['model.norm.weight'\]"):
        bank.load("c", tmp_path / "a")
    assert list(bank) == ["a", "b"]


def test_the_table_that_peft_saves_beneath_an_embeddings_delta_must_be_this_one(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make("llama"), lora_config(target_modules=["embed_tokens"])).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "a" / WEIGHTS_NAME)
    for scheme in ("none", "int8", "int8-blockwise", "fp8"):
        bank = bank_over(make("llama", scheme), "llama")
        assert "base_layer" not in str(list(bank.load("a", tmp_path / "a").state_dict()))
        bank["a"].save_pretrained(tmp_path / "b")  # type: ignore[union-attr, operator]
        assert key not in load_file(tmp_path / "b" / WEIGHTS_NAME)
    for wrong in (
        lambda t: t[key].mul_(1.5),
        lambda t: t.update({key: torch.zeros(100, 32)}),
        lambda t: t[key][0].fill_(math.nan),
    ):
        theirs.save_pretrained(str(tmp_path / "a"))
        change(tmp_path / "a", wrong)
        with pytest.raises(CheckpointError, match=r"embed_tokens\.base_layer\.weight"):
            bank.load("c", tmp_path / "a")
        assert list(bank) == ["a"]
