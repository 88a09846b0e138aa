"""Gradients that a backward pass puts past autograd, which takes longer over some ten thousand parameters than a GPU
over the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """What computes gradients: ``written`` are the few tensors that hold those of all its parameters."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Those that it has gradients for."""

    def views(self, written: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each parameter, within ``written``."""

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """By parameter, int64: which of ``written`` holds its gradient, contiguously, and from which byte on."""


class Gradients:
    """Those of one training step.

    Args:
        wait: whether they stay as they were written until ``bind``; else each is put into its parameter's ``grad`` at
            once, or added to what is there. A tensor for each parameter is most of what a step costs the host, and
            whoever steps all parameters at once needs none.
    """

    def __init__(self, wait: bool = False) -> None:
        self.wait = wait
        self.waiting: list[tuple[Source, Sequence[Tensor]]] = []

    def put(self, source: Source, written: Sequence[Tensor]) -> None:
        """Take what a backward pass has written."""
        if self.wait:
            self.waiting.append((source, written))
        else:
            deposit(source.parameters, source.views(written))

    def bind(self) -> None:
        """Put into ``grad`` what waits, and what still comes."""
        waiting, self.waiting, self.wait = self.waiting, [], False
        for source, written in waiting:
            self.put(source, written)


def deposit(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Put gradients in place, or add them to those that are there, as autograd does."""
    there: list[tuple[Tensor, Tensor]] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if (old := parameter.grad) is None:
            parameter.grad = gradient
        else:
            there.append((old, gradient))
    if there:
        torch._foreach_add_([old for old, _ in there], [new for _, new in there])
