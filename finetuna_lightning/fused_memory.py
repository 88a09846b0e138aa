"""What a step through a GPU's fused layers needs, in closed form.

Triton kernels do not run on tensors without storage, so what they keep and need is counted here by hand. Whoever
changes what a fused layer saves for its backward pass changes ``FusedShape`` with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from finetuna_lightning.configs import AdapterConfig, BackboneConfig
from finetuna_lightning.ops.library import has_joint_kernels
from finetuna_lightning.ops.loss import CHUNK
from finetuna_lightning.simulation import (
    FIRST_BACKWARD,
    FORWARD,
    HEAD,
    HEAD_BACKWARD,
    LAST_BACKWARD,
    STEP,
    Phase,
    StepBytes,
)

FUSED_MODELS = frozenset({"llama", "mistral", "qwen2"})
"""transformers' model_type of those whose layers are fused whole."""


def runs_fused(
    architecture: Any, backbone: BackboneConfig, adapters: Iterable[AdapterConfig], dtype: torch.dtype, gpu: bool
) -> bool:
    """Whether a run goes through fused layers: Llama-like ones in int8, computed in 16 bits on a GPU that has the
    kernels (one that is not here is taken to), adapters without dropout, biases and modules of their own."""
    here = not torch.cuda.is_available() or has_joint_kernels(torch.device("cuda", torch.cuda.current_device()))
    plain = all(not own.dropout and own.bias is False and not own.plain_modules for own in adapters)
    stored = backbone.scheme == "int8" and not backbone.skip_modules and dtype in (torch.bfloat16, torch.float16)
    plain = plain and backbone.attn_implementation != "eager"  # which keeps its scores
    return gpu and here and plain and stored and architecture.model_type in FUSED_MODELS


@dataclass(frozen=True)
class FusedShape:
    """A Llama-like decoder as its fused layers compute it.

    Args:
        hidden, intermediate, kv: widths of the hidden state, of gate and up, of the keys (and of the values).
        heads, layers, vocab: counts.
        ranks: low-rank products of a token in one layer, in elements: the largest rank for each target.
        chunk: tokens of a piece of the logits.
        width: bytes of a number as the products read it: 1 in int8, 2 in 16 bits (in slices: see ``nn.joint``).
    """

    hidden: int
    intermediate: int
    kv: int
    heads: int
    layers: int
    vocab: int
    ranks: int
    chunk: int = CHUNK
    width: int = 1

    @property
    def kept(self) -> int:
        """Bytes that a layer keeps for each token: what both norms read, q, k and v after the rotary embedding, the
        attention's output, gate, up and the low-rank products in 16 bits; what both norms give as the products read
        it; the attention's logarithms and the norms' and codes' scales in float32."""
        sixteen = 4 * self.hidden + 2 * self.kv + 2 * self.intermediate + self.ranks
        return 2 * sixteen + 2 * self.width * self.hidden + 4 * self.heads + 4 * 4

    @property
    def forward(self) -> int:
        """Bytes that a layer needs for each token in the forward pass and gives back: silu(gate) * up."""
        return self.width * self.intermediate

    @property
    def backward(self) -> int:
        """Bytes that a layer needs for each token in the backward pass: the gradients of silu(gate) * up, of gate and
        of up in 16 bits, the last two also as the products read them, and that of the hidden state."""
        return (3 * 2 + 2 * self.width) * self.intermediate + 2 * self.hidden

    @property
    def scratch(self) -> int:
        """Bytes of the transposed gate and up in 8 bits."""
        return 2 * self.hidden * self.intermediate


def fused_step(shape: FusedShape, tokens: int, gradients: int, waiting: int, recompute: bool) -> StepBytes:
    """A step of ``tokens`` tokens through fused layers and a head fused with the loss. Of the adapters' ``gradients``,
    those that are ``waiting`` for more batches stand from its beginning.

    Recomputation keeps the input of every layer, and has one whole layer at a time. The head makes its gradient in the
    forward pass, piece by piece: it keeps the hidden state's, and has the dequantised head, a piece of the logits and
    its gradient for a while.
    """
    hidden, layer = 2 * shape.hidden * tokens, shape.kept * tokens
    kept = shape.layers * (hidden if recompute else layer) + 3 * hidden  # the final norm's input, output and gradient
    again = layer if recompute else 0
    forward = shape.forward * tokens + again
    head = 2 * shape.vocab * shape.hidden + 2 * min(shape.chunk, tokens) * shape.vocab
    backward = shape.backward * tokens + shape.scratch + again
    last = kept - (0 if recompute else layer)
    return StepBytes(
        kept,
        {
            FORWARD: Phase(waiting, kept, forward),
            HEAD: Phase(waiting, kept, head),
            HEAD_BACKWARD: Phase(waiting, kept, hidden),
            LAST_BACKWARD: Phase(max(waiting, gradients / shape.layers), last, backward + (0 if recompute else layer)),
            FIRST_BACKWARD: Phase(gradients, hidden if recompute else layer, backward),
            STEP: Phase(gradients, 0, 0),
        },
    )


def fused_shape(architecture: Any, ranks: int, compute: str) -> FusedShape:
    """The shape of a Llama-like configuration of transformers."""
    heads = architecture.num_attention_heads
    width = getattr(architecture, "head_dim", None) or architecture.hidden_size // heads
    return FusedShape(
        architecture.hidden_size, architecture.intermediate_size, width * architecture.num_key_value_heads, heads,
        architecture.num_hidden_layers, architecture.vocab_size, ranks, width=2 if compute == "16bit" else 1,
    )  # fmt: skip
