"""How the rows of a batch are cut for kernels that serve many adapters at once: into tiles and chunks that never hold
rows of two adapters, and start at an adapter's own first row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TILE_ROWS = 128
ALIGNED = 4  # numbers of 4 bytes: Triton compiles a kernel once more where an address is no multiple of 16
CHUNK_ROWS = 1024  # of one adapter, summed by one program; several chunks are added up afterwards, in order


@dataclass(frozen=True)
class Tiling:
    """The rows of one batch.

    Args:
        names: the adapters, in the order of their slots.
        tiles: int32 [3, tiles]: first row, end row and slot of each tile of at most ``TILE_ROWS`` rows.
        chunks: int32 [3, chunks]: the same of at most ``CHUNK_ROWS`` rows, sorted by slot.
        spans: (first row, end row, slot) of each segment, on the host.
        first: int32 [slots + 1], the first chunk of each slot; None when each slot has exactly one.
    """

    names: tuple[str, ...]
    tiles: Tensor
    chunks: Tensor
    first: Tensor | None
    spans: tuple[tuple[int, int, int], ...] = ()


def tiling(segments: Sequence[tuple[str, int, int]], device: torch.device) -> Tiling:
    """The tiling of rows of which ``segments`` (name, first row, end row) say whose they are. Those of one shape are
    made once; making one does not wait for the device."""
    return _tiling(tuple(segments), device)


@lru_cache(maxsize=256)
def _tiling(segments: tuple[tuple[str, int, int], ...], device: torch.device) -> Tiling:
    names = tuple(dict.fromkeys(name for name, _, _ in segments))
    slots = {name: slot for slot, name in enumerate(names)}

    def cut(step: int) -> list[tuple[int, int, int]]:
        return [
            (row, min(row + step, stop), slots[name])
            for name, start, stop in segments
            for row in range(start, stop, step)
        ]

    tiles, chunks = cut(TILE_ROWS), sorted(cut(CHUNK_ROWS), key=lambda chunk: chunk[2])
    counts = [sum(chunk[2] == slot for chunk in chunks) for slot in range(len(names))]
    first = [sum(counts[:slot]) for slot in range(len(names) + 1)]
    parts = [[value for column in zip(*table, strict=True) for value in column] for table in (tiles, chunks)]
    parts.append(first)
    room = [-(-len(part) // ALIGNED) * ALIGNED for part in parts]
    whole = torch.tensor(
        [value for part, size in zip(parts, room, strict=True) for value in part + [0] * (size - len(part))],
        dtype=torch.int32,
    )
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    own, of_chunks, firsts = (place[: len(part)] for place, part in zip(whole.split(room), parts, strict=True))
    return Tiling(
        names,
        own.view(3, -1),
        of_chunks.view(3, -1),
        None if all(count == 1 for count in counts) else firsts,
        tuple((start, stop, slots[name]) for name, start, stop in segments),
    )
