"""One low-rank delta on one layer (arXiv 2106.09685). The layer itself stands elsewhere, shared and frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def seeded_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Dropout whose mask is a function of ``seed`` and x's shape alone: a recomputed forward draws the same mask, and
    no other stream moves.

    For x [rows, tokens, features] the mask is drawn token by token, so that on the CPU, whose generator is sequential,
    padding to a longer neighbour leaves the masks of the tokens before it as they are.
    """
    generator = torch.Generator(device=x.device).manual_seed(seed)
    by_token = x.transpose(0, 1) if x.dim() == 3 else x
    drawn = torch.empty(by_token.shape, dtype=torch.float32, device=x.device).uniform_(generator=generator)
    keep = (drawn.transpose(0, 1) if x.dim() == 3 else drawn) >= p
    return torch.where(keep, x / (1 - p), torch.zeros((), dtype=x.dtype, device=x.device))


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

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        """The delta for x; ``seed`` draws the dropout mask, None leaves dropout off."""
        if self.dropout > 0 and seed is not None:
            x = seeded_dropout(x, self.dropout, seed)
        low = F.linear(x, self.lora_A.to(x.dtype))
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
