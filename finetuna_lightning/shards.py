"""Tensors of safetensors files, read ahead: a few threads read, the copy to the device and what is done there overlap.

A tensor's bytes go file -> staging buffer (pinned for CUDA) -> device buffer -> codes. Buffers are few and of a fixed
size, so neither the host nor the device ever holds much of the 16-bit model, however large its largest matrix. Each
thread takes a span all the way, so that whoever wants the tensors has them at once, still to be filled, and can go on
making a model of them. Nothing here waits for the device but for a buffer to be free again, and at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.errors import BackboneError
from finetuna_lightning.ops import reference
from finetuna_lightning.ops.library import has_quantize_kernel, quantize_rows

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PIECE_BYTES = 1 << 21  # read, and quantised, at a time on a CPU
PIECE_BYTES_CUDA = 1 << 24  # 11 pinned buffers with 8 readers: 176 MiB; takes longer to read than to launch its work
SPARE_BUFFERS = 3  # beyond one for each reader: on their way to the device
SWITCH_SECONDS = 1e-4


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file: ``size`` bytes from ``offset``."""

    path: str
    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: str | Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, in the order of the bytes; tensors of types unknown here are left out.

    The format is eight bytes of length (little-endian), that much JSON, then the bytes of the tensors.

    Raises:
        BackboneError: for a file that is cut short, or is none.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(min(length, total))) if total else {}
        header.pop("__metadata__", None)
        entries = {
            name: Entry(str(path), 8 + length + start, stop - start, DTYPES[spec["dtype"]], tuple(spec["shape"]))
            for name, spec in header.items()
            for start, stop in [spec["data_offsets"]]
            if spec["dtype"] in DTYPES
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{path} is no safetensors file: {error}") from error
    if 8 + length > total or any(entry.offset + entry.size > total for entry in entries.values()):
        raise BackboneError(f"{path} is cut short: it has {total:,} bytes, fewer than its header says")
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


class _Turns:
    """How often threads that all have Python to run take turns: every ``SWITCH_SECONDS`` while a GPU is being loaded.
    Left alone, a reader waits 5 ms, longer than it reads, for each word it has to say while the model is made."""

    def __init__(self) -> None:
        self.lock, self.loads, self.usual = threading.Lock(), 0, 0.0

    def quicken(self) -> None:
        with self.lock:
            if not self.loads:
                self.usual = sys.getswitchinterval()
                sys.setswitchinterval(min(SWITCH_SECONDS, self.usual))
            self.loads += 1

    def slacken(self) -> None:
        with self.lock:
            self.loads -= 1
            if not self.loads:
                sys.setswitchinterval(self.usual)


_turns = _Turns()


def reader_count() -> int:
    """How many threads read: enough for the page cache and for fast disks, and half the cores at most."""
    return min(8, max(2, (os.cpu_count() or 2) // 2))


def open_file(path: str) -> FileIO:
    """A file to read from, by calls of its own size.

    Raises:
        BackboneError: when it cannot be opened.
    """
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise BackboneError(f"{path} cannot be read: {error.strerror or error}") from error


def read_into(file: FileIO, offset: int, into: memoryview) -> None:
    """Fill ``into`` from ``offset`` of a file on.

    Raises:
        BackboneError: when the file cannot be read, or ends before.
    """
    done = 0
    try:
        file.seek(offset)
        while done < len(into):
            got = file.readinto(into[done:])
            if not got:
                raise BackboneError(f"{file.name} is cut short: there is nothing after byte {offset + done:,}")
            done += got
    except OSError as error:
        raise BackboneError(f"{file.name} cannot be read: {error.strerror or error}") from error


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


class Staging:
    """A buffer of ``size`` bytes that spans are read into, one after another. For CUDA it is pinned, and has a twin on
    the device; ``event`` then tells when the work that was ordered last with either has ended."""

    def __init__(self, size: int, twin: Tensor | None = None, pinned: bool = False) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.twin, self.memory = twin, bytes_of(self.host)
        self.event = torch.cuda.Event() if pinned else None
        self.views: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def over(self, size: int, dtype: torch.dtype) -> Tensor:
        """The first ``size`` bytes as ``dtype``, on the device by the time that the current stream gets there."""
        if (size, dtype) not in self.views:  # made once: each view lets another thread have the interpreter
            both = (part if part is None else part[:size].view(dtype) for part in (self.host, self.twin))
            self.views[size, dtype] = tuple(both)  # type: ignore[assignment]
        host, twin = self.views[size, dtype]
        return host if twin is None else twin.copy_(host, non_blocking=True)


class ReadAhead:
    """The bytes of ``spans`` (path, offset, size), read by ``readers`` threads, in about that order, into a few buffers
    of ``size`` bytes each. The thread that has read a span also does what there is to do with it (``_use``; here:
    nothing) and goes on to the next: no thread waits for another.

    What ``_use`` orders on a GPU goes to a stream of the thread's own; the first thing there waits for what the stream
    that made this object had been given. ``finish`` waits for all of it.
    """

    def __init__(
        self, spans: Sequence[tuple[str, int, int]], size: int, device: torch.device, readers: int | None = None
    ) -> None:
        self.spans, self.size, self.device = spans, size, device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:  # threads start with device 0; the first work there waits for what was ordered up to here
            self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            self.current = torch.cuda.current_stream(self.device)
            self.before = self.current.record_event()
        readers = min(len(spans), reader_count() if readers is None else readers)
        self.order = itertools.count()  # the spans that are taken, and the buffers, without a lock: one step each
        self.idle: deque[Staging | None] = deque([None] * min(len(spans), readers + SPARE_BUFFERS))
        self.faults: list[tuple[int, BaseException]] = []
        self.ended = self.closed = False
        self.threads = [
            threading.Thread(target=self._read, name="finetuna-reader", daemon=True) for _ in range(readers)
        ]
        if self.on_gpu:
            _turns.quicken()
        for thread in self.threads:
            thread.start()

    def _staging(self) -> Staging:
        """A new buffer; made by the readers, beside each other."""
        return Staging(self.size)

    def _use(self, index: int, staging: Staging) -> None:
        """Do what is to be done with a span that has been read."""

    def _one(self, index: int, file: FileIO, offset: int, size: int) -> None:
        staging = self.idle.popleft() or self._staging()  # the one that was used longest ago
        if staging.event is not None:
            staging.event.synchronize()
        read_into(file, offset, staging.memory[:size])
        self._use(index, staging)
        if staging.event is not None:
            staging.event.record()
        self.idle.append(staging)

    def _read(self) -> None:
        index = -1
        try:
            with contextlib.ExitStack() as stack:
                if self.on_gpu:
                    stack.enter_context(torch.cuda.device(self.device))
                    stream = torch.cuda.Stream()
                    stream.wait_event(self.before)
                    stack.enter_context(torch.cuda.stream(stream))
                    stack.callback(stream.synchronize)  # also of a thread that fails: its buffers may then go
                files: dict[str, FileIO] = {}
                while not self.ended and (index := next(self.order)) < len(self.spans):
                    path, offset, size = self.spans[index]
                    if path not in files:
                        files[path] = stack.enter_context(open_file(path))
                    self._one(index, files[path], offset, size)
        except BaseException as error:  # raised again by ``finish``
            self.faults.append((index, error))
            self.ended = True

    def finish(self) -> None:
        """Wait until every span has been read, and what was ordered with it is done. Raises what went wrong first."""
        for thread in self.threads:
            thread.join()
        if self.faults:
            index, error = min(self.faults, key=lambda fault: fault[0])
            raise self._fault(index, error)

    def _fault(self, index: int, error: BaseException) -> BaseException:
        """What to raise for an error with a span (-1: before any)."""
        return error

    def close(self) -> None:
        """End the threads, wherever they are, and let the buffers go."""
        self.ended = True
        for thread in self.threads:
            thread.join()
        self.idle.clear()
        if self.on_gpu and not self.closed:
            _turns.slacken()
            _give_back_pinned()
        self.closed = True


def _give_back_pinned() -> None:
    """Return torch's cache of pinned memory to the system; a torch without that call keeps it, for other copies."""
    empty: Any = getattr(torch.accelerator, "empty_host_cache", None)
    if empty is not None:
        empty()


def spans_of(entry: Entry, unit: int, piece: int) -> list[tuple[str, int, int]]:
    """``entry`` in parts of about ``piece`` bytes, each but the last a multiple of ``unit`` bytes."""
    step = max(1, piece // max(unit, 1)) * max(unit, 1)
    return [(entry.path, entry.offset + start, min(step, entry.size - start)) for start in range(0, entry.size, step)]


def piece_bytes(device: torch.device) -> int:
    """The size of a staging buffer for ``device``."""
    return PIECE_BYTES_CUDA if device.type == "cuda" else PIECE_BYTES


def reserve(sizes: Iterable[int], device: torch.device) -> None:
    """Have torch's allocator ask for tensors of these sizes at once, where the GPU has that much: it cuts up what it
    holds. Hundreds of requests to the driver take longer than reading what goes there."""
    size = sum(-(-size // 512) * 512 for size in sizes if size > 1 << 20)  # smaller ones come from pools of their own
    if device.type != "cuda" or not size:
        return
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if held < size < torch.cuda.mem_get_info(device)[0]:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device=device)


class QuantizingStream(ReadAhead):
    """Matrices of safetensors files, quantised on ``device`` while the next are read.

    Args:
        entries: by name, in the order in which they are read.
        scheme, block_size: as in ``ops.reference``.
        device: where the codes are made and stay.
    """

    def __init__(self, entries: dict[str, Entry], scheme: str, block_size: int, device: torch.device) -> None:
        self.entries, self.scheme = entries, scheme
        self.groups = {n: reference.group_size(e.shape[1], scheme, block_size) for n, e in entries.items()}
        spans: list[tuple[str, int, int]] = []
        self.parts: list[tuple[str, int]] = []  # of each span: the matrix, and its first group in it
        for name, entry in entries.items():
            unit = self.groups[name] * entry.dtype.itemsize
            own = spans_of(entry, unit, piece_bytes(device))
            self.parts += [(name, (offset - entry.offset) // unit) for _, offset, _ in own]
            spans += own
        shapes = {name: reference.scale_shape(e.shape, scheme, block_size) for name, e in entries.items()}  # type: ignore[arg-type]
        kind = reference.code_dtype(scheme)
        reserve([math.prod(entry.shape) * kind.itemsize for entry in entries.values()], device)
        self.matrices = {
            name: (
                torch.empty(entry.shape, dtype=kind, device=device),
                torch.empty(shapes[name], dtype=torch.float32, device=device),
            )
            for name, entry in entries.items()
        }
        self.taken: dict[str, None] = {}
        size = max((size for _, _, size in spans), default=0)
        self.twins: list[Tensor] = []
        self.kernel = has_quantize_kernel(device, scheme, {entry.dtype for entry in entries.values()})
        self.alone = threading.Lock()
        if device.type == "cuda":
            count = min(len(spans), reader_count() + SPARE_BUFFERS)
            self.twins += torch.empty(count, size, dtype=torch.uint8, device=device).unbind()
        if self.kernel:  # compiled here, once, and not by all readers at once
            with torch.cuda.device(device):
                for name, kind in {(e.shape[1], e.dtype): (n, e.dtype) for n, e in entries.items() if e.size}.values():
                    quantize_rows(torch.empty(0, dtype=kind, device=device), *self.matrices[name], 0)
        super().__init__(spans, size, device)

    def take(self, name: str) -> tuple[Tensor, Tensor] | None:
        """``(codes [out, in], scale)`` of a matrix, filled by the time of ``finish`` as by ``reference.quantize``;
        ``not_finite`` tells the rest. None for one that is not in the stream, or was had before."""
        if name not in self.matrices or name in self.taken:
            return None
        self.taken[name] = None
        return self.matrices[name]

    def _staging(self) -> Staging:
        return Staging(self.size, self.twins.pop(), pinned=True) if self.twins else Staging(self.size)

    def _use(self, index: int, staging: Staging) -> None:
        name, first = self.parts[index]
        values = staging.over(self.spans[index][2], self.entries[name].dtype)
        codes, scale = self.matrices[name]
        if self.kernel:
            quantize_rows(values, codes, scale, first)
            return
        group = self.groups[name]
        to_codes = codes.view(-1)[first * group :][: values.numel()]
        to_scale = scale[first : first - (-values.numel() // group)]
        with self._alone():
            reference.quantize_groups(values, to_codes, to_scale, self.scheme, group)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time, and for CUDA on the stream that made this object, so that its float32 temporaries stand
        once and not once for each reader."""
        with self.alone:
            if not self.on_gpu:
                yield
                return
            own = torch.cuda.current_stream()
            self.current.wait_stream(own)
            with torch.cuda.stream(self.current):
                yield
            own.wait_stream(self.current)

    def _fault(self, index: int, error: BaseException) -> BaseException:
        if index < 0 or not isinstance(error, BackboneError):
            return error
        return BackboneError(f"cannot quantise {self.parts[index][0]!r}: {error}")

    def not_finite(self) -> str | None:
        """The first matrix, of those that were taken, that held a NaN or an infinity; asked once, after ``finish``."""
        scales = [self.matrices[name][1] for name in self.taken]
        if not scales or bool(torch.isfinite(torch.cat(scales)).all()):
            return None
        return next(name for name in self.taken if not bool(torch.isfinite(self.matrices[name][1]).all()))

    def close(self) -> None:
        """End the reading; codes and scales that were taken stay."""
        super().close()
        self.twins.clear()
        self.matrices.clear()


class TensorStream(ReadAhead):
    """Tensors of safetensors files, in memory of their own on ``device``: ``tensors``, to be filled by ``finish``.

    For a CPU the threads read straight to where each stays; for CUDA through pinned buffers.
    """

    def __init__(self, entries: dict[str, Entry], device: torch.device) -> None:
        self.entries = entries
        reserve([entry.size for entry in entries.values()], device)
        self.tensors = {name: torch.empty(e.shape, dtype=e.dtype, device=device) for name, e in entries.items()}
        self.flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in self.tensors.items() if tensor.numel()}
        spans = [(name, span) for name in self.flat for span in spans_of(entries[name], 1, piece_bytes(device))]
        self.names = [name for name, _ in spans]
        size = max((span[2] for _, span in spans), default=0)
        super().__init__([span for _, span in spans], size, device)

    def _place(self, index: int) -> Tensor:
        name, (_, offset, size) = self.names[index], self.spans[index]
        start = offset - self.entries[name].offset
        return self.flat[name][start : start + size]

    def _staging(self) -> Staging:
        return Staging(self.size, pinned=self.on_gpu)

    def _one(self, index: int, file: FileIO, offset: int, size: int) -> None:
        if self.device.type == "cpu":
            read_into(file, offset, bytes_of(self._place(index)))
        else:
            super()._one(index, file, offset, size)

    def _use(self, index: int, staging: Staging) -> None:
        self._place(index).copy_(staging.over(self.spans[index][2], torch.uint8), non_blocking=self.on_gpu)


def read_tensors(entries: dict[str, Entry], device: torch.device) -> dict[str, Tensor]:
    """Tensors of safetensors files, in memory of their own on ``device``."""
    with contextlib.closing(TensorStream(entries, device)) as stream:
        stream.finish()
        return stream.tensors
