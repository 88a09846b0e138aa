"""Which modules the fused parts go in front of, and that the model computes the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from finetuna_lightning import fusing
from finetuna_lightning.backbone import cast_, quantize_model_
from finetuna_lightning.fused_memory import FUSED_MODELS
from finetuna_lightning.fusing import fuse_
from finetuna_lightning.nn.blocks import FusedAttention, FusedNorm, FusedSwiGLU
from finetuna_lightning.nn.routing import is_observed

CPU = torch.device("cpu")


def model_of(kind: str, **more: Any) -> nn.Module:
    """Two bfloat16 layers, in int8."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings | more))
    for parameter in model.parameters():
        parameter.data.mul_(2) if parameter.dim() == 2 else parameter.data.uniform_(0.5, 1.5)
    quantize_model_(model.eval())
    return cast_(model, torch.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma3_text"])
def test_a_fused_model_computes_the_same(kind: str) -> None:
    model: Any = model_of(kind)
    ids = torch.randint(96, (2, 24))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        done = fuse_(model, CPU, torch.bfloat16)
        got = model(input_ids=ids, use_cache=False).logits.float()
    assert float((got - wanted).norm() / wanted.norm()) < 2e-2
    assert fuse_(model, CPU, torch.bfloat16) == {}
    if kind in FUSED_MODELS:
        assert sorted(done.values()) == [2, 2, 5]
        layers = [module for name, module in model.named_modules() if name.endswith(("layers.0", "layers.1"))]
        assert all(fusing._is_layer(layer) for layer in layers)  # on a GPU, those are fused whole


def test_what_only_looks_alike_is_left_alone() -> None:
    class Other(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return]

    model: Any = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = Other
        layer.input_layernorm.variance_epsilon = 1  # no float
    layer.self_attn.sinks = nn.Linear(4, 4)
    fuse_(model, CPU, torch.bfloat16)
    first, second = model.model.layers
    assert not isinstance(first.mlp, FusedSwiGLU) and not isinstance(second.mlp, FusedSwiGLU)
    assert not isinstance(first.input_layernorm, FusedNorm) and isinstance(first.post_attention_layernorm, FusedNorm)
    assert not isinstance(second.self_attn, FusedAttention) and isinstance(first.self_attn, FusedAttention)


def test_state_and_names_stay() -> None:
    model, plain = model_of("llama"), model_of("llama")
    fuse_(model, CPU, torch.bfloat16)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert fuse_(plain, CPU, torch.float64) == {}


def test_a_layer_with_a_forward_of_its_own_is_called() -> None:
    """As accelerate's hooks put it there."""
    layer = nn.Linear(2, 2)
    assert not is_observed(layer)
    layer.forward = layer.forward  # type: ignore[method-assign]
    assert is_observed(layer)
