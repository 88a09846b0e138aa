"""What keeps one adapter's fault its own: bad tokens and labels are selected out and told, and a verdict on a step
reaches the host without making it wait.

A fault is never masked by a multiplication, which would turn NaN times zero into NaN again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetuna_lightning.training.batches import route_of
from finetuna_lightning.training.tokenizing import IGNORED


def guarded(
    batch: Mapping[str, Any], tokens: int | None, classes: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``batch`` with every token of ``input_ids`` below ``tokens`` and every label below ``classes`` (or ignored), and
    for each adapter whether its rows were so before: a 0-dim bool on their device.

    What is out of range becomes token 0, or ignored; an index error would end the run of all. None checks nothing.
    """
    new = dict(batch)
    names, sizes, axis = list(batch["adapters"]), list(route_of(batch).sizes), int("lengths" in batch)
    fit = torch.ones(len(names), dtype=torch.bool, device=batch["input_ids"].device)
    for key, limit, instead in (("input_ids", tokens, 0), ("labels", classes, IGNORED)):
        values = batch.get(key)
        if limit is None or not isinstance(values, Tensor) or values.is_floating_point():
            continue
        outside = (values >= limit) | (values < 0)
        if key == "labels":
            outside &= values != IGNORED
        new[key] = torch.where(outside, instead, values)
        fit &= ~torch.stack([part.any() for part in outside.split(sizes, axis)])
    found: dict[str, Tensor] = {}
    for name, own in zip(names, fit.unbind(), strict=True):  # a name may come more than once
        found[name] = found[name] & own if name in found else own
    return new, found


def agreed(good: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The verdicts of all processes: good where it is good in each. All must ask about the same adapters."""
    if not good or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return dict(good)
    together = torch.stack(list(good.values())).to(torch.uint8)
    dist.all_reduce(together, op=dist.ReduceOp.MIN)
    return dict(zip(good, together.bool().unbind(), strict=True))


class LateVerdicts:
    """Bools on their way from the device, by name: asked a step later they are there, and nothing waits for them."""

    def __init__(self, flags: Mapping[str, Tensor]) -> None:
        self._names = list(flags)
        self._flags = torch.stack(list(flags.values()))
        self._event: torch.cuda.Event | None = None
        if self._flags.is_cuda:
            there = torch.empty(len(flags), dtype=torch.bool, pin_memory=True)
            self._flags = there.copy_(self._flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, bool]:
        """The flags; waits only for what the device did up to the moment this was made."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._flags.tolist(), strict=True))
