"""One low-rank delta on one layer (arXiv 2106.09685). The layer itself stands elsewhere, shared and frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuna_lightning.nn.dropout import drop, kept_share


class _Delta(nn.Module):
    """What both kinds share: rank, scaling and the two matrices, kept in float32 and computed in the activations'
    type."""

    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer that carries the delta: (in_features, out_features), or (num_embeddings, dim)."""
        down, up = (parameter for parameter in self.parameters() if parameter.dim() == 2)
        return down.shape[1], up.shape[0]


class LoRALinear(_Delta):
    """``delta(x) = alpha / r * (dropout(x) A^T B^T + b)`` with A [r, in], B [out, r]; x [..., in], result [..., out].

    A is Kaiming-uniform, B (and b) zero, so that a new delta changes nothing.

    Args:
        in_features, out_features: of the layer that carries the delta.
        rank, alpha, dropout: of the delta.
        bias: train b.
        generator: the stream of A's initial values; they are drawn on the CPU, so that every device gets the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank, alpha)
        self.dropout = dropout
        bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5), as nn.Linear's own
        a = torch.empty(rank, in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.lora_bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor, seed: int | None = None, at: Tensor | None = None) -> Tensor:
        """The delta for x. ``seed`` and the places ``at`` of x's vectors (see ``nn.dropout.drop``) make the dropout
        mask; without a seed dropout is off."""
        if self.dropout > 0 and seed is not None:
            x = drop(x, self.dropout, seed, at)
        low = F.linear(x, self.lora_A.to(x.dtype))
        if self.dropout > 0 and seed is not None:
            low = low / kept_share(self.dropout)
        bias = None if self.lora_bias is None else self.lora_bias.to(low.dtype)
        return F.linear(low, self.lora_B.to(low.dtype), bias) * self.scaling  # in PEFT's order, rounded as there

    def extra_repr(self) -> str:
        return f"{self.lora_A.shape[1]} -> {self.rank} -> {self.lora_B.shape[0]}, alpha={self.alpha:g}"


class LoRAEmbedding(_Delta):
    """``delta(ids) = alpha / r * A[:, ids]^T B^T`` with A [r, num_embeddings], B [dim, r]; ids [...], result [...,
    dim].

    A is zero and B normal, so that a new delta changes nothing (DESIGN: as in finetuna and PEFT). The column of
    ``padding_idx`` gets no gradient, as the embedding's own row would get none.
    """

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(rank, alpha)
        self.padding_idx = padding_idx
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.empty(dim, rank, device="cpu").normal_(generator=generator))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The delta for ids, in ``dtype``."""
        low = F.embedding(ids, self.lora_embedding_A.t(), self.padding_idx).to(dtype)
        return F.linear(low, self.lora_embedding_B.to(dtype)) * self.scaling

    def extra_repr(self) -> str:
        return f"{self.lora_embedding_A.shape[1]} -> {self.rank} -> {self.lora_embedding_B.shape[0]}"


Delta = LoRALinear | LoRAEmbedding
"""One delta of either kind."""
