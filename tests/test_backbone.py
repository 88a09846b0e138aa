"""Loading straight into 8 bits: what quantising the whole model gives, from every kind of folder, or one clear line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from finetuna_lightning.adapters import AdapterBank, tensor_bytes
from finetuna_lightning.backbone import (
    AUTO_CLASSES,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    cast_,
    enable_checkpointing,
    fingerprint,
    fingerprints,
    load_backbone,
    load_saved_into,
    quantize_model_,
    quantized_layers,
    read_config,
    read_info,
    recompute_in_training,
    resolve_folder,
    save_backbone,
    skeleton,
)
from finetuna_lightning.errors import BackboneError, TargetError
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear
from tests.helpers.models import (
    LABELS,
    excite,
    logits_of,
    plain_net,
    task_of,
    tiny_config,
    tiny_folder,
    tiny_inputs,
    tiny_model,
)
from tests.helpers.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[1]
SCHEMES = ("int8", "int8-blockwise", "fp8", "none")


def pretrained(folder: str, task: str = "causal-lm") -> Any:
    return AUTO_CLASSES[task].from_pretrained(folder, dtype="auto").eval()


def same(left: nn.Module, right: nn.Module, inputs: dict[str, torch.Tensor]) -> bool:
    return torch.equal(logits_of(left, inputs), logits_of(right, inputs))


# ---- any module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_module_is_quantised_in_place(scheme: str) -> None:
    model = plain_net()
    inputs = tiny_inputs("llama")
    before = logits_of(model, inputs)
    assert quantize_model_(model, scheme) is model
    assert not any(p.requires_grad for p in model.parameters())
    if scheme == "none":
        assert not quantized_layers(model) and torch.equal(logits_of(model, inputs), before)
        return
    assert set(quantized_layers(model)) == {"table", "block.0", "block.2", "first", "head"}
    assert model.first.quantized is model.second.quantized and type(model.second) is QuantizedLinear
    assert type(model.norm) is nn.LayerNorm
    error = (logits_of(model, inputs) - before).norm() / before.norm()
    assert 0 < error < 0.1


def test_a_second_call_changes_nothing() -> None:
    model = quantize_model_(plain_net())
    marks = fingerprints(model)
    quantize_model_(model, "fp8")
    assert fingerprints(model) == marks and len(marks) == 5


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["head"], {"head"}),
        (["block"], {"block.0", "block.2"}),
        (["block.0", "table"], {"block.0", "table"}),
        ([r"block\.\d"], {"block.0", "block.2"}),
        (["second"], {"first", "second"}),  # a tied layer goes with its twin
    ],
)
def test_modules_to_skip(skip: list[str], left: set[str]) -> None:
    model = quantize_model_(plain_net(), skip=skip)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert {p for p, m in layers.items() if not isinstance(m, QuantizedLinear | QuantizedEmbedding)} == left
    assert all(isinstance(layers[path].weight, nn.Parameter) and not layers[path].weight.requires_grad for path in left)
    assert model.first.weight is model.second.weight or "second" not in left


def test_a_skip_that_matches_nothing() -> None:
    with pytest.raises(TargetError, match=r"skip_modules: no module matches 'haed'; did you mean 'head'\?"):
        quantize_model_(plain_net(), skip=["head", "haed"])


def test_a_weight_that_cannot_be_quantised_is_named() -> None:
    model = plain_net()
    with torch.no_grad():
        model.block[2].weight[0, 0] = math.nan
    with pytest.raises(
        BackboneError, match=r"cannot quantise 'block\.2': the weight holds NaN or infinity; name it in skip_modules"
    ):
        quantize_model_(model)

    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(
        BackboneError, match=r"cannot quantise '0': Doubling is a linear layer with a forward of its own"
    ):
        quantize_model_(nn.Sequential(Doubling(4, 4)))
    assert type(quantize_model_(nn.Sequential(Doubling(4, 4), nn.Linear(4, 4)), skip=["0"])[0]) is Doubling  # type: ignore[index]


def test_fingerprints_name_the_module_that_changed() -> None:
    model = quantize_model_(plain_net())
    before, whole = fingerprints(model), fingerprint(model)
    model.block[2].quantized.codes[1, 1] += 1
    after = fingerprints(model)
    assert {path for path in before if before[path] != after[path]} == {"block.2"} and fingerprint(model) != whole
    assert len(whole) == 16 and fingerprint(plain_net()) == fingerprint(plain_net(seed=1)) != fingerprint(
        nn.Linear(2, 2)
    )


def test_a_cast_leaves_buffers_and_codes() -> None:
    model = quantize_model_(tiny_model("llama"))
    marks = fingerprints(model)
    cast_(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # type: ignore[union-attr]
    assert {q.dtype for q in quantized_layers(model).values()} == {torch.bfloat16} and fingerprints(model) == marks
    assert logits_of(model, tiny_inputs("llama")).dtype == torch.bfloat16


# ---- a Hugging Face folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_loading_is_quantising_the_whole_model(sharded: bool, dtype: torch.dtype, tie: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_shard_size": "20KB"} if sharded else {}
    folder = tiny_folder(tmp_path / "m", dtype=dtype, tie_word_embeddings=tie, **more)
    assert (
        len(list(Path(folder).glob("*.safetensors"))) > 1 if sharded else (Path(folder) / "model.safetensors").is_file()
    )
    model = load_backbone(folder)
    expected = quantize_model_(pretrained(folder)).float()
    assert fingerprints(model) == fingerprints(expected) and same(model, expected, tiny_inputs("llama"))
    assert (model.lm_head.quantized is model.model.embed_tokens.quantized) == tie  # type: ignore[union-attr]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in model.parameters()
    )
    assert not model.training and model.finetuna_new_modules == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "opt"])
def test_other_architectures_and_schemes(name: str, scheme: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", name)
    model = load_backbone(folder, scheme=scheme, block_size=128)
    expected = quantize_model_(pretrained(folder), scheme, 128)
    assert fingerprint(model) == fingerprint(expected) and same(model, expected, tiny_inputs(name))
    assert bool(quantized_layers(model)) == (scheme != "none")
    assert {q.scheme for q in quantized_layers(model).values()} <= {scheme} and {
        q.block_size for q in quantized_layers(model).values()
    } <= {128}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_of_what_is_not_quantised(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_backbone(tiny_folder(tmp_path / "m"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {q.dtype for q in quantized_layers(model).values()}
    assert {b.dtype for n, b in model.named_buffers() if "inv_freq" in n} == {torch.float32}
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_model("llama").model.rotary_emb.inv_freq)  # type: ignore[union-attr]
    assert logits_of(model, tiny_inputs("llama")).dtype == dtype


@pytest.mark.parametrize("tie", [True, False])
def test_skipped_modules_keep_their_weights(tie: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", tie_word_embeddings=tie)
    model: Any = load_backbone(folder, skip=["lm_head", "1.mlp"])
    whole = pretrained(folder)
    assert isinstance(model.lm_head.weight, nn.Parameter) and torch.equal(model.lm_head.weight, whole.lm_head.weight)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert not any("1.mlp" in path or path == "lm_head" for path in quantized_layers(model))
    assert same(model, quantize_model_(whole, skip=["lm_head", "1.mlp"]), tiny_inputs("llama"))
    with pytest.raises(TargetError, match="skip_modules: no module matches 'lm_haed'; did you mean 'lm_head'"):
        load_backbone(folder, skip=["lm_haed"])


def test_the_file_may_go_once_it_is_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    model, expected = load_backbone(folder, skip=["lm_head"]), quantize_model_(pretrained(folder), skip=["lm_head"])
    logits = logits_of(expected, tiny_inputs("llama"))
    file = Path(folder) / "model.safetensors"
    with file.open("r+b") as handle:
        handle.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits_of(model, tiny_inputs("llama")), logits)


def test_loading_draws_nothing_from_the_global_stream(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    before = torch.random.get_rng_state()
    load_backbone(folder, task="sequence-classification", num_labels=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_backbones_own_dropout_is_off(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model = load_backbone(folder).train()
    inputs = tiny_inputs("gpt2")
    assert same(model, model, inputs) and all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_new_classification_head_is_told_and_repeatable(name: str, tmp_path: Path) -> None:
    if name == "bert":
        config = tiny_config("bert", vocab_size=99)
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "m")  # which has no pooler either
        folder, expected = str(tmp_path / "m"), ["bert.pooler.dense", "classifier"]
    else:
        folder, expected = tiny_folder(tmp_path / "m", name), ["score"]
    model: Any = load_backbone(folder, task="sequence-classification", num_labels=5)
    again: Any = load_backbone(folder, task="sequence-classification", num_labels=5)
    assert model.finetuna_new_modules == expected and model.config.num_labels == 5
    model.config.pad_token_id = again.config.pad_token_id = 0
    inputs = tiny_inputs("llama")
    assert logits_of(model, inputs).shape == (4, 5) and same(model, again, inputs)
    assert fingerprint(model) == fingerprint(again)
    assert (
        load_backbone(
            tiny_folder(tmp_path / "b", "bert"), task="sequence-classification", num_labels=LABELS
        ).finetuna_new_modules
        == []
    )


# ---- the saved 8-bit form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("gpt2", {}),
        ("bert", {}),
        ("t5", {}),
        ("gemma3", {}),
        ("mixtral", {}),
    ],
    ids=str,
)
def test_saved_and_loaded_again_is_the_same(name: str, more: dict[str, Any], scheme: str, tmp_path: Path) -> None:
    task = task_of(name)
    options = {"scheme": scheme, "block_size": 128, "task": task, "num_labels": LABELS}
    model = load_backbone(tiny_folder(tmp_path / "m", name, **more), **options)
    assert save_backbone(model, tmp_path / "q") == tmp_path / "q"
    shutil.rmtree(tmp_path / "m")
    again = load_backbone(str(tmp_path / "q"), **options)
    assert same(model, again, tiny_inputs(name)) and fingerprints(model) == fingerprints(again)
    assert tensor_bytes(model) == tensor_bytes(again) and again.finetuna_new_modules == []
    assert not any(p.requires_grad for p in again.parameters()) and not any(
        t.is_meta for t in (*again.parameters(), *again.buffers())
    )
    manifest = json.loads((tmp_path / "q" / MANIFEST_NAME).read_text())
    assert manifest["scheme"] == scheme and manifest["fingerprint"] == fingerprint(model)


def test_a_saved_folder_holds_every_matrix_once(tmp_path: Path) -> None:
    model = load_backbone(tiny_folder(tmp_path / "m", tie_word_embeddings=True))
    save_backbone(model, tmp_path / "q", byte_tokenizer())
    tensors = load_file(tmp_path / "q" / WEIGHTS_NAME)
    assert sum(key.endswith(".codes") for key in tensors) == 15 and "lm_head.codes" not in tensors
    stored = sum(t.numel() * t.itemsize for t in tensors.values())
    assert stored <= tensor_bytes(model) and (tmp_path / "q" / WEIGHTS_NAME).stat().st_size < 1.5 * stored
    assert read_info(str(tmp_path / "q"), "causal-lm").tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]


def test_saving_with_skipped_modules(tmp_path: Path) -> None:
    for tie in (True, False):
        model = load_backbone(tiny_folder(tmp_path / "m", tie_word_embeddings=tie), skip=["lm_head", "norm"])
        save_backbone(model, tmp_path / "q")
        again: Any = load_backbone(str(tmp_path / "q"))
        assert same(model, again, tiny_inputs("llama")) and isinstance(again.lm_head.weight, nn.Parameter)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie


def test_saving_over_a_routed_backbone_saves_the_backbone(tmp_path: Path) -> None:
    model = load_backbone(tiny_folder(tmp_path / "m"))
    bank = AdapterBank(model)
    excite(bank.add("a", rank=2, plain=["lm_head"]))
    save_backbone(model, tmp_path / "q")
    with bank.bare():
        expected = logits_of(model, tiny_inputs("llama"))
    assert torch.equal(logits_of(load_backbone(str(tmp_path / "q")), tiny_inputs("llama")), expected)
    assert not any("lora" in key for key in load_file(tmp_path / "q" / WEIGHTS_NAME))


@pytest.mark.parametrize("tie", [True, False])
def test_another_task_over_a_saved_backbone(tie: bool, tmp_path: Path) -> None:
    causal: Any = load_backbone(tiny_folder(tmp_path / "m", tie_word_embeddings=tie))
    save_backbone(causal, tmp_path / "q")
    options: dict[str, Any] = {"task": "sequence-classification", "num_labels": 4}
    model: Any = load_backbone(str(tmp_path / "q"), **options)
    again: Any = load_backbone(str(tmp_path / "q"), **options)
    inputs = tiny_inputs("llama")
    assert (
        model.finetuna_new_modules == ["score"]
        and logits_of(model, inputs).shape == (4, 4)
        and same(model, again, inputs)
    )
    assert torch.equal(model.model(**inputs).last_hidden_state, causal.model(**inputs).last_hidden_state)
    assert 0.005 < float(model.score.weight.detach().std()) < 0.05 and not model.score.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "fp8"}, "is stored as int8, not fp8: set backbone.scheme=int8"),
        ({"scheme": "none"}, "is stored as int8, not none: set backbone.scheme=int8"),
        ({"skip": ["lm_head"]}, "is stored in 8 bits: skip_modules"),
    ],
)
def test_a_saved_folder_has_its_own_scheme(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_backbone(load_backbone(tiny_folder(tmp_path / "m")), tmp_path / "q")
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(tmp_path / "q"), **options)


def test_a_saved_folder_has_its_own_block_size(tmp_path: Path) -> None:
    save_backbone(load_backbone(tiny_folder(tmp_path / "m"), scheme="int8-blockwise", block_size=64), tmp_path / "q")
    with pytest.raises(BackboneError, match="is stored as int8-blockwise with block_size 64, not"):
        load_backbone(str(tmp_path / "q"), scheme="int8-blockwise", block_size=128)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.codes", "model.norm.weight", "lm_head.scale"])
def test_a_saved_folder_that_is_not_complete(lost: str, tmp_path: Path) -> None:
    save_backbone(load_backbone(tiny_folder(tmp_path / "m")), tmp_path / "q")
    tensors = load_file(tmp_path / "q" / WEIGHTS_NAME)
    del tensors[lost]
    save_file(tensors, tmp_path / "q" / WEIGHTS_NAME)
    for task in ("causal-lm", "sequence-classification"):
        if task == "causal-lm" or "lm_head" not in lost:
            with pytest.raises(BackboneError, match=lost.rpartition(".")[0]):
                load_backbone(str(tmp_path / "q"), task=task)


def test_a_saved_folder_that_is_cut_short_or_of_another_shape(tmp_path: Path) -> None:
    save_backbone(load_backbone(tiny_folder(tmp_path / "m")), tmp_path / "q")
    file = tmp_path / "q" / WEIGHTS_NAME
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors | {"model.norm.weight": torch.ones(31)}, file)
    with pytest.raises(BackboneError, match=r"model\.norm\.weight is \(31,\) in the folder, \(32,\) in the model"):
        load_backbone(str(tmp_path / "q"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(BackboneError, match=f"{WEIGHTS_NAME} is cut short") as error:
        load_backbone(str(tmp_path / "q"))
    assert "\n" not in str(error.value)


def test_a_saved_file_may_go_once_it_is_read(tmp_path: Path) -> None:
    model = load_backbone(tiny_folder(tmp_path / "m"), skip=["lm_head"])
    save_backbone(model, tmp_path / "q")
    again = load_backbone(str(tmp_path / "q"))
    with (tmp_path / "q" / WEIGHTS_NAME).open("r+b") as handle:
        handle.write(b"\0" * (tmp_path / "q" / WEIGHTS_NAME).stat().st_size)
    assert same(again, model, tiny_inputs("llama"))


def test_a_model_of_ones_own_is_filled_from_a_saved_folder(tmp_path: Path) -> None:
    model = quantize_model_(plain_net(), "fp8")
    save_backbone(model, tmp_path / "q")
    again = load_saved_into(plain_net(seed=1), tmp_path / "q")
    assert same(model, again, tiny_inputs("llama")) and fingerprint(model) == fingerprint(again)
    assert again.first.quantized is again.second.quantized and not any(p.requires_grad for p in again.parameters())


# ---- folders that are wrong -----------------------------------------------------------------------------------------


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "llama")
    with pytest.raises(
        BackboneError, match=r"backbone folder '.*/lama' does not exist; did you mean 'llama'\?"
    ) as error:
        load_backbone(str(tmp_path / "lama"))
    assert "\n" not in str(error.value)
    with pytest.raises(BackboneError, match=r"backbone folder '\./nowhere/x' does not exist$"):
        resolve_folder("./nowhere/x")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"has no config.json: it is no Hugging Face model folder"):
        load_backbone(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(BackboneError, match=r"cannot be read.*never-heard-of") as error:
        load_backbone(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="cannot be read"):
        load_backbone(str(tmp_path / "empty"))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="cannot be loaded") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)


def test_a_hub_name_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    assert resolve_folder("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    with pytest.raises(BackboneError, match="backbone 'nobody/nothing' cannot be read") as error:
        load_backbone("nobody/nothing")
    assert "\n" not in str(error.value)


def change_checkpoint(folder: str, **changes: torch.Tensor | None) -> None:
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    for key, value in changes.items():
        name = key.replace("__", ".")
        assert name in tensors
        del tensors[name]
        if value is not None:
            tensors[name] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("scheme", ["int8", "none"])
@pytest.mark.parametrize(
    "lost", ["model__layers__1__mlp__up_proj__weight", "model__norm__weight", "model__embed_tokens__weight"]
)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_checkpoint_that_lacks_a_weight(task: str, lost: str, scheme: str, tmp_path: Path) -> None:
    """A new classification head may be missing, and nothing else: it would be random, and nobody told."""
    folder = tiny_folder(tmp_path / "m")
    change_checkpoint(folder, **{lost: None})
    with pytest.raises(
        BackboneError, match=f"not complete: it lacks the weights of {lost.replace('__', '.').rpartition('.')[0]}"
    ):
        load_backbone(folder, scheme=scheme, task=task)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model__layers__1__mlp__up_proj__weight", "model__embed_tokens__weight"])
def test_a_checkpoint_with_nan(name: str, value: float, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    bad = load_file(Path(folder) / "model.safetensors")[name.replace("__", ".")]
    bad[1, 2] = value
    change_checkpoint(folder, **{name: bad})
    with pytest.raises(BackboneError, match=r"cannot quantise '?" + name.replace("__", ".")) as error:
        load_backbone(folder)
    assert "NaN or infinity" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", ["int8", "none"])
def test_a_checkpoint_with_another_shape(scheme: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    change_checkpoint(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(40, 32))
    with pytest.raises(BackboneError, match=r"up_proj") as error:
        load_backbone(folder, scheme=scheme)
    assert "\n" not in str(error.value)


def test_an_architecture_without_that_task(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    with pytest.raises(BackboneError, match=r"seq2seq|Seq2Seq"):
        load_backbone(folder, task="seq2seq-lm")
    with pytest.raises(BackboneError, match="LlamaConfig cannot be loaded for seq2seq-lm"):
        skeleton(read_config(folder), "seq2seq-lm")


# ---- before any weight is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "positions"), [("llama", 64), ("gpt2", 64), ("opt", 64), ("t5", None), ("bert", 64)])
def test_what_the_data_needs_to_know(name: str, positions: int | None, tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "m", name))
    (folder / "model.safetensors").unlink()
    info = read_info(str(folder), task_of(name), 7)
    assert (
        info.max_positions == positions
        and info.vocab_size == 99
        and info.num_labels == 7
        and info.task == task_of(name)
    )
    assert info.tokenizer is None
    byte_tokenizer().save_pretrained(folder)
    assert read_info(str(folder), task_of(name)).tokenizer.vocab_size == 259


def test_a_skeleton_has_names_and_shapes_and_no_bytes() -> None:
    model: Any = skeleton(tiny_config("llama"), "causal-lm")
    real = tiny_model("llama")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, real.model.rotary_emb.inv_freq)  # type: ignore[union-attr]
    assert nn.Linear(2, 2).weight.device.type == "cpu"


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputed_layers_give_the_same_gradients(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m", name)
    recomputed: list[int] = []
    results = []
    for recompute in (False, True):
        model = load_backbone(folder)
        if recompute:
            enable_checkpointing(model)
            recompute_in_training(model, True)
        bank = AdapterBank(model)
        for index, adapter in enumerate(("a", "b")):
            excite(bank.add(adapter, rank=2 + index, dropout=0.3), seed=index)
        layer = next(
            m for path, m in model.named_modules() if path.endswith(("layers.0.self_attn.q_proj", "h.0.attn.c_attn"))
        )
        layer.register_forward_pre_hook(lambda *_: recomputed.append(1))
        with bank.route(["a", "b", "b", "a"], training=True):
            loss = logits_of(model, tiny_inputs(name)).square().mean()
        loss.backward()
        results.append({key: p.grad for key, p in bank.named_parameters()})
    assert len(recomputed) == 3  # one pass, and one with its recomputation
    assert all(grad is not None and torch.equal(grad, results[1][key]) for key, grad in results[0].items())


def test_recomputation_is_for_training_only(tmp_path: Path) -> None:
    model = load_backbone(tiny_folder(tmp_path / "m"))
    enable_checkpointing(model)
    recompute_in_training(model, True)
    assert {m.training for m in model.modules() if getattr(m, "gradient_checkpointing", False)} == {True}
    assert not model.model.layers[0].self_attn.training  # type: ignore[union-attr, index]
    recompute_in_training(model, False)
    assert not any(m.training for m in model.modules())


def test_a_model_without_recomputation() -> None:
    with pytest.raises(
        BackboneError, match="PlainNet does not support gradient checkpointing; set gradient_checkpointing=false"
    ):
        enable_checkpointing(plain_net())


# ---- memory ---------------------------------------------------------------------------------------------------------


LOAD_MEMORY = """
import multiprocessing, os, sys
from benchmarks import load_memory
forked = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda _: forked  # the writer has nothing to import
for options in ([], ["--shard", "60MB"]):
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        sys.argv[1:] = ["--gib", "0.3", *options]
        code = load_memory.main()
        sys.stdout.flush()
        os._exit(code)
    print(options, "exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_16_bit_model_is_never_whole_in_memory() -> None:
    """Whole and in shards, each in a process of its own, forked after the imports; benchmarks/load_memory.py exits with
    1 when the peak is above the allowed."""
    run = subprocess.run([sys.executable, "-c", LOAD_MEMORY], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0 and run.stdout.count("within the allowed") == 2, run.stdout + run.stderr
    assert run.stdout.count("exit code 0") == 2, run.stdout + run.stderr
