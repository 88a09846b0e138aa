"""Each adapter's summed loss and number of targets, from what a model gave for a joint batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.batches import Separate, cut_output, route_of
from finetuna_lightning.training.distributed import Piece
from finetuna_lightning.training.head import HeadInput
from finetuna_lightning.training.tokenizing import IGNORED

Loss = Callable[[Any, dict[str, Any]], Tensor]


def adapter_losses(output: Any, batch: Mapping[str, Any], task: str, custom: Loss | None = None) -> Iterator[Piece]:
    """For each adapter of the batch: name, summed loss, number of targets, and which of the batch's sequences are its.

    Args:
        output: the model's, with ``logits``; a ``HeadInput``; or a ``Separate`` of these.
        task: the module's.
        custom: for the task ``custom``: ``loss(output, batch) -> scalar``, the mean over one adapter's rows.
    """
    if isinstance(output, Separate):
        first = 0
        for own, part in output.parts:
            for name, total, count, cut in adapter_losses(own, part, task, custom):
                yield name, total, count, slice(first, first + cut.stop)
                first += cut.stop
        return
    stops = list(accumulate(batch["rows"]))
    cuts = [slice(stop - rows, stop) for stop, rows in zip(stops, batch["rows"], strict=True)]
    if custom is not None:
        yield from _custom(output, batch, cuts, custom)
        return
    labels, packed = _targets(batch, task), int("lengths" in batch)
    targets = labels.split(list(route_of(batch).sizes), packed)
    totals = _fused(output, labels) if isinstance(output, HeadInput) else _from_logits(output.logits, targets, packed)
    counted = (labels != IGNORED).split(list(route_of(batch).sizes), packed)
    for name, cut, total, own in zip(batch["adapters"], cuts, totals, counted, strict=True):
        yield name, total, own.sum(), cut


def _custom(output: Any, batch: Mapping[str, Any], cuts: list[slice], loss: Loss) -> Iterator[Piece]:
    for name, cut in zip(batch["adapters"], cuts, strict=True):
        own = {k: v[cut] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
        mean, rows = loss(cut_output(output, cut), own), cut.stop - cut.start
        if mean.numel() != 1:
            raise ConfigError(
                f"the loss of adapter {name!r} has the shape {tuple(mean.shape)}: loss(output, batch) must return one "
                "number, the mean over the rows that it was given"
            )
        yield name, mean.reshape(()) * rows, torch.tensor(rows, device=mean.device), cut


def _targets(batch: Mapping[str, Any], task: str) -> Tensor:
    """The label of each position: in a causal language model the next token, if that is of the same sequence."""
    labels: Tensor = batch["labels"]
    if task != "causal-lm":
        return labels
    if "lengths" in batch:
        labels = labels.masked_fill(batch["position_ids"] == 0, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _fused(output: HeadInput, labels: Tensor) -> Iterator[Tensor]:
    """In float64, in which a sum's order, which on a GPU goes by where its memory begins, does not show."""
    for tokens in output.losses(labels):
        yield tokens.sum(dtype=torch.float64).to(tokens.dtype)


def _from_logits(logits: Tensor, targets: tuple[Tensor, ...], axis: int) -> Iterator[Tensor]:
    for own_logits, own in zip(logits.split([own.shape[axis] for own in targets], axis), targets, strict=True):
        flat = own_logits.reshape(-1, own_logits.shape[-1]).float()
        yield F.cross_entropy(flat, own.reshape(-1), ignore_index=IGNORED, reduction="sum")
