"""Tensors of safetensors files, read ahead: a few threads read, the copy to the device and what is done there overlap.

A tensor's bytes go file -> staging buffer (pinned for CUDA) -> device buffer -> codes. Buffers are few and of a fixed
size, so neither the host nor the device ever holds much of the 16-bit model, however large its largest matrix. Nothing
here waits for the device but for a buffer to be free again."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.errors import BackboneError
from finetuna_lightning.ops import reference

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PIECE_BYTES = 1 << 21  # read, and quantised, at a time on a CPU
PIECE_BYTES_CUDA = 1 << 24  # 11 pinned buffers with 8 readers: 176 MiB; takes longer to read than to launch its work
SPARE_BUFFERS = 3  # beyond one for each reader: being copied, being quantised, being waited for
DEVICE_BUFFERS = 3


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


def reader_count() -> int:
    """How many threads read: enough for the page cache and for fast disks, and half the cores at most."""
    return min(8, max(2, (os.cpu_count() or 2) // 2))


def read_into(path: str, offset: int, into: Tensor) -> None:
    """Fill ``into`` (uint8, on the CPU) from ``offset`` of a file on.

    Raises:
        BackboneError: when the file cannot be read, or ends before.
    """
    view, done = memoryview(into.numpy()), 0  # type: ignore[arg-type]
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise BackboneError(f"{path} is cut short: there is nothing after byte {offset + done:,}")
                done += got
    except OSError as error:
        raise BackboneError(f"{path} cannot be read: {error.strerror or error}") from error


class ReadAhead:
    """The bytes of ``spans`` (path, offset, size), in that order, read by ``readers`` threads into a few buffers of
    ``size`` bytes each.

    ``take`` gives uint8 tensors, each a part of a buffer, which stays taken until it is given to ``release``. A reader
    takes a buffer and the next span in one step, so the span that is waited for always has one.
    """

    def __init__(self, spans: Sequence[tuple[str, int, int]], size: int, pinned: bool, readers: int) -> None:
        self.spans, self.size, self.pinned = spans, size, pinned
        self.changed = threading.Condition()
        self.unmade = min(len(spans), readers + SPARE_BUFFERS)  # buffers are made by the readers, beside each other
        self.free: list[Tensor] = []
        self.ready: dict[int, Tensor] = {}
        self.started, self.taken = 0, 0
        self.ended = False
        self.fault: BaseException | None = None
        self.threads = [
            threading.Thread(target=self._read, name="finetuna-reader", daemon=True) for _ in range(readers)
        ]
        for thread in self.threads:
            thread.start()

    def _claim(self) -> tuple[int, Tensor | None] | None:
        """The next span, and a buffer for it, None where one is still to be made; None when there is nothing left."""
        with self.changed:
            while True:
                if self.ended or self.started >= len(self.spans):
                    return None
                if self.free or self.unmade:
                    buffer = self.free.pop() if self.free else None
                    self.unmade -= buffer is None
                    self.started += 1
                    return self.started - 1, buffer
                self.changed.wait()

    def _read(self) -> None:
        try:
            while (claim := self._claim()) is not None:
                index, buffer = claim
                if buffer is None:
                    buffer = torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned)
                path, offset, size = self.spans[index]
                read_into(path, offset, buffer[:size])
                with self.changed:
                    self.ready[index] = buffer
                    self.changed.notify_all()
        except BaseException as error:  # raised again where the span is waited for
            with self.changed:
                self.fault = self.fault or error
                self.changed.notify_all()

    def take(self) -> Tensor:
        """The bytes of the next span."""
        with self.changed:
            while self.taken not in self.ready:
                if self.fault is not None:
                    raise self.fault
                self.changed.wait()
            buffer = self.ready.pop(self.taken)
            self.taken += 1
            return buffer[: self.spans[self.taken - 1][2]]

    def release(self, part: Tensor) -> None:
        """Give the buffer of a taken part back."""
        with self.changed:
            self.free.append(part.as_strided((self.size,), (1,), 0))
            self.changed.notify_all()

    def close(self) -> None:
        """End the threads, and let the buffers go."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        self.free.clear()
        self.ready.clear()


