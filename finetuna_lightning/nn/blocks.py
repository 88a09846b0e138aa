"""The parts of a Llama-like decoder layer, as few kernels as they can be. Each class goes in front of the model's own
(see ``fusing.py``) and computes the same; where ``nn.joint`` cannot (another device, dropout in force, a hooked layer,
a cache of keys and values), the model's own forward runs.

Nothing is registered, so that names, state dicts and what is trained stay as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from finetuna_lightning.nn import joint
from finetuna_lightning.nn.routing import is_observed, joint_parts


class FusedNorm(nn.Module):
    """RMSNorm: ``x / rms(x) * weight``; ``variance_epsilon`` is the model's."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not joint.takes_norm(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return joint.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedSwiGLU(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        parts = joint_parts([self.gate_proj, self.up_proj, self.down_proj], x)
        if parts is None or any(bias is not None for bias in parts[3]) or len({q.compute for q in parts[2]}) > 1:
            return super().forward(x)  # type: ignore[no-any-return]
        cut, deltas, weights, _ = parts
        return joint.swiglu(x, weights, deltas, cut)


class FusedAttention(nn.Module):
    """Self-attention with rotary embeddings: q, k and v in one go, the attention function that the configuration
    names, and the output projection. ``finetuna_attend`` is that function's look-up, put there by ``fusing.fuse_``."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    finetuna_attend: Any

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        parts = None
        if past_key_values is None and position_embeddings is not None:
            parts = joint_parts([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        if parts is None or len({q.compute for q in parts[2]}) > 1:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
        assert position_embeddings is not None
        cut, deltas, weights, biases = parts
        cos, sin = position_embeddings
        q, k, v, _ = joint.attention_inputs(hidden_states, cos, sin, self.head_dim, weights, biases, deltas, cut)
        out, attention = self.finetuna_attend(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), attention


class FusedLayer(nn.Module):
    """A decoder layer, ``h = x + o_proj(attention(norm(x)))``, then ``h + mlp(norm(h))``: what the norms put out is
    written as the codes that the products read, the residual stream is added while products and norms are written."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        x, attn, mlp = hidden_states, self.self_attn, self.mlp
        norms = (self.input_layernorm, self.post_attention_layernorm)
        layers = ([attn.q_proj, attn.k_proj, attn.v_proj], [attn.o_proj], [mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        parts: list[Any] = []
        plain = past_key_values is None and position_embeddings is not None and x.dim() == 3
        if plain and not any(is_observed(part) for part in (attn, mlp, *norms)):
            normed = all(joint.takes_norm(x, norm.weight) for norm in norms)
            parts = [joint_parts(group, x) for group in layers] if normed else []
        one_compute = parts and all(part and len({q.compute for q in part[2]}) == 1 for part in parts)
        if not one_compute or any(bias is not None for bias in parts[2][3]):
            return super().forward(
                x, attention_mask, position_ids, past_key_values, use_cache,
                position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
        assert position_embeddings is not None
        (cut, deltas, weights, biases), (_, (own,), (out,), (bias,)), (_, mlp_deltas, mlp_weights, _) = parts
        first, second = ((norm.weight, norm.variance_epsilon) for norm in norms)
        q, k, v, x = joint.attention_inputs(x, *position_embeddings, attn.head_dim, weights, biases, deltas, cut, first)
        y, _ = attn.finetuna_attend(
            attn, q, k, v, attention_mask, dropout=0.0, scaling=attn.scaling, position_ids=position_ids, **kwargs
        )
        x = joint.linear(y.reshape(*x.shape[:-1], -1), out, bias, own, cut, residual=x)
        return joint.swiglu(x, mlp_weights, mlp_deltas, cut, second)
