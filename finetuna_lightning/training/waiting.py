"""Gradients that wait for the step in the few tensors that they were written in (see ``nn.gradients``): when they may,
and where they stand then."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from finetuna_lightning.nn.gradients import Source
from finetuna_lightning.training.flat_optim import Shelf
from finetuna_lightning.training.norms import addresses
from finetuna_lightning.training.precision import EightBitPrecision

# What is called from the backward pass to the end of the step.
_CALLED = ("on_after_backward", "on_before_optimizer_step")
_MODULE = (*_CALLED, "backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping")


def are_read(trainer: Trainer, module: LightningModule, own: type[LightningModule], optimizer: Any) -> bool:
    """Whether somebody may read or change ``grad`` between the backward pass and the end of the step: a callback (whose
    attribute ``reads_gradients``, where it has one, says so), the module where it is no longer ``own``'s, a hook of the
    optimizer, another plugin or strategy."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return (
        any(getattr(each, "reads_gradients", _overrides(each, Callback, _CALLED)) for each in callbacks)
        or _overrides(module, own, _MODULE)
        or bool(torch_optimizer._global_optimizer_pre_hooks or optimizer._optimizer_step_pre_hooks)
        or type(trainer.precision_plugin) not in (Precision, EightBitPrecision)
        or type(trainer.strategy) is not SingleDeviceStrategy
        or trainer.accumulate_grad_batches != 1
    )


def _overrides(instance: Any, cls: type, names: Sequence[str]) -> bool:
    return any(getattr(getattr(instance, name), "__func__", None) is not getattr(cls, name) for name in names)


class Standing:
    """Where the parameters of ``shelves`` stand, and the gradients that ``waiting`` has for them. Where gradients come
    from the same sources again, for the same shelves, neither parameters nor places have changed.
    """

    def __init__(self, waiting: Sequence[tuple[Source, Sequence[Tensor]]], shelves: Sequence[Shelf]) -> None:
        self._known = [*(source for source, _ in waiting), *shelves]
        parameters = [*chain.from_iterable(source.parameters for source, _ in waiting)]
        numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        own = [*chain.from_iterable(shelf.parameters for shelf in shelves)]
        order = [numbers.get(id(parameter), -1) for parameter in own]
        self._complete = len(numbers) == len(parameters) and -1 not in order
        if not self._complete:
            return
        tensors, found = 0, []
        for source, written in waiting:
            which, at = source.places
            found.append(torch.stack([which + tensors, at]))
            tensors += len(written)
        self._which, self._at = torch.cat(found, 1)[:, order]
        self._weights, self._counts = addresses(own), [len(shelf.parameters) for shelf in shelves]

    def of(self, waiting: Sequence[tuple[Source, Sequence[Tensor]]], shelves: Sequence[Shelf]) -> bool:
        """Whether this is for these."""
        known = [*(source for source, _ in waiting), *shelves]
        return len(known) == len(self._known) and all(map(is_, known, self._known))

    def rows(self, waiting: Sequence[tuple[Source, Sequence[Tensor]]]) -> list[Tensor]:
        """For each shelf the addresses of its parameters and of their gradients: int64 [2, parameters], on the host.
        None at all where some parameter has no gradient there, or more than one."""
        if not self._complete:
            return []
        starts = addresses([*chain.from_iterable(written for _, written in waiting)])
        return list(torch.stack([self._weights, starts[self._which] + self._at]).split(self._counts, 1))
