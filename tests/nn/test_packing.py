"""Attention within each sequence of a packed row, and what stands for its mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.nn.packing import PackedMask, attend_by_sequence, packed_lengths, packed_pass

LENGTHS = (5, 1, 7, 5, 1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


def row(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, sum(LENGTHS), 8, generator=generator).requires_grad_() for _ in range(3)]


def test_it_is_attention_under_a_block_diagonal_mask() -> None:
    """Outputs and every gradient."""
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    block = (sequence[:, None] == sequence) & torch.ones(len(sequence), len(sequence)).tril().bool()
    pieces, whole = row(), row()
    out = attend_by_sequence(causal, *pieces, PackedMask(LENGTHS, lambda length: None))
    expected = causal(*whole, block)
    assert out.shape == (1, sum(LENGTHS), 3, 8) and torch.allclose(out, expected, atol=1e-6)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * target).sum().backward()
    (expected * target).sum().backward()
    for one, other in zip(pieces, whole, strict=True):
        assert one.grad is not None and other.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-6)


def test_sequences_of_one_length_go_together_under_the_mask_of_one() -> None:
    shapes: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None and mask.shape == (1, 1, q.shape[2], q.shape[2])
        shapes.append(tuple(q.shape))
        return causal(q, k, v, mask)

    made: list[int] = []

    def make(length: int) -> Tensor:
        made.append(length)
        return torch.ones(1, 1, length, length).tril().bool()

    mask = PackedMask(LENGTHS, make)
    for _ in range(2):  # two layers
        attend_by_sequence(attend, *row(), mask)
    assert shapes == [(2, 3, 5, 8), (2, 3, 1, 8), (1, 3, 7, 8), (1, 3, 2, 8)] * 2
    assert made == [5, 1, 7, 2]


def test_a_nan_stays_in_its_sequence_where_a_mask_would_let_it_out() -> None:
    """The reason why there is no mask: its weight of 0 times NaN is NaN."""
    clean, spoilt = row(), row()
    with torch.no_grad():
        for tensor in spoilt:
            tensor[:, :, 6:13] = torch.nan
    mask = PackedMask(LENGTHS, lambda length: None)
    one, other = attend_by_sequence(causal, *clean, mask), attend_by_sequence(causal, *spoilt, mask)
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool)
    outside[6:13] = False
    assert torch.equal(one[:, outside], other[:, outside]) and bool(other[:, 6:13].isnan().all())
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert bool(causal(*spoilt, sequence[:, None] == sequence).isnan().all())


def test_sequences_of_a_part_of_the_row() -> None:
    mask = PackedMask(LENGTHS, lambda length: None)
    assert mask.take([(0, 6), (13, 18)]).lengths == (5, 1, 5)
    assert mask.take([(18, 21)]).lengths == (1, 2)
    assert mask.take([(0, 21)]).lengths == LENGTHS


def test_a_packed_pass_ends_with_its_block() -> None:
    assert packed_lengths() is None
    with packed_pass([3, 4]):
        assert packed_lengths() == (3, 4)
        with packed_pass(None):
            assert packed_lengths() is None
        assert packed_lengths() == (3, 4)
    assert packed_lengths() is None
