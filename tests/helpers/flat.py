"""Flat optimizers beside bitsandbytes' own, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetuna_lightning.training.flat_optim import FLAT, FlatStep, flat_optimizer

SIZES = [(16, 256), (64, 130), (5000,), (4097,), (4095,), (7,), (33,), (3, 5001), (1,), (4096,)]
"""Of parameters: multiples of a block and others, with state in 8 and in 32 bits."""

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def weights(device: str, dtype: torch.dtype = torch.float32, sizes: Sequence[Any] = SIZES) -> list[nn.Parameter]:
    """The same ones on every call."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def give(parameters: Sequence[nn.Parameter], step: int, *, absent: int | None = None) -> None:
    """The gradients of ``step``, whose size varies from step to step; parameter ``absent`` has none."""
    generator = torch.Generator().manual_seed(1 + step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 5 - 2)
        parameter.grad = None if index == absent else gradient.to(parameter)


def pair(
    kind: str, device: str, dtype: torch.dtype = torch.float32
) -> tuple[tuple[list[nn.Parameter], FlatStep], tuple[list[nn.Parameter], Any]]:
    """A flat optimizer and bitsandbytes' own, over weights that are the same."""
    mine, theirs = weights(device, dtype), weights(device, dtype)
    peer = getattr(bitsandbytes.optim, FLAT[kind])(theirs, **SETTINGS)
    return (mine, flat_optimizer(kind, mine, **SETTINGS)), (theirs, peer)


def assert_same(mine: Sequence[nn.Parameter], own: Any, theirs: Sequence[nn.Parameter], peer: Any) -> None:
    """Weights and states, bit for bit."""
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b), tuple(a.shape)
        assert own.state[a].keys() == peer.state[b].keys()
        for key, value in peer.state[b].items():
            found = own.state[a][key]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, (tuple(a.shape), key)


class Ops(TorchDispatchMode):
    """The names of all operators that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
