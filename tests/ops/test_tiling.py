"""How rows are cut: every row once, no part with rows of two adapters, and tables that stand alike in every batch."""

from __future__ import annotations

import pytest
import torch

from finetuna_lightning.ops.tiling import CHUNK_ROWS, TILE_ROWS, Tiling, tiling

CPU = torch.device("cpu")


def cut(*segments: tuple[str, int]) -> Tiling:
    """The tiling of segments of so many rows."""
    spans, start = [], 0
    for name, rows in segments:
        spans.append((name, start, start + rows))
        start += rows
    return tiling(spans, CPU)


def test_every_row_is_in_one_part_of_its_own_adapter() -> None:
    found = cut(("one", 70), ("two", 3000), ("one", 33), ("three", 1))
    assert found.names == ("one", "two", "three")
    owner = torch.tensor([0] * 70 + [1] * 3000 + [0] * 33 + [2])
    for table, most in ((found.tiles, TILE_ROWS), (found.chunks, CHUNK_ROWS)):
        seen = torch.zeros(len(owner), dtype=torch.int64)
        for start, stop, slot in table.t().tolist():
            assert 0 < stop - start <= most and set(owner[start:stop].tolist()) == {slot}
            seen[start:stop] += 1
        assert bool((seen == 1).all())
    assert found.chunks[2].tolist() == [0, 0, 1, 1, 1, 2]
    assert found.first is not None and found.first.tolist() == [0, 2, 5, 6]
    assert cut(("one", 5), ("two", 7)).first is None


@pytest.mark.parametrize("rows", range(1, 2000, 130))
def test_tables_begin_at_multiples_of_16_bytes(rows: int) -> None:
    """Or Triton compiles its kernels once more in the middle of a run."""
    found = cut(("one", rows), ("two", 1500))
    places = [
        found.tiles.data_ptr(),
        found.chunks.data_ptr(),
        *([] if found.first is None else [found.first.data_ptr()]),
    ]
    assert len(places) == 3 and not any(place % 16 for place in places)
