"""The joint loader: one batch a step, holding rows of every adapter, with a position that can be saved and restored.

Each adapter walks its own permutations of its own examples, so its sequence of batches depends on its examples, its
seed and its batch size alone, never on its company. Lightning's ``CombinedLoader`` saves no position and would replay
examples after a mid-epoch resume; this loader has ``state_dict`` and ``load_state_dict``, which Lightning calls.

Shapes: B rows, T tokens of the longest row, U tokens of the longest target.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from finetuna_lightning.errors import ConfigError, DataError, did_you_mean
from finetuna_lightning.seeds import stream_seed
from finetuna_lightning.training.tokenizing import IGNORED, Example

MODES = ("train", "eval")


class Batch(TypedDict):
    """Rows of several adapters, each adapter's rows contiguous.

    ``input_ids`` and ``attention_mask``: [B, T] int64, padded on the right. ``labels``: [B, T] int64 aligned with
    ``input_ids`` (not shifted), or [B, U] for a sequence-to-sequence model, -100 where ignored; [B] for classification.
    ``adapters``: the names in row order; ``rows``: how many rows each has, sum B.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    adapters: list[str]
    rows: list[int]


def collate(groups: Mapping[str, Sequence[Example]], pad_token_id: int = 0) -> Batch:
    """One batch of the examples of each adapter, in the order of ``groups``."""
    examples = [example for group in groups.values() for example in group]
    input_ids = _padded([example.input_ids for example in examples], pad_token_id)
    mask = _padded([torch.ones_like(example.input_ids) for example in examples], 0)
    targets = [example.labels for example in examples]
    tensors = [target for target in targets if isinstance(target, Tensor)]
    if tensors and len(tensors) != len(targets):
        mixed = ", ".join(f"{name!r}" for name in groups)
        raise DataError(f"adapters {mixed} mix classification with language modelling; a backbone has one task")
    labels = _padded(tensors, IGNORED) if tensors else torch.tensor(targets, dtype=torch.int64)
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        adapters=list(groups),
        rows=[len(group) for group in groups.values()],
    )


def deal(groups: Mapping[str, Sequence[Example]], rank: int, world_size: int) -> dict[str, list[Example]]:
    """The rows of process ``rank``: all rows of the joint batch, in order, are dealt one by one to the processes, so
    that every process has as many as the next. Every adapter of the joint batch is in the result, with no rows where
    all are elsewhere. A process that would have no row at all gets the first with every label ignored, which counts for
    nothing and keeps it in step."""
    mine: dict[str, list[Example]] = {}
    place = 0
    for name, rows in groups.items():
        mine[name] = [row for index, row in enumerate(rows, place) if index % world_size == rank]
        place += len(rows)
    if not any(mine.values()):
        name, rows = next(iter(groups.items()))
        labels = rows[0].labels
        masked = torch.full_like(labels, IGNORED) if isinstance(labels, Tensor) else IGNORED
        mine[name] = [Example(rows[0].input_ids, masked)]
    return mine


