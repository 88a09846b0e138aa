"""Streams: a hash of their parts, so that none is another shifted."""

from __future__ import annotations

import torch

from finetuna_lightning.seeds import stream_seed


def test_a_stream_is_a_known_number() -> None:
    """Written down: a run that is resumed by a later version must draw the same."""
    assert stream_seed(0, "sql", "order", 3) == 6089160261267634901
    assert stream_seed() == 724655455495936113


def test_parts_are_told_apart() -> None:
    parts = [(), (1,), ("1",), (1, 2), (12,), (2, 1), ("a", "b"), ("ab",), ("a", "b", 0), ("", "a"), ("a", "")]
    assert len({stream_seed(*part) for part in parts}) == len(parts)


def test_seeds_are_what_a_generator_takes() -> None:
    seeds = [stream_seed(run, "dropout", step) for run in range(4) for step in range(250)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all 63 bits are used
    draws = {torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds}
    assert len(draws) > 990
