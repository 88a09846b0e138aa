"""Every architecture that the package runs: loaded into 8 bits, two adapters in one batch, each of them learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.backbone import fingerprint, load_backbone, quantize_model_, quantized_layers
from finetuna_lightning.errors import TargetError
from tests.helpers.models import (
    ARCHITECTURES,
    ATTENTION,
    LABELS,
    VOCAB_SIZE,
    cut,
    logits_of,
    plain_net,
    task_of,
    tiny_folder,
    tiny_inputs,
)

EXPERTS = ("mixtral", "qwen3_moe")
LAYERS = {
    "llama": 16,
    "qwen3": 16,
    "gemma3": 15,
    "mistral": 16,
    "gpt2": 10,
    "gptj": 14,
    "opt": 14,
    "falcon": 9,
    "bert": 17,
    "t5": 35,
    "mixtral": 10,
    "qwen3_moe": 10,
}
"""Distinct 8-bit matrices: every linear layer and embedding, tied ones once."""
SCHEMES = [(name, "int8") for name in ARCHITECTURES] + [
    (name, scheme) for name in ("llama", "gpt2", "bert") for scheme in ("int8-blockwise", "fp8")
]


def loaded(path: Path, name: str, scheme: str = "int8") -> Any:
    return load_backbone(tiny_folder(path / "m", name), scheme=scheme, task=task_of(name), num_labels=LABELS)


def targets_of(name: str) -> list[str]:
    return ATTENTION if name in EXPERTS else ["all-linear"]


def plain_of(name: str) -> list[str]:
    return ["classifier"] if name == "bert" else ["lm_head"]


def loss_of(logits: Tensor, rows: list[int], seed: int) -> Tensor:
    """Cross-entropy of some rows against random labels of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    return F.cross_entropy(logits[rows].flatten(0, -2), labels[rows].flatten())


def learn(
    model: nn.Module, bank: AdapterBank, inputs: dict[str, Tensor], order: list[str], steps: int, lr: float = 1e-2
) -> dict[str, list[float]]:
    """A few joint steps; the losses of each adapter."""
    rows = {name: [index for index, other in enumerate(order) if other == name] for name in bank}
    optimizer = torch.optim.AdamW([{"params": list(bank[name].parameters())} for name in bank], lr=lr, weight_decay=0.0)
    losses: dict[str, list[float]] = {name: [] for name in bank}
    for _ in range(steps):
        with bank.route(order, training=True):
            logits = logits_of(model, inputs)
        each = {name: loss_of(logits, rows[name], seed) for seed, name in enumerate(bank)}
        torch.stack(list(each.values())).sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in bank.parameters())
        optimizer.step()
        optimizer.zero_grad()
        for name, loss in each.items():
            losses[name].append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("name", "scheme"), SCHEMES)
