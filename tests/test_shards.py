"""Reading ahead: the bytes of the file, in order, in few buffers; quantised as the reference does; damage is named."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetuna_lightning import shards
from finetuna_lightning.errors import BackboneError
from finetuna_lightning.ops import reference
from finetuna_lightning.shards import QuantizingStream, ReadAhead, read_header, read_tensors

CPU = torch.device("cpu")


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "finetuna-reader"]


def matrices(path: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A file of matrices of odd shapes, saved under ``path``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (37, 53), "b": (1, 7), "c": (64, 33), "d": (129, 16)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path)
    return tensors


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 500)


def test_a_header_says_where_every_tensor_lies(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6).view(2, 3), "y": torch.randn(3).half(), "z": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "f", {"format": "pt"})
    header = read_header(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    assert header.keys() == tensors.keys()
    for name, entry in header.items():
        read = torch.frombuffer(bytearray(data[entry.offset : entry.offset + entry.size]), dtype=entry.dtype)
        assert torch.equal(read.view(entry.shape), tensors[name])
    assert [entry.offset for entry in header.values()] == sorted(entry.offset for entry in header.values())


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "f")
    assert read_header(tmp_path / "f") == {} == read_tensors({}, CPU)


def test_a_file_that_is_cut_short_or_is_none(tmp_path: Path) -> None:
    matrices(tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-1])
    with pytest.raises(BackboneError, match=f"is cut short: it has {len(whole) - 1:,} bytes"):
        read_header(tmp_path / "f")
    for damaged in (b"", b"\xff" * 40, (3).to_bytes(8, "little") + b"[1]", whole[:30]):
        (tmp_path / "f").write_bytes(damaged)
        with pytest.raises(BackboneError, match=r"is no safetensors file|is cut short"):
            read_header(tmp_path / "f")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scheme", "block_size"), [("int8", 64), ("fp8", 64), ("int8-blockwise", 64)])
def test_streamed_matrices_are_quantised_as_whole_ones(
    scheme: str, block_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = matrices(tmp_path / "f", dtype)
    order = ["c", "a", "d", "b"]  # not that of the file
    header = read_header(tmp_path / "f")
    stream = QuantizingStream({name: header[name] for name in order}, scheme, block_size, CPU)
    assert stream.parts["a"] > 4
    for name in order:
        got = stream.quantize(name)
        assert got is not None
        codes, scale = reference.quantize(tensors[name], scheme, block_size)
        assert torch.equal(got[0], codes) and torch.equal(got[1], scale)
    assert stream.not_finite() is None
    stream.close()
    assert not readers()


def test_a_matrix_that_was_passed_over_is_not_had_again(tmp_path: Path) -> None:
    tensors = matrices(tmp_path / "f")
    stream = QuantizingStream(read_header(tmp_path / "f"), "int8", 64, CPU)
    got = stream.quantize("c")
    assert got is not None and torch.equal(got[0], reference.quantize(tensors["c"], "int8")[0])
    assert stream.quantize("a") is None and stream.quantize("c") is None and stream.quantize("z") is None
    last = stream.quantize("d")
    assert last is not None and torch.equal(last[0], reference.quantize(tensors["d"], "int8")[0])
    stream.close()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-blockwise"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_matrix_that_is_not_finite_is_named(value: float, scheme: str, tmp_path: Path) -> None:
    tensors = matrices(tmp_path / "f")
    tensors["c"][-1, -1] = value
    save_file(tensors, tmp_path / "f")
    stream = QuantizingStream(read_header(tmp_path / "f"), scheme, 64, CPU)
    assert stream.not_finite() is None
    for name in stream.entries:
        assert stream.quantize(name) is not None
    assert stream.not_finite() == "c"
    stream.close()


def test_no_more_is_read_ahead_than_there_are_buffers(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 40)
    spans = [(str(tmp_path / "f"), 100 * index, 100) for index in range(100)]
    ahead = ReadAhead(spans, 100, pinned=False, readers=2)
    limit = 2 + shards.SPARE_BUFFERS
    until = time.monotonic() + 10
    while ahead.started < limit and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    assert ahead.started == limit
    storages = set()
    for index in range(100):
        part = ahead.take()
        storages.add(part.untyped_storage().data_ptr())
        assert part.tolist() == [(100 * index + at) % 256 for at in range(100)]
        ahead.release(part)
    assert len(storages) <= limit
    ahead.close()


def test_closing_early_ends_the_readers(tmp_path: Path) -> None:
    matrices(tmp_path / "f")
    stream = QuantizingStream(read_header(tmp_path / "f"), "int8", 64, CPU)
    assert readers()
    stream.close()
    assert not readers()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    matrices(tmp_path / "f")
    header = read_header(tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[: header["c"].offset + 5])
    stream = QuantizingStream(header, "int8", 64, CPU)
    assert stream.quantize("a") is not None
    with pytest.raises(BackboneError, match=f"is cut short: there is nothing after byte {header['c'].offset + 5:,}"):
        stream.quantize("c")
    stream.close()
    with pytest.raises(BackboneError, match="is cut short"):
        read_tensors(header, CPU)
    (tmp_path / "f").unlink()
    with pytest.raises(BackboneError, match="cannot be read: No such file"):
        read_tensors(header, CPU)


def test_tensors_of_every_type_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "codes": torch.randint(-127, 128, (70, 31), dtype=torch.int8),
        "bytes": torch.randint(0, 256, (11, 101), dtype=torch.uint8),
        "wide": torch.randn(300, dtype=torch.float64),
        "half": torch.randn(5, 6, 7).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "f")
    got = read_tensors(read_header(tmp_path / "f"), CPU)
    (tmp_path / "f").write_bytes(b"")  # what was read is not a view of the file
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
