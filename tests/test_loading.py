"""Hugging Face folders are streamed into 8 bits where a matrix needs nothing else, and read as transformers does where
it does; the result is the same either way."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, modeling_utils
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming

from benchmarks import w8
from finetuna_lightning import loading, shards
from finetuna_lightning.backbone import AUTO_CLASSES, fingerprints, load_backbone, quantize_model_, save_backbone
from finetuna_lightning.errors import BackboneError
from tests.helpers.models import ARCHITECTURES, LABELS, logits_of, task_of, tiny_folder, tiny_inputs

MATRICES = 16  # of the tiny Llama
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Any:
    before = modeling_utils.safe_open  # type: ignore[attr-defined]
    yield
    assert modeling_utils.safe_open is before  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "finetuna-reader"]


@pytest.fixture(autouse=True)
def streaming_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, in everything but the copy to it."""
    monkeypatch.setattr(loading, "STREAMED", ("cpu", "cuda"))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were streamed, in order."""
    names: list[str] = []
    take = shards.QuantizingStream.take

    def seen(self: shards.QuantizingStream, name: str) -> Any:
        got = take(self, name)
        names.extend([name] if got is not None else [])
        return got

    monkeypatch.setattr(shards.QuantizingStream, "take", seen)
    return names


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What each stream was begun with."""
    keys: list[set[str]] = []
    start = loading._Files._start

    def seen(self: Any, entries: dict[str, shards.Entry]) -> None:
        keys.append(set(entries))
        start(self, entries)

    monkeypatch.setattr(loading._Files, "_start", seen)
    return keys


def change(folder: str, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace (or, with None, remove) tensors of the folder's only file."""
    file = Path(folder) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, file, {"format": "pt"})


def same_as_whole(model: Any, folder: str, task: str = "causal-lm", scheme: str = "int8") -> bool:
    whole = AUTO_CLASSES[task].from_pretrained(folder, dtype="auto").eval()
    return fingerprints(model) == fingerprints(quantize_model_(whole, scheme))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_streamed(
    name: str, tmp_path: Path, streamed: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for GPT-2's Conv1D, whose rows are the file's columns; that is said, once."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 700)
    folder = tiny_folder(tmp_path / "m", name)
    with caplog.at_level(logging.INFO, "finetuna_lightning.loading"):
        model = load_backbone(folder, task=task_of(name), num_labels=LABELS)
    said = [record.getMessage() for record in caplog.records if record.name == "finetuna_lightning.loading"]
    assert same_as_whole(model, folder, task_of(name))
    assert len(streamed) == len(fingerprints(model)) - (8 if name == "gpt2" else 0)
    assert [text.split(":")[0] for text in said] == (
        ["8 of 10 matrices were read one at a time, not ahead"] if name == "gpt2" else []
    )


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8"])
def test_shards_and_pieces(scheme: str, tmp_path: Path, streamed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 300)
    folder = tiny_folder(tmp_path / "m", dtype=torch.bfloat16, max_shard_size="20KB")
    assert same_as_whole(load_backbone(folder, scheme=scheme), folder, scheme=scheme)
    assert len(streamed) == MATRICES == len(set(streamed))


@pytest.mark.parametrize("tie", [True, False])
def test_a_body_without_its_prefix_is_streamed_too(tie: bool, tmp_path: Path, streamed: list[str]) -> None:
    folder = tiny_folder(tmp_path / "m", tie_word_embeddings=tie)
    tensors = load_file(Path(folder) / "model.safetensors")
    bare = {name: None for name in tensors if name.startswith("model.")}
    change(folder, bare | {name.removeprefix("model."): tensors[name] for name in bare})
    model: Any = load_backbone(folder)
    assert same_as_whole(model, folder) and len(streamed) == MATRICES - tie
    assert (model.lm_head.quantized is model.model.embed_tokens.quantized) == tie


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_another_type_than_the_config_says(stored: torch.dtype, tmp_path: Path, streamed: list[str]) -> None:
    """transformers casts them first, and so they are quantised."""
    folder = tiny_folder(tmp_path / "m", dtype=torch.bfloat16)
    name = UP.format(1)
    change(folder, {name: load_file(Path(folder) / "model.safetensors")[name].to(stored)})
    config = json.loads((Path(folder) / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (Path(folder) / "config.json").write_text(json.dumps(config))
    assert same_as_whole(load_backbone(folder), folder)
    assert (name in streamed) == (stored == torch.bfloat16) and len(streamed) >= MATRICES - 1


def test_weights_that_transformers_keeps_in_32_bits(tmp_path: Path, streamed: list[str]) -> None:
    """T5's ``wo`` in float16: cast before it is quantised, so not streamed, and what comes after it still is."""
    folder = tiny_folder(tmp_path / "m", "t5", dtype=torch.float16)
    model = load_backbone(folder, task="seq2seq-lm")
    assert same_as_whole(model, folder, "seq2seq-lm")
    assert len(streamed) == len(fingerprints(model)) - 4 and not any(".wo." in name for name in streamed)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register conversions of Llama checkpoints with transformers, for one test."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    cache = dict(conversion_mapping._checkpoint_conversion_mapping_cache or {})
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", cache)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    return lambda *mapping: conversion_mapping.register_checkpoint_conversion_mapping(
        "LlamaForCausalLM", list(mapping), overwrite=True
    )


def test_a_renamed_a_split_and_a_transposed_matrix_are_read_as_transformers_does(
    conversions: Any, tmp_path: Path, streamed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_folder(tmp_path / "m")
    plain = load_backbone(folder)
    assert len(streamed) == MATRICES
    streamed.clear()
    layer = "model.layers.0."
    tensors = {k.removeprefix(layer): t for k, t in load_file(Path(folder) / "model.safetensors").items()}
    changes: dict[str, torch.Tensor | None] = {
        layer + "mlp.old_down.weight": tensors["mlp.down_proj.weight"].clone(),
        layer + "mlp.both.weight": torch.cat([tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]]),
        layer + "self_attn.q_proj.weight": tensors["self_attn.q_proj.weight"]
        .t()
        .contiguous(),  # square: no shape tells
    }
    changes |= dict.fromkeys(layer + f"mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
    change(folder, changes)
    q_proj = r"layers\.0\.self_attn\.q_proj\.weight"
    conversions(
        WeightRenaming(r"mlp\.old_down\.", "mlp.down_proj."),
        WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(0)]),
        WeightConverter(q_proj, q_proj.replace("\\", ""), [Transpose(0, 1)]),
    )
    with caplog.at_level(logging.INFO, "finetuna_lightning.loading"):
        model = load_backbone(folder)
    assert fingerprints(model) == fingerprints(plain)
    assert len(streamed) == MATRICES - 4
    assert f"4 of {MATRICES} matrices were read one at a time" in caplog.text
    assert torch.equal(logits_of(model, tiny_inputs("llama")), logits_of(plain, tiny_inputs("llama")))


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_shard_that_is_cut_short(where: str, tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "m", max_shard_size="20KB"))
    file = sorted(folder.glob("*.safetensors"))[0 if where == "first" else -1]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(BackboneError, match=f"{file.name} is cut short: it has") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)


