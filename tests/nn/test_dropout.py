"""The dropout mask: a function of seed, place and feature; a fair coin in every direction."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from finetuna_lightning.nn.dropout import drop, keep_mask, kept_share, places

PLACES = places(torch.full((32,), 64))
WRITTEN = ["1100001100", "1101101110", "1111011110", "1111100011"]
DIGEST = "c8ac31451022659e"


def scores(one: Tensor, other: Tensor) -> float:
    """How many standard deviations the mean product of two standardised tables lies from 0."""
    return float((one * other).mean() * one.numel() ** 0.5)


def test_the_mask_is_the_seeds() -> None:
    before = torch.random.get_rng_state()
    first = keep_mask(1, PLACES, 50, 0.5)
    assert torch.equal(first, keep_mask(1, PLACES, 50, 0.5)) and not torch.equal(first, keep_mask(2, PLACES, 50, 0.5))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_mask_is_what_it_was() -> None:
    """Written down, so that a resume under another version, device or machine draws the same."""
    mask = keep_mask(2**63 - 1, places(torch.tensor([3, 1])), 10, 0.4)
    assert ["".join("01"[int(bit)] for bit in row) for row in mask] == WRITTEN
    large = keep_mask(5, PLACES, 1001, 0.25).to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(large).hexdigest()[:16] == DIGEST


def test_places_number_sequences_and_positions() -> None:
    at = places(torch.tensor([2, 1, 3]))
    assert (at >> 32).tolist() == [0, 0, 1, 2, 2, 2] and (at & 0xFFFFFFFF).tolist() == [0, 1, 0, 0, 1, 2]
    assert (places(torch.tensor([1, 2]), each=2) & 0xFFFFFFFF).tolist() == [0, 1, 0, 1, 2, 3]


def test_padding_and_packing_leave_the_masks_of_real_tokens() -> None:
    lengths = torch.tensor([3, 8, 1])
    packed = drop(torch.ones(1, 12, 7), 0.5, 9, places(lengths))[0].split(lengths.tolist())
    for width in (8, 13):
        padded = drop(torch.ones(3, width, 7), 0.5, 9)
        flat = drop(torch.ones(3 * width, 7), 0.5, 9, places(torch.full((3,), width)))
        assert torch.equal(padded.flatten(0, 1), flat)
        assert all(torch.equal(padded[row, : len(own)], own) for row, own in enumerate(packed))


def test_more_features_leave_the_masks_of_the_first() -> None:
    assert torch.equal(keep_mask(3, PLACES, 64, 0.3)[:, :13], keep_mask(3, PLACES, 13, 0.3))


def test_the_mask_is_the_same_in_every_type() -> None:
    x = torch.ones(4, 50)
    mask = drop(x, 0.3, 1) != 0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        out = drop(x.to(dtype), 0.3, 1)
        assert out.dtype == dtype and torch.equal(out != 0, mask)


def test_a_dropped_nan_is_gone_forwards_and_backwards() -> None:
    keep = keep_mask(1, places(torch.tensor([1])), 100, 0.5)[0]
    x = torch.where(keep, torch.ones(100), torch.nan).requires_grad_()
    out = drop(x, 0.5, 1)
    assert bool(out.isfinite().all()) and torch.equal(out != 0, keep)
    out.backward(torch.where(keep, torch.ones(100), torch.nan))
    assert x.grad is not None and torch.equal(x.grad, keep.float())


def test_rates_at_the_ends() -> None:
    assert bool(keep_mask(1, PLACES, 64, 0.0).all()) and kept_share(0.0) == 1
    assert 0 < kept_share(1 - 1e-9) == 1 / 65536
    assert kept_share(0.1) == pytest.approx(0.9, abs=1 / 65536)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_mask_is_a_fair_coin(p: float) -> None:
    """Rate, neighbours in every direction, seeds, rectangles, row and column sums: none lies five deviations off."""
    found: dict[str, list[float]] = {}
    for seed in (0, 1, 77):
        dropped = (~keep_mask(seed, PLACES, 512, p)).double()
        rate = 1 - kept_share(p)
        found.setdefault("rate", []).append(float((dropped.mean() - rate) * (dropped.numel() / (p * (1 - p))) ** 0.5))
        unit = (dropped - rate) / (p * (1 - p)) ** 0.5
        for lag in (1, 2, 3, 4, 8, 64):
            found.setdefault(f"feature {lag}", []).append(scores(unit[:, :-lag], unit[:, lag:]))
            found.setdefault(f"token {lag}", []).append(scores(unit[:-lag], unit[lag:]))
        for down, across in ((1, 1), (1, 4), (64, 1), (64, 4)):
            pair = unit[:-down] * unit[down:]
            found.setdefault(f"rectangle {down} {across}", []).append(scores(pair[:, :-across], pair[:, across:]))
        other = (~keep_mask(seed + 1, PLACES, 512, p)).double()
        found.setdefault("seed", []).append(scores(unit, (other - rate) / (p * (1 - p)) ** 0.5))
        for name, dim in (("rows", 1), ("columns", 0)):
            sums, size = unit.sum(dim), unit.shape[dim]
            spread = (sums.square() / size).mean() - 1
            found.setdefault(name, []).append(float(spread * (len(sums) / 2) ** 0.5))
    assert {name: value for name, value in found.items() if max(map(abs, value)) > 5} == {}
