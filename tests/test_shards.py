"""Reading ahead: the bytes of the file, in few buffers; quantised as the reference does; damage is named."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetuna_lightning import shards
from finetuna_lightning.errors import BackboneError
from finetuna_lightning.ops import reference
from finetuna_lightning.shards import QuantizingStream, ReadAhead, Staging, read_header, read_tensors

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
    assert sum(name == "a" for name, _ in stream.parts) > 4
    taken = {name: stream.take(name) for name in reversed(order)}  # whatever the order
    stream.finish()
    assert stream.not_finite() is None
    for name, got in taken.items():
        assert got is not None
        codes, scale = reference.quantize(tensors[name], scheme, block_size)
        assert torch.equal(got[0], codes) and torch.equal(got[1], scale)
    stream.close()
    assert not readers()


def test_a_matrix_is_had_once(tmp_path: Path) -> None:
    matrices(tmp_path / "f")
    stream = QuantizingStream(read_header(tmp_path / "f"), "int8", 64, CPU)
    assert stream.take("c") is not None and list(stream.taken) == ["c"]
    assert stream.take("c") is None and stream.take("z") is None
    stream.close()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-blockwise"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_matrix_that_is_not_finite_is_named(value: float, scheme: str, tmp_path: Path) -> None:
    tensors = matrices(tmp_path / "f")
    tensors["c"][-1, -1] = value
    save_file(tensors, tmp_path / "f")
    stream = QuantizingStream(read_header(tmp_path / "f"), scheme, 64, CPU)
    stream.finish()
    assert stream.not_finite() is None  # of what was taken: nothing yet
    for name in stream.entries:
        assert stream.take(name) is not None
    assert stream.not_finite() == "c"
    stream.close()


def test_every_span_is_read_once_into_few_buffers(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 40)
    spans = [(str(tmp_path / "f"), 100 * index, 100 - index % 3) for index in range(100)]
    seen: list[tuple[int, int]] = []

    class Seen(ReadAhead):
        def _use(self, index: int, staging: Staging) -> None:
            size = self.spans[index][2]
            assert staging.over(size, torch.uint8).tolist() == [(100 * index + at) % 256 for at in range(size)]
            seen.append((index, staging.host.data_ptr()))

    ahead = Seen(spans, 100, CPU, readers=3)
    ahead.finish()
    assert sorted(index for index, _ in seen) == list(range(100))
    assert len({place for _, place in seen}) <= 3 + shards.SPARE_BUFFERS == len(ahead.idle)
    ahead.close()
    assert not ahead.idle and not readers()


def test_the_buffer_that_was_used_longest_ago_is_filled_next(tmp_path: Path) -> None:
    """It is the likeliest to have been copied."""
    (tmp_path / "f").write_bytes(bytes(1000))
    places: list[int] = []

    class Seen(ReadAhead):
        def _use(self, index: int, staging: Staging) -> None:
            places.append(staging.host.data_ptr())

    ahead = Seen([(str(tmp_path / "f"), 10 * index, 10) for index in range(100)], 10, CPU, readers=1)
    ahead.finish()
    count = 1 + shards.SPARE_BUFFERS
    assert len(set(places[:count])) == count and places == (places[:count] * 100)[:100]
    ahead.close()


def test_the_first_fault_is_the_one_that_is_raised(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    late = threading.Event()

    class Failing(ReadAhead):
        def _use(self, index: int, staging: Staging) -> None:
            if index == 1:
                late.wait(10)
            elif index == 2:
                late.set()
            if index:
                raise ValueError(f"span {index}")

    ahead = Failing([(str(tmp_path / "f"), 0, 10)] * 50, 10, CPU, readers=2)
    with pytest.raises(ValueError, match=r"span 1$"):
        ahead.finish()
    assert len(ahead.faults) == 2 and next(ahead.order) < 5  # nobody went on
    ahead.close()


def test_closing_early_ends_the_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices(tmp_path / "f")
    used: list[int] = []
    closing = threading.Event()

    def slow(self: QuantizingStream, index: int, staging: Staging) -> None:
        used.append(index)
        assert closing.wait(10)

    monkeypatch.setattr(QuantizingStream, "_use", slow)
    stream = QuantizingStream(read_header(tmp_path / "f"), "int8", 64, CPU)
    assert readers()
    stream.ended = True  # as ``close`` says first
    closing.set()
    stream.close()
    assert not readers() and len(used) <= shards.reader_count() < len(stream.spans)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    matrices(tmp_path / "f")
    header = read_header(tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[: header["c"].offset + 5])
    stream = QuantizingStream(header, "int8", 64, CPU)
    named = f"^cannot quantise 'c': .* is cut short: there is nothing after byte {header['c'].offset + 5:,}"
    with pytest.raises(BackboneError, match=named):
        stream.finish()
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