def test_two_adapters_learn_side_by_side(name: str, scheme: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name, scheme)
    assert {quantized.scheme for quantized in quantized_layers(model).values()} == {scheme}
    mark, frozen = fingerprint(model), {key: p.clone() for key, p in model.named_parameters()}
    bank = AdapterBank(model)
    bank.add("a", rank=3, targets=targets_of(name), dropout=0.1)
    bank.add("b", rank=2, alpha=8.0, targets=targets_of(name), plain=plain_of(name), bias=True, seed=1)
    order = ["a", "b", "b", "a"]
    losses = learn(model, bank, tiny_inputs(name), order, steps=8)
    assert all(each[-1] < each[0] - 0.05 for each in losses.values()), losses
    assert fingerprint(model) == mark and all(torch.equal(p, frozen[key]) for key, p in model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())

    with bank.route(order), torch.no_grad():
        joint = logits_of(model, tiny_inputs(name))
    for index, adapter in enumerate(order):
        with bank.route([adapter]), torch.no_grad():
            alone = logits_of(model, cut(tiny_inputs(name), [index]))
        assert (joint[index] - alone[0]).abs().max() <= 1e-4 * max(1.0, float(alone.abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_and_embedding_is_in_8_bits(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    assert len(quantized_layers(model)) == LAYERS[name]
    assert all(
        p.dim() != 2 or ("gate" in key or "router" in key) for key, p in model.named_parameters()
    )  # routers stay


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_carry_deltas_too(name: str, tmp_path: Path) -> None:
    """Beneath the scale of Gemma's, the offset of OPT's, and the one row of GPT-2's and BERT's positions."""
    tables = {
        "gpt2": ["wte", "wpe"],
        "gptj": ["wte"],
        "opt": ["embed_tokens", "embed_positions"],
        "falcon": ["word_embeddings"],
        "bert": ["word_embeddings", "position_embeddings"],
        "t5": ["embed_tokens"],
    }
    model = loaded(tmp_path, name)
    bank = AdapterBank(model)
    bank.add("a", rank=4, targets=tables.get(name, ["embed_tokens"]))
    bank.add("b", rank=2, targets=targets_of(name), plain=tables.get(name, ["embed_tokens"])[:1])
    order = ["b", "a", "a", "b"]
    losses = learn(model, bank, tiny_inputs(name), order, steps=12, lr=3e-2)
    assert all(each[-1] < each[0] - 0.02 for each in losses.values()), losses
    with bank.route(order), torch.no_grad():
        joint = logits_of(model, tiny_inputs(name))
    for index, adapter in enumerate(order):
        with bank.route([adapter]), torch.no_grad():
            alone = logits_of(model, cut(tiny_inputs(name), [index]))
        assert (joint[index] - alone[0]).abs().max() <= 1e-4 * max(1.0, float(alone.abs().max()))


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_targets_are_refused(name: str, tmp_path: Path) -> None:
    bank = AdapterBank(loaded(tmp_path, name))
    for target in ("experts", "gate_up_proj", "down_proj"):
        with pytest.raises(
            TargetError, match=f"'{target}' names expert weights.*target the attention projections instead"
        ):
            bank.add("a", targets=[target])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5"])
def test_16_bit_activations(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_backbone(tiny_folder(tmp_path / "m", name), task=task_of(name), dtype=dtype)
    bank = AdapterBank(model)
    bank.add("a", rank=4, targets=targets_of(name))
    bank.add("b", rank=2, targets=targets_of(name), plain=plain_of(name))
    losses = learn(model, bank, tiny_inputs(name), ["a", "b", "b", "a"], steps=6)
    assert all(each[-1] < each[0] - 0.02 for each in losses.values()), losses
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    with bank.route(["a", "b", "b", "a"]):
        assert logits_of(model, tiny_inputs(name)).dtype == dtype


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8"])
def test_a_module_that_is_no_transformer(scheme: str) -> None:
    model = quantize_model_(plain_net(), scheme)
    mark = fingerprint(model)
    bank = AdapterBank(model)
    bank.add("a", rank=3, targets=["all-linear", "table"])
    bank.add("b", rank=2, targets=["first"], plain=["block", "head"], dropout=0.1)
    losses = learn(model, bank, tiny_inputs("llama"), ["a", "b", "b", "a"], steps=10)
    assert all(each[-1] < each[0] - 0.05 for each in losses.values()), losses
    assert fingerprint(model) == mark and model.table.num_embeddings == VOCAB_SIZE


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_follows_the_route(name: str, tmp_path: Path) -> None:
    """Greedy, and by beams, which multiply the rows: each row as it is alone."""
    model = loaded(tmp_path, name)
    bank = AdapterBank(model)
    for index, adapter in enumerate(("a", "b")):
        bank.add(adapter, rank=4, targets=targets_of(name), plain=plain_of(name)[:index], seed=index)
        with torch.no_grad():
            for parameter in bank[adapter].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    ids = tiny_inputs(name, rows=3, length=6)["input_ids"]
    for beams in (1, 3):
        options: dict[str, Any] = dict(
            max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None, pad_token_id=0
        )
        with bank.route(["a", "b", "a"]):
            joint = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for index, adapter in enumerate("aba"):
            row = ids[index : index + 1]
            with bank.route([adapter]):
                alone = model.generate(row, attention_mask=torch.ones_like(row), **options)
            assert torch.equal(joint[index], alone[0])
        assert not torch.equal(joint[0, -6:], joint[1, -6:])
