"""The finetuna API: several fine-tuned models over one base."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetuna_lightning.errors import ConfigError, TargetError
from finetuna_lightning.finetuned import (
    EmbeddingAdapterConfig,
    LinearAdapterConfig,
    get_lora_adaptable_modules,
    get_model_mem_consumption,
    load_state_dict,
    new_finetuned,
    prepare_base_model,
    state_dict,
)
from finetuna_lightning.nn.quantized import QuantizedLinear


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def base() -> nn.Module:
    return prepare_base_model(tiny())


IDS = torch.arange(16).view(2, 8) * 5 % 99


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def train(model: nn.Module, steps: int = 10) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(IDS).logits
        nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()


def test_bytes_grow_by_the_adapters_own(base: nn.Module) -> None:
    alone = get_model_mem_consumption(base)
    models = [new_finetuned(base, seed=seed) for seed in range(3)]
    own = sum(p.numel() * p.element_size() for model in models for p in model.parameters() if p.requires_grad)
    assert get_model_mem_consumption(base, *models) == alone + own
    frozen = {p.data_ptr() for p in base.parameters()} | {b.data_ptr() for b in base.buffers()}
    for model in models:
        assert {t.data_ptr() for t in model.buffers()} <= frozen
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} <= frozen


def test_training_one_changes_no_other(base: nn.Module) -> None:
    first, second = new_finetuned(base), new_finetuned(base, adapt_layers=["q_proj"], plain_layers=())
    before = logits(base)
    assert torch.equal(logits(first), before) and torch.equal(logits(second), before)
    train(first)
    assert not torch.equal(logits(first), before)
    assert torch.equal(logits(base), before) and torch.equal(logits(second), before)


def test_state_round_trip_and_deepcopy(base: nn.Module) -> None:
    first = new_finetuned(base)
    train(first, 3)
    state = state_dict(first)
    assert set(state) == {n.split("finetuned.", 1)[1] for n, p in first.named_parameters() if p.requires_grad}
    other = new_finetuned(base, seed=7)
    load_state_dict(other, state)
    assert torch.equal(logits(other), logits(first))
    assert torch.equal(logits(copy.deepcopy(first)), logits(first))
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match="Missing key"):
        load_state_dict(other, state)
    load_state_dict(other, state, strict=False)


def test_prepare_leaves_what_it_is_told_to() -> None:
    model = prepare_base_model(tiny())
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantizedLinear)
    assert not isinstance(model.get_submodule("lm_head"), QuantizedLinear)
    plain = prepare_base_model(tiny(), do_not_quantize=True)
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    assert not any(p.requires_grad for p in plain.parameters())
    unquantised = new_finetuned(tiny(), do_not_quantize=True)
    assert not any(isinstance(m, QuantizedLinear) for m in unquantised.modules())


def test_configurations_by_name(base: nn.Module) -> None:
    model = new_finetuned(
        base,
        adapt_layers=["q_proj", "v_proj", "embed_tokens"],
        linear_config={"q_proj": LinearAdapterConfig(r=2), "v_proj": LinearAdapterConfig(r=3, bias=False)},
        embedding_config=EmbeddingAdapterConfig(r=5),
        plain_layers=(),
    )
    state = state_dict(model)
    q, v = "deltas.model/layers/0/self_attn/q_proj", "deltas.model/layers/0/self_attn/v_proj"
    assert state[f"{q}.lora_A"].shape[0] == 2 and f"{q}.lora_bias" in state
    assert state[f"{v}.lora_A"].shape[0] == 3 and f"{v}.lora_bias" not in state
    assert state["deltas.model/embed_tokens.lora_embedding_A"].shape[0] == 5
    with pytest.raises(TargetError, match=r"linear_config has no entry for .*v_proj"):
        new_finetuned(base, adapt_layers=["q_proj", "v_proj"], linear_config={"q_proj": LinearAdapterConfig()})


def test_edge_rules(base: nn.Module) -> None:
    with pytest.raises(TargetError, match="both adapted and trained in full"):
        new_finetuned(base, adapt_layers=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="quantised already"):
        new_finetuned(base, modules_not_to_quantize=["up_proj"])
    with pytest.raises(ConfigError, match="not made by new_finetuned"):
        state_dict(base)
    assert get_lora_adaptable_modules(base, ["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert "model.embed_tokens" in get_lora_adaptable_modules(base)
    kept = new_finetuned(base, modules_not_to_freeze=["norm"], plain_layers=())
    assert any("plain.model/norm" in name for name, p in kept.named_parameters() if p.requires_grad)
