"""Causal attention of short sequences on the CPU, as batched products (AMX tiles where there are such).

torch's own flash kernel for the CPU never holds the weights ``P = softmax(scale Q K^T)`` [sequences, heads, T, T], and
takes several times as long where sequences are short, most of all backwards. Here P stands for some sequences at a
time, in the activations' type, and is computed again for the backward pass:

    O = P V      dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))
    dQ = scale dS K      dK = scale dS^T Q

A sequence's products have the same shape in any company, so that its results are the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetuna_lightning.ops import native

LONGEST = 256  # tokens of a sequence: half of P is for nothing, which tells where they are longer
PIECE_ELEMENTS = 1 << 21  # of P at a time


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend`` is for these [B, H, T, D]: of a CPU, bfloat16, as many keys as queries,
    short. (In float32 torch's own is faster.)"""
    same = query.dtype == key.dtype == value.dtype == torch.bfloat16
    shapes = query.shape[-2:] == key.shape[-2:] and key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    own = query.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return own and same and shapes and 0 < query.shape[-2] <= LONGEST and query.numel() > 0


class _Causal(torch.autograd.Function):
    """Keeps Q, K and V; P is computed again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, size = query.shape
        shared, mask = heads // key.shape[1], _mask(tokens, query.dtype)
        q, k, v = (x.contiguous() for x in (query, key, value))
        out = torch.empty(batch, tokens, heads, size, dtype=query.dtype)
        for cut in _pieces(batch, heads * tokens * tokens):
            weights = _weights(_flat(q[cut]), _flat(k[cut], shared), mask, scale)
            out[cut] = torch.bmm(weights, _flat(v[cut], shared)).view(-1, heads, tokens, size).transpose(1, 2)
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        batch, heads, tokens, size = query.shape
        shared, mask = heads // key.shape[1], _mask(tokens, query.dtype)
        # laid out as the tokens of q, k and v are
        found = [torch.empty(batch, tokens, x.shape[1], size, dtype=x.dtype) for x in (query, key, value)]
        for cut in _pieces(batch, heads * tokens * tokens):
            q, k, v = _flat(query[cut]), _flat(key[cut], shared), _flat(value[cut], shared)
            g, weights = _flat(grad[cut].transpose(1, 2)), _weights(q, k, mask, ctx.scale)
            slope = torch.bmm(g, v.transpose(1, 2))
            if native.takes(slope, weights):
                native.run("causal_softmax_backward", slope, weights, *slope.shape[:2], ctx.scale)
            else:
                slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype).mul_(ctx.scale)
            each = torch.bmm(slope, k), torch.bmm(slope.transpose(1, 2), q), torch.bmm(weights.transpose(1, 2), g)
            for into, part, times in zip(found, each, (1, shared, shared), strict=True):
                part = part.view(-1, heads // times, times, tokens, size)
                into[cut] = (part.sum(2) if times > 1 else part.squeeze(2)).transpose(1, 2)
        return (*(x.transpose(1, 2) for x in found), None)  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _mask(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu_(1)


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    if scale > 0 and native.takes(scores):
        native.run("causal_softmax", scores, *scores.shape[:2], scale)
        return scores
    return torch.softmax(scores.mul_(scale).add_(mask), -1)


def _pieces(batch: int, each: int) -> list[slice]:
    step = max(1, PIECE_ELEMENTS // each)
    return [slice(start, start + step) for start in range(0, batch, step)]


def _flat(heads: Tensor, shared: int = 1) -> Tensor:
    """[B, H, T, D] as [B * H * shared, T, D], each head ``shared`` times."""
    if shared > 1:
        heads = heads.repeat_interleave(shared, 1)
    return heads.reshape(-1, *heads.shape[-2:])


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``softmax(scale Q K^T) V``, each token looking at those before it and at itself.

    Args:
        query: [B, H, T, D].
        key, value: [B, fewer heads, T, D], each head serving ``H / fewer`` of the queries' in turn.
        scale: of the scores.

    Returns:
        [B, T, H, D].
    """
    return _Causal.apply(query, key, value, scale)  # type: ignore[no-any-return, no-untyped-call]