def test_a_shard_that_shrinks_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m")
    start = shards.QuantizingStream.__init__

    def shrink(self: shards.QuantizingStream, entries: dict[str, shards.Entry], *more: Any) -> None:
        entries = {
            name: shards.Entry(e.path, e.offset + (1 << 30), e.size, e.dtype, e.shape) for name, e in entries.items()
        }
        start(self, entries, *more)

    monkeypatch.setattr(shards.QuantizingStream, "__init__", shrink)
    with pytest.raises(
        BackboneError, match=r"cannot quantise '.*weight': .* is cut short: there is nothing after"
    ) as error:
        load_backbone(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["lm_head.weight", UP.format(1), "model.embed_tokens.weight"])
@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8"])
def test_a_weight_that_is_not_finite_is_named(scheme: str, key: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", dtype=torch.bfloat16)
    bad = load_file(Path(folder) / "model.safetensors")[key].clone()
    bad[-1, -1] = float("nan")
    change(folder, {key: bad})
    with pytest.raises(BackboneError, match=f"cannot quantise '{key}': the weight holds NaN or infinity"):
        load_backbone(folder, scheme=scheme)


def test_a_missing_and_a_misshapen_matrix(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    change(folder, {UP.format(0): None})
    with pytest.raises(BackboneError, match=r"is not complete: it lacks the weights of model\.layers\.0\.mlp\.up_proj"):
        load_backbone(folder)
    change(folder, {UP.format(0): torch.zeros(48, 31)})
    with pytest.raises(BackboneError, match=r"cannot quantise .*it is \(48, 31\) in the checkpoint, \(48, 32\)"):
        load_backbone(folder)


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise"])
def test_reading_starts_before_there_is_a_model(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[set[str]], streamed: list[str]
) -> None:
    """With what will be streamed, so that it is begun once; skipped modules, and what is not a matrix, are left out."""
    folder = tiny_folder(tmp_path / "m", dtype=torch.bfloat16, max_shard_size="20KB")
    order: list[str] = []
    made = loading.AUTO_CLASSES["causal-lm"].from_pretrained
    monkeypatch.setattr(
        loading.AUTO_CLASSES["causal-lm"],
        "from_pretrained",
        lambda *a, **o: (order.append(f"{len(begun)}"), made(*a, **o))[1],
    )
    model = load_backbone(folder, scheme=scheme, skip=["lm_head", "k_proj"])
    assert order == ["1"] and len(begun) == 1 and begun[0] == set(streamed) and len(streamed) == MATRICES - 3
    assert same_as_whole(load_backbone(folder, scheme=scheme), folder, scheme=scheme) and len(begun) == 2
    assert "lm_head" not in fingerprints(model)


@pytest.mark.parametrize(("name", "task"), [("gpt2", "causal-lm"), ("llama", "sequence-classification")])
def test_a_wrong_guess_is_dropped(
    name: str, task: str, tmp_path: Path, begun: list[set[str]], streamed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's transposed layers, and the head of another task: the stream is begun again with what it should hold."""
    folder = tiny_folder(tmp_path / "m", name)
    closed: list[int] = []
    close = shards.QuantizingStream.close
    monkeypatch.setattr(shards.QuantizingStream, "close", lambda self: (closed.append(len(self.taken)), close(self))[1])
    model = load_backbone(folder, task=task)
    assert len(begun) == 2 and begun[1] < begun[0] and begun[1] == set(streamed)
    assert closed == [0, len(streamed)]
    whole = fingerprints(quantize_model_(AUTO_CLASSES[task].from_pretrained(folder, dtype="auto")))
    assert fingerprints(model).items() <= whole.items()  # a new head is drawn, and not quantised


def test_a_model_goes_on_being_made_while_its_codes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading is not waited for before the whole model is there, and is over when it is handed out."""
    folder = tiny_folder(tmp_path / "m")
    made = threading.Event()
    use, finish = shards.QuantizingStream._use, shards.QuantizingStream.finish

    def late(self: shards.QuantizingStream, index: int, staging: shards.Staging) -> None:
        assert made.wait(60)
        use(self, index, staging)

    def seen(self: shards.QuantizingStream) -> None:
        made.set()
        finish(self)

    monkeypatch.setattr(shards.QuantizingStream, "_use", late)
    monkeypatch.setattr(shards.QuantizingStream, "finish", seen)
    model = load_backbone(folder)
    monkeypatch.undo()
    assert same_as_whole(model, folder)


def test_a_saved_folder_is_read_while_its_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, and once; for another task, without the head that it has no use for."""
    model = load_backbone(tiny_folder(tmp_path / "m"))
    save_backbone(model, tmp_path / "q")
    made, begun = threading.Event(), []
    start, one = shards.TensorStream.__init__, shards.TensorStream._one
    finish = shards.TensorStream.finish

    def seen(self: shards.TensorStream, entries: dict[str, shards.Entry], *more: Any) -> None:
        begun.append(set(entries))
        start(self, entries, *more)

    def late(self: shards.TensorStream, *span: Any) -> None:
        assert made.wait(60)
        one(self, *span)

    monkeypatch.setattr(shards.TensorStream, "__init__", seen)
    monkeypatch.setattr(shards.TensorStream, "_one", late)
    monkeypatch.setattr(shards.TensorStream, "finish", lambda self: (made.set(), finish(self))[1])
    again = load_backbone(str(tmp_path / "q"))
    assert fingerprints(again) == fingerprints(model) and len(begun) == 1
    load_backbone(str(tmp_path / "q"), task="sequence-classification")
    assert len(begun) == 3 and begun[1] - begun[2] == {"lm_head.codes", "lm_head.scale"}


def test_a_cpu_quantises_from_the_mapped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, streamed: list[str]
) -> None:
    monkeypatch.undo()
    folder = tiny_folder(tmp_path / "m")
    with caplog.at_level(logging.INFO, "finetuna_lightning.loading"):
        model = load_backbone(folder)
    assert same_as_whole(model, folder) and not streamed and "one at a time" not in caplog.text
    assert loading.STREAMED == ("cuda",)


def test_a_transformers_that_opens_files_otherwise_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, streamed: list[str]
) -> None:
    """Nothing of ours is asked to open the files: they are read one tensor at a time, and that is said."""
    folder = tiny_folder(tmp_path / "m")
    stopped: list[int] = []
    close = shards.QuantizingStream.close
    monkeypatch.setattr(
        shards.QuantizingStream, "close", lambda self: (stopped.append(len(self.taken)), close(self))[1]
    )
    monkeypatch.setattr("finetuna_lightning.loading._Files.open", lambda self, *a, **o: self.safe_open(*a, **o))
    with caplog.at_level(logging.INFO, "finetuna_lightning.loading"):
        model = load_backbone(folder)
    assert same_as_whole(model, folder) and not streamed and stopped == [0]  # the guess's, at the first matrix
    assert f"{MATRICES} of {MATRICES} matrices were read one at a time" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_benchmark_finds_both_forms_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--layers", "2", "--hidden", "512", "--vocabulary", "4000", "--runs", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["w8", *options])
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)  # for good, that would be
    assert w8.main() == 0
    said = capsys.readouterr().out
    assert "codes that differ from the reference's: 0.0e+00; both forms the same: True" in said
    assert "saved: loading / reading" in said
