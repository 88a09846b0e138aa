"""A joint batch: sequences of several adapters, padded to rows or packed into one row, and the ways to cut it.

Shapes: B rows, T tokens (of the longest row; packed, of all sequences), U tokens of the longest target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.errors import DataError
from finetuna_lightning.nn.routing import Route
from finetuna_lightning.training.tokenizing import IGNORED, Example


class Batch(TypedDict):
    """Sequences of several adapters, each adapter's contiguous.

    ``adapters``: the names in order; ``rows``: how many sequences each has; ``numbers``: on several processes, which of
    the adapter's sequences in this step they are.

    Padded: ``input_ids`` and ``attention_mask`` [B, T] int64, padded on the right. ``labels``: [B, T] int64 aligned
    with ``input_ids`` (not shifted), or [B, U] for a sequence-to-sequence model, -100 where ignored; [B] for
    classification.

    Packed: ``input_ids`` and ``labels`` [1, T] int64, the sequences one after another, and ``position_ids`` [1, T],
    from 0 at each sequence's first token; ``lengths``: the tokens of each sequence.
    """

    input_ids: Tensor
    labels: Tensor
    adapters: list[str]
    rows: list[int]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    lengths: NotRequired[list[int]]
    numbers: NotRequired[dict[str, list[int]]]


def collate(groups: Mapping[str, Sequence[Example]], pad_token_id: int = 0, packed: bool = False) -> Batch:
    """One batch of the examples of each adapter, in the order of ``groups``.

    Raises:
        DataError: where classification meets language modelling, or is to be packed.
    """
    examples = [example for group in groups.values() for example in group]
    targets = [example.labels for example in examples]
    tensors = [target for target in targets if isinstance(target, Tensor)]
    if tensors and len(tensors) != len(targets):
        mixed = ", ".join(f"{name!r}" for name in groups)
        raise DataError(f"adapters {mixed} mix classification with language modelling; a backbone has one task")
    names, rows = list(groups), [len(group) for group in groups.values()]
    ids = [example.input_ids for example in examples]
    if packed:
        if [len(target) for target in tensors] != [len(row) for row in ids]:
            raise DataError("only examples with a label for each token can be packed: set data.packing=false")
        return Batch(
            input_ids=torch.cat(ids)[None].to(torch.int64),
            labels=torch.cat(tensors)[None].to(torch.int64),
            position_ids=torch.cat([torch.arange(len(row)) for row in ids])[None],
            adapters=names,
            rows=rows,
            lengths=[len(row) for row in ids],
        )
    return Batch(
        input_ids=_padded(ids, pad_token_id),
        attention_mask=_padded([torch.ones_like(row) for row in ids], 0),
        labels=_padded(tensors, IGNORED) if tensors else torch.tensor(targets, dtype=torch.int64),
        adapters=names,
        rows=rows,
    )


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value).to(torch.int64)


def route_of(batch: Mapping[str, Any]) -> Route:
    """The route that ``batch`` follows."""
    lengths = batch.get("lengths")
    return Route(
        tuple(batch["adapters"]), tuple(batch["rows"]), lengths=None if lengths is None else tuple(lengths),
        numbers=batch.get("numbers", {}),
    )  # fmt: skip


def sequences(batch: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """Each sequence of ``batch``: its adapter, the batch of it alone, and where it starts and stops, in rows, or in a
    packed row in tokens."""
    names = [name for name, rows in zip(batch["adapters"], batch["rows"], strict=True) for _ in range(rows)]
    start = 0
    for name, length in zip(names, batch.get("lengths") or [1] * len(names), strict=True):
        part = _tensors(batch, start, start + length) | {"adapters": [name], "rows": [1]}
        if "lengths" in batch:
            part["lengths"] = [length]
        yield name, part, start, start + length
        start += length


def by_adapter(batch: Mapping[str, Any], aligned: bool = True) -> Iterator[dict[str, Any]]:
    """For each segment of ``batch``, the batch that its adapter would have alone: padded to its own longest row.
    ``aligned``: a table of labels has a column for each of ``input_ids``'."""
    route = route_of(batch)
    first = 0
    for (name, start, stop), rows in zip(route.segments(route.total), (n for n in route.rows if n), strict=True):
        part = _tensors(batch, start, stop) | {"adapters": [name], "rows": [rows]}
        if route.lengths is not None:
            part["lengths"] = list(route.lengths[first : first + rows])
        first += rows
        yield _trimmed(part, aligned)


def _tensors(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """``batch`` with its tensors cut: to rows, or to tokens of the one packed row."""
    packed = "lengths" in batch

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[:, start:stop] if packed else value[start:stop]

    return {key: cut(value) for key, value in batch.items()}


def _trimmed(part: dict[str, Any], aligned: bool) -> dict[str, Any]:
    """Padded rows without the columns in which all are padded."""
    mask = part.get("attention_mask")
    if mask is None or "lengths" in part:
        return part
    width, used = mask.shape[1], _used(mask != 0)
    cut = {key: value[:, :used] for key, value in part.items() if _is_table(value) and value.shape[1] == width}
    if _is_table(part["labels"]) and not aligned:
        cut["labels"] = part["labels"][:, : _used(part["labels"] != IGNORED)]
    return part | cut


def _used(full: Tensor) -> int:
    """Columns up to the last one that is not empty, at least one."""
    columns = full.any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def cut_output(output: Any, cut: slice, packed: bool = False) -> Any:
    """Rows of a model's output, or tokens of a packed one: a tensor, or a mapping or tuple of them."""

    def piece(tensor: Tensor) -> Tensor:
        return tensor[:, cut] if packed else tensor[cut]

    if isinstance(output, Tensor):
        return piece(output)
    if hasattr(output, "logits"):
        return type(output)(logits=piece(output.logits))
    return torch.utils._pytree.tree_map_only(Tensor, piece, output)


@dataclass
class Separate:
    """The outputs of a joint batch whose adapters each had a pass of their own.

    Args:
        parts: output and batch of each adapter.
        batch: the joint batch.
    """

    parts: list[tuple[Any, dict[str, Any]]]
    batch: Mapping[str, Any]

    @property
    def logits(self) -> Tensor:
        """As a joint pass would give them: [B, T, vocabulary] (0 where an adapter's own rows are shorter), packed
        [1, T, vocabulary]; [B, classes] of a classifier."""
        own = [output.logits for output, _ in self.parts]
        if own[0].dim() == 2:
            return torch.cat(own)
        if "lengths" in self.batch:
            return torch.cat(own, 1)
        width = max(logits.shape[1] for logits in own)
        return torch.cat([F.pad(logits, (0, 0, 0, width - logits.shape[1])) for logits in own])
