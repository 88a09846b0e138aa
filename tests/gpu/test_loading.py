"""On CUDA: streamed matrices have the CPU's codes whatever the device is busy with; staging is small; nothing is left
behind."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.load_memory import write_folder
from finetuna_lightning import shards
from finetuna_lightning.adapters import tensor_bytes
from finetuna_lightning.backbone import fingerprints, load_backbone, quantized_layers, save_backbone
from finetuna_lightning.errors import BackboneError
from finetuna_lightning.ops import reference
from finetuna_lightning.shards import QuantizingStream, read_header, read_tensors
from tests.helpers.models import tiny_folder

SCHEMES = ("int8", "int8-blockwise", "fp8")
MIB = 1 << 20


def cuda() -> torch.device:
    return torch.device("cuda")


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.cpu(), right.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_streamed_matrices_have_the_references_codes(
    scheme: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pieces through few buffers, the device kept busy, so that a copy into a buffer still in use would show."""
    monkeypatch.setattr(shards, "PIECE_BYTES_CUDA", 1 << 16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1023, 517), (64, 4096), (1, 7), (3001, 129)]
    tensors = {str(i): torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "f")
    for _ in range(3):
        stream = QuantizingStream(read_header(tmp_path / "f"), scheme, 64, cuda())
        torch.cuda._sleep(50_000_000)
        taken = {name: stream.take(name) for name in stream.entries}
        stream.finish()
        assert stream.not_finite() is None
        stream.close()
        for name, got in taken.items():
            assert got is not None and got[0].is_cuda
            codes, scale = reference.quantize(tensors[name].cuda(), scheme)
            assert same(got[0], codes) and same(got[1], scale)
            codes, scale = reference.quantize(tensors[name], scheme)
            assert same(got[1], scale)
            far = (got[0].cpu().int() - codes.int()).abs()
            assert far.max() <= (0 if scheme == "int8" else 1) and (far > 0).float().mean() < 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantising_in_pieces_is_quantising_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(2049, 513, device="cuda", dtype=torch.bfloat16)
    whole = reference.quantize(weight, scheme)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS_GPU", 1 << 14)
    for form in (weight, weight.t().contiguous().t()):  # the second is gathered row by row, or for blocks as a whole
        pieces = reference.quantize(form, scheme)
        assert same(pieces[0], whole[0]) and same(pieces[1], whole[1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_folder_and_its_saved_form(name: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES_CUDA", 1 << 10)
    folder = tiny_folder(tmp_path / "m", name, dtype=torch.bfloat16, max_shard_size="30KB")
    on_cpu = quantized_layers(load_backbone(folder, scheme=scheme))
    model: Any = load_backbone(folder, scheme=scheme, device="cuda", dtype=torch.bfloat16)
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    for path, matrix in quantized_layers(model).items():
        far = (matrix.codes.cpu().int() - on_cpu[path].codes.int()).abs()
        assert far.max() <= 1 and (far > 0).float().mean() < 1e-3
    save_backbone(model, tmp_path / "q")
    torch.cuda._sleep(50_000_000)
    again: Any = load_backbone(str(tmp_path / "q"), scheme=scheme, device="cuda", dtype=torch.bfloat16)
    assert fingerprints(again) == fingerprints(model)
    assert all(t.is_cuda for t in (*again.parameters(), *again.buffers()))
    assert all(same(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    if name != "mixtral":  # experts of 16 features are below what their grouped products take
        ids = torch.arange(12, device="cuda").view(1, 12)
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    file, name = Path(folder) / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name][-1, -1] = math.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=f"cannot quantise '{name}': the weight holds NaN or infinity"):
        load_backbone(folder, device="cuda")


def test_tensors_of_every_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES_CUDA", 1 << 12)
    tensors = {
        "codes": torch.randint(-127, 128, (700, 311), dtype=torch.int8),
        "scale": torch.randn(70_001),
        "half": torch.randn(5, 6, 7).bfloat16(),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "f")
    for _ in range(3):
        torch.cuda._sleep(20_000_000)
        got = read_tensors(read_header(tmp_path / "f"), cuda())
        assert all(got[name].is_cuda and same(got[name], tensor) for name, tensor in tensors.items())


def test_the_16_bit_model_is_never_on_the_device(tmp_path: Path) -> None:
    """The largest matrix alone is 512 MiB in 16 bits; what is allowed for staging is half of that."""
    config = transformers.LlamaConfig(
        vocab_size=131072, hidden_size=2048, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    write_folder(tmp_path / "m", config, 10**9)
    load_backbone("quickstart", device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_backbone(str(tmp_path / "m"), device="cuda", dtype=torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < tensor_bytes(model) + 256 * MIB
    assert torch.cuda.memory_allocated() - before < tensor_bytes(model) + 4 * MIB  # staging is gone
    save_backbone(model, tmp_path / "q")
    marks = fingerprints(model)
    del model
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_backbone(str(tmp_path / "q"), device="cuda", dtype=torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < tensor_bytes(model) + 4 * MIB
    assert fingerprints(model) == marks


def test_a_stream_waits_for_what_was_ordered_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the current stream has still to write, freed before it got there, is what the stream is given."""
    monkeypatch.setattr(shards, "PIECE_BYTES_CUDA", 1 << 20)
    tensors = {str(i): torch.randn(1024, 2048).bfloat16() for i in range(8)}
    save_file(tensors, tmp_path / "f")
    wanted = {name: reference.quantize(tensor, "int8")[0] for name, tensor in tensors.items()}
    torch.cuda.empty_cache()
    for _ in range(3):
        old = [torch.empty(1024, 2048, dtype=torch.int8, device="cuda") for _ in tensors]
        torch.cuda._sleep(100_000_000)
        for tensor in old:
            tensor.fill_(5)
        del old, tensor
        stream = QuantizingStream(read_header(tmp_path / "f"), "int8", 64, cuda())
        taken = {name: stream.take(name) for name in tensors}
        stream.finish()
        stream.close()
        assert all(got is not None and same(got[0], wanted[name]) for name, got in taken.items())


def test_the_allocator_asks_once_and_never_for_more_than_there_is() -> None:
    torch.cuda.empty_cache()
    before, calls = torch.cuda.memory_reserved(), torch.cuda.memory_stats()["num_device_alloc"]
    shards.reserve([20 * MIB] * 10, cuda())
    held = [torch.empty(20 * MIB, dtype=torch.uint8, device="cuda") for _ in range(10)]
    assert torch.cuda.memory_reserved() - before <= 202 * MIB
    assert torch.cuda.memory_stats()["num_device_alloc"] - calls == 1
    del held
    shards.reserve([20 * MIB] * 10, cuda())  # what the allocator holds will do
    assert torch.cuda.memory_stats()["num_device_alloc"] - calls == 1
    shards.reserve([1 << 50], cuda())
    assert torch.cuda.memory_stats()["num_device_alloc"] - calls == 1


def test_threads_take_turns_as_before_once_it_is_loaded(tmp_path: Path) -> None:
    usual = sys.getswitchinterval()
    save_file({"x": torch.ones(8, 8)}, tmp_path / "f")
    stream = shards.TensorStream(read_header(tmp_path / "f"), cuda())
    assert sys.getswitchinterval() < usual
    stream.close()
    stream.close()
    assert sys.getswitchinterval() == usual