class _Ferry:
    """Carries parts to the device: on a CPU they are there already; for CUDA, on a stream beside the current one."""

    def __init__(self, ahead: ReadAhead, device: torch.device) -> None:
        self.ahead, self.device = ahead, device
        self.copying: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()

    def _copied(self, part: Tensor) -> None:
        """The buffer of ``part`` is free once the copies that were ordered up to now have ended."""
        assert self.stream is not None
        event = torch.cuda.Event()
        event.record(self.stream)
        self.copying.append((event, part))
        while self.copying and (len(self.copying) >= SPARE_BUFFERS or self.copying[0][0].query()):
            event, oldest = self.copying.popleft()
            event.synchronize()
            self.ahead.release(oldest)

    def over(self, part: Tensor) -> Tensor:
        """``part`` on the device, to be used on the current stream and then given to ``done``."""
        if self.stream is None:
            return part if self.device.type == "cpu" else part.to(self.device)
        current = torch.cuda.current_stream(self.device)
        if len(self.buffers) < DEVICE_BUFFERS:
            used, buffer = None, torch.empty(self.ahead.size, dtype=torch.uint8, device=self.device)
            self.stream.wait_stream(current)  # whoever had this memory before may still be at it
        else:
            used, buffer = self.buffers.popleft()
        with torch.cuda.stream(self.stream):
            if used is not None:
                self.stream.wait_event(used)
            buffer[: part.numel()].copy_(part, non_blocking=True)
        current.wait_stream(self.stream)
        self.buffers.append((None, buffer))
        self._copied(part)
        return buffer[: part.numel()]

    def done(self, part: Tensor) -> None:
        """What was ordered on the current stream is the last use of the copy of ``part``."""
        if self.stream is None:
            self.ahead.release(part)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.buffers.append((event, self.buffers.pop()[1]))

    def into(self, part: Tensor, target: Tensor) -> None:
        """Copy ``part`` to its place for good, ``target`` (uint8, of the same size)."""
        if self.stream is None:
            target.copy_(part)
            self.ahead.release(part)
            return
        with torch.cuda.stream(self.stream):
            target.copy_(part, non_blocking=True)
        self._copied(part)

    def close(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            self.stream.synchronize()
            self.copying.clear()
            self.buffers.clear()


def spans_of(entry: Entry, unit: int, piece: int) -> list[tuple[str, int, int]]:
    """``entry`` in parts of about ``piece`` bytes, each but the last a multiple of ``unit`` bytes."""
    step = max(1, piece // max(unit, 1)) * max(unit, 1)
    return [(entry.path, entry.offset + start, min(step, entry.size - start)) for start in range(0, entry.size, step)]


def piece_bytes(device: torch.device) -> int:
    """The size of a staging buffer for ``device``."""
    return PIECE_BYTES_CUDA if device.type == "cuda" else PIECE_BYTES


class QuantizingStream:
    """Matrices of safetensors files, quantised on ``device`` in the order of ``entries`` while the next are read.

    Args:
        entries: by name, in the order in which they will be asked for.
        scheme, block_size: as in ``ops.reference``.
        device: where the codes are made and stay.
    """

    def __init__(self, entries: dict[str, Entry], scheme: str, block_size: int, device: torch.device) -> None:
        self.entries, self.scheme, self.block_size, self.device = entries, scheme, block_size, device
        self.parts: dict[str, int] = {}
        spans: list[tuple[str, int, int]] = []
        for name, entry in entries.items():
            unit = self._group(entry) * entry.dtype.itemsize
            own = spans_of(entry, unit, piece_bytes(device))
            self.parts[name] = len(own)
            spans += own
        size = max((size for _, _, size in spans), default=0)
        self.left = deque(entries)
        self.scales: dict[str, Tensor] = {}
        self.ahead = ReadAhead(spans, size, device.type == "cuda", reader_count())
        self.ferry = _Ferry(self.ahead, device)

    def _group(self, entry: Entry) -> int:
        return reference.group_size(entry.shape[1], self.scheme, self.block_size)

    def quantize(self, name: str) -> tuple[Tensor, Tensor] | None:
        """``(codes [out, in], scale)`` of a matrix, as of ``reference.quantize``; ``not_finite`` tells the rest. None
        when it was passed over: matrices come in their order, or not at all."""
        if name not in self.left:
            return None
        while (first := self.left.popleft()) != name:
            for _ in range(self.parts[first]):
                self.ahead.release(self.ahead.take())
        entry = self.entries[name]
        rows, columns = entry.shape
        codes = torch.empty(rows, columns, dtype=reference.code_dtype(self.scheme), device=self.device)
        shape = reference.scale_shape((rows, columns), self.scheme, self.block_size)
        scale = torch.zeros(shape, dtype=torch.float32, device=self.device)
        group, flat, at = self._group(entry), codes.view(-1), 0
        for _ in range(self.parts[name]):
            part = self.ahead.take()
            values = self.ferry.over(part).view(entry.dtype)
            stop = at + values.numel()
            to_scale = scale[at // group : -(-stop // group)]
            reference.quantize_groups(values, flat[at:stop], to_scale, self.scheme, group)
            self.ferry.done(part)
            at = stop
        self.scales[name] = scale
        return codes, scale

    def not_finite(self) -> str | None:
        """The first matrix so far that held a NaN or an infinity. Waits for the device, so asked once, at the end."""
        names = list(self.scales)
        if not names:
            return None
        finite = torch.stack([torch.isfinite(scale).all() for scale in self.scales.values()]).tolist()
        return next((name for name, good in zip(names, finite, strict=True) if not good), None)

    def close(self) -> None:
        """End the reading and wait for what was ordered; codes and scales stay."""
        self.ferry.close()
        self.ahead.close()
        self.scales.clear()
        _give_back_pinned(self.device)


def _give_back_pinned(device: torch.device) -> None:
    """Return torch's cache of pinned memory to the system; a torch without that call keeps it, for other copies."""
    empty: Any = getattr(torch.accelerator, "empty_host_cache", None)
    if device.type == "cuda" and empty is not None:
        empty()


def read_tensors(entries: dict[str, Entry], device: torch.device) -> dict[str, Tensor]:
    """Tensors of safetensors files, in memory of their own on ``device``.

    For a CPU the threads read straight to where each stays; for CUDA through pinned buffers, the copies behind the
    reading.
    """
    tensors = {name: torch.empty(e.shape, dtype=e.dtype, device=device) for name, e in entries.items()}
    flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in tensors.items() if tensor.numel()}
    spans = [(name, span) for name in flat for span in spans_of(entries[name], 1, piece_bytes(device))]
    places = [flat[name][span[1] - entries[name].offset :][: span[2]] for name, span in spans]
    if device.type == "cpu":
        with ThreadPoolExecutor(reader_count()) as pool:
            list(pool.map(lambda span, place: read_into(span[0], span[1], place), [s for _, s in spans], places))
        return tensors
    size = max((span[2] for _, span in spans), default=0)
    ahead = ReadAhead([span for _, span in spans], size, device.type == "cuda", reader_count())
    ferry = _Ferry(ahead, device)
    try:
        if ferry.stream is not None:
            ferry.stream.wait_stream(torch.cuda.current_stream(device))
        for place in places:
            ferry.into(ahead.take(), place)
    finally:
        ferry.close()
        ahead.close()
        _give_back_pinned(device)
    return tensors