class JointLoader:
    """An iterable of joint batches; its length is the number of batches of the longest adapter.

    ``train``: an endless stream cut into passes of ``len(loader)`` batches. Every adapter is in every batch; one that
    comes to the end of its examples starts its own next epoch, in a new order, with the next batch (the last batch of
    an epoch may be short). A new ``iter`` goes on where the last one stopped, so that no example is left out when a
    pass is cut short, and a restored position is kept.

    ``eval``: each ``iter`` goes once through the examples of every adapter, in order; an adapter without more examples
    leaves the batch.

    Args:
        examples: by adapter.
        batch_sizes: rows of each adapter in a batch.
        seeds: of each adapter's order.
        shuffle: for all adapters, or by adapter; off in ``eval``.
        pad_token_id: fills ``input_ids`` where ``attention_mask`` is 0.
        mode: ``train`` or ``eval``.
        rank, world_size: of this process, which gets its part of every batch (see ``deal``); batch sizes, positions and
            ``len`` are those of all processes together.

    Raises:
        ConfigError: for an unknown mode, a batch size below 1, or an adapter without a batch size or seed.
        DataError: when an adapter has nothing to train on.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        batch_sizes: Mapping[str, int],
        *,
        seeds: Mapping[str, int],
        shuffle: Mapping[str, bool] | bool = True,
        pad_token_id: int = 0,
        mode: str = "train",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"the mode of a JointLoader must be one of {', '.join(MODES)}, not {mode!r}")
        self.mode = mode
        self.rank, self.world_size = rank, world_size
        self.pad_token_id = pad_token_id
        self._streams: dict[str, _Stream] = {}
        self._retired: set[str] = set()
        for name, rows in examples.items():
            if name not in batch_sizes or name not in seeds:
                raise ConfigError(f"adapter {name!r} has examples but no batch size or no seed")
            if batch_sizes[name] < 1:
                raise ConfigError(f"the batch size of adapter {name!r} must be at least 1, not {batch_sizes[name]}")
            if mode == "train" and not rows:
                raise DataError(f"adapter {name!r} has no example to train on")
            shuffled = shuffle if isinstance(shuffle, bool) else shuffle.get(name, True)
            self._streams[name] = _Stream(rows, batch_sizes[name], seeds[name], shuffled and mode == "train")

    @property
    def adapters(self) -> list[str]:
        """All adapters, the retired ones too."""
        return list(self._streams)

    @property
    def active(self) -> list[str]:
        """The adapters of the next batch, in row order."""
        return [name for name in self._streams if name not in self._retired]

    def retire(self, name: str) -> None:
        """Leave ``name`` out of the batches to come. ``len(loader)`` stays: Lightning asks for it once. After the last
        adapter has retired the loader yields nothing, so stop the trainer then (``trainer.should_stop``)."""
        self._known(name)
        self._retired.add(name)

    def reinstate(self, name: str) -> None:
        """Undo ``retire``: the adapter goes on where it stopped."""
        self._known(name)
        self._retired.discard(name)

    def __len__(self) -> int:
        return max((stream.batches for stream in self._streams.values()), default=0)

    def __iter__(self) -> Iterator[Batch]:
        # generators: nothing moves until the first batch is asked for, since Lightning calls iter() more than once
        return self._train() if self.mode == "train" else self._evaluate()

    def state_dict(self) -> dict[str, Any]:
        """The position of each adapter by name: that of the batches handed out. Lightning fetches none ahead from a
        loader that has a length, so these are the batches trained on."""
        return {
            "positions": {name: stream.state_dict() for name, stream in self._streams.items()},
            "retired": sorted(self._retired),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``. An adapter that is not in it starts at its beginning; one that is no longer here is
        passed over. One whose examples, batch size or seed have changed since starts its next epoch, with a warning."""
        for name, stream in self._streams.items():
            position = state["positions"].get(name)
            if position is not None and not stream.load_state_dict(position):
                warnings.warn(
                    f"the data, batch size or seed of adapter {name!r} changed since the checkpoint: "
                    "its position in the epoch is lost, and it starts its next epoch",
                    stacklevel=2,
                )
        self._retired = {name for name in state.get("retired", ()) if name in self._streams}

    def _known(self, name: str) -> None:
        if name not in self._streams:
            raise ConfigError(f"the loader has no adapter {name!r}{did_you_mean(name, self._streams)}")

    def _train(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            active = self.active
            if not active:
                return
            yield self._collate({name: self._streams[name].advance() for name in active})

    def _evaluate(self) -> Iterator[Batch]:
        for index in range(len(self)):
            groups = {name: self._streams[name].batch(index) for name in self.active}
            groups = {name: group for name, group in groups.items() if group}
            if groups:
                yield self._collate(groups)

    def _collate(self, groups: dict[str, list[Example]]) -> Batch:
        mine = groups if self.world_size == 1 else deal(groups, self.rank, self.world_size)
        return collate(mine, self.pad_token_id)


class _Stream:
    """One adapter's endless sequence of batches: epoch after epoch, each in its own order."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, shuffle: bool) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.batches = -(-len(examples) // batch_size)
        self._start(epoch=0)

    def _start(self, epoch: int, position: int = 0) -> None:
        """Stand before batch ``position`` of ``epoch``."""
        self.epoch = epoch
        self.position = position
        if self.shuffle:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
            self.order = torch.randperm(len(self.examples), generator=generator).tolist()
        else:
            self.order = list(range(len(self.examples)))

    def batch(self, index: int) -> list[Example]:
        """Batch ``index`` of the current epoch; empty past its end."""
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return [self.examples[row] for row in rows]

    def advance(self) -> list[Example]:
        """The next batch, of the next epoch where this one is used up."""
        if self.position >= self.batches:
            self._start(self.epoch + 1)
        self.position += 1
        return self.batch(self.position - 1)

    def state_dict(self) -> dict[str, int | bool]:
        return {"epoch": self.epoch, "batch": self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go to the saved position; to the start of the next epoch, and False, if it belongs to another order."""
        same = all(state.get(key) == value for key, value in self._identity().items())
        if same:
            self._start(int(state["epoch"]), int(state["batch"]))
        else:
            self._start(int(state["epoch"]) + 1)
        return same

    def _identity(self) -> dict[str, int | bool]:
        """What the order of the batches depends on, the content of the examples aside."""
        return {
            "examples": len(self.examples),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value).to(torch.int64)
