"""On CUDA: the same dropout masks as on the CPU, packed rows as padded ones, a neighbour's NaN kept out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finetuna_lightning.configs import AdapterConfig
from finetuna_lightning.nn.dropout import keep_mask, places
from finetuna_lightning.training.batches import collate
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.tokenizing import Example
from tests.helpers.models import VOCAB_SIZE, excite, tiny_model

LENGTHS = {"a": [7, 1, 13], "b": [20, 5, 5]}


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("features", [7, 64, 1001])
def test_dropout_masks_are_those_of_the_cpu(features: int, p: float) -> None:
    lengths = torch.tensor([70, 1, 33])
    assert torch.equal(places(lengths.cuda()).cpu(), places(lengths))
    for seed in (0, 2**63 - 1):
        mask = keep_mask(seed, places(lengths), features, p)
        assert torch.equal(keep_mask(seed, places(lengths).cuda(), features, p).cpu(), mask)


def step(name: str, packed: bool, dtype: torch.dtype, spoilt: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    module = MultiAdapterModule(
        tiny_model(name, scale=3.0).to("cuda", dtype),
        {
            "a": AdapterConfig(rank=4, dropout=0.3),
            "b": AdapterConfig(rank=2, dropout=0.5, plain_modules=["lm_head"]),
        },
    )
    excite(module.adapters.cpu(), std=0.1)
    module.adapters.cuda()
    module.train()
    if spoilt:
        with torch.no_grad():
            for parameter in module.adapters["a"].parameters():
                parameter.fill_(torch.nan)
    generator = torch.Generator().manual_seed(3)
    rows = {
        key: [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]
        for key, lengths in LENGTHS.items()
    }
    batch: dict[str, Any] = {
        **collate({key: [Example(ids, ids) for ids in found] for key, found in rows.items()}, packed=packed)
    }
    batch = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in batch.items()}
    losses = torch.stack([total / count for _, total, count, _ in module.losses(module(batch, training=True), batch)])
    losses.sum().backward()
    return losses.detach(), {key: p.grad for key, p in module.adapters.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_packed_is_padded(name: str, dtype: torch.dtype, tolerance: float) -> None:
    padded, packed = step(name, False, dtype), step(name, True, dtype)
    assert torch.allclose(packed[0], padded[0], rtol=tolerance)
    for key, gradient in padded[1].items():
        assert float((packed[1][key] - gradient).norm() / gradient.norm()) < tolerance, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_neighbours_nan_changes_no_bit(packed: bool, dtype: torch.dtype) -> None:
    clean, spoilt = step("llama", packed, dtype), step("llama", packed, dtype, spoilt=True)
    assert bool(spoilt[0][0].isnan()) and torch.equal(spoilt[0][1], clean[0][1])
    assert all(torch.equal(spoilt[1][key], clean[1][key]) for key in clean[1] if key.startswith("b."))
