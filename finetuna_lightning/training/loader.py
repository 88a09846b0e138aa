"""The joint loader: one batch a step, holding sequences of every adapter, with a position that can be saved and
restored.

Each adapter walks its own permutations of its own examples, so its sequence of batches depends on its examples, its
seed and its batch size or token budget alone, never on its company, nor on packing. Lightning's ``CombinedLoader``
saves no position and would replay examples after a mid-epoch resume; this loader has ``state_dict`` and
``load_state_dict``, which Lightning calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.errors import ConfigError, DataError, did_you_mean
from finetuna_lightning.seeds import stream_seed
from finetuna_lightning.training.batches import Batch, collate
from finetuna_lightning.training.tokenizing import IGNORED, Example

MODES = ("train", "eval")


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


def dealt_numbers(groups: Mapping[str, Sequence[Example]], rank: int, world_size: int) -> dict[str, list[int]]:
    """Which of an adapter's rows ``deal`` gives to process ``rank``: what their dropout masks go by."""
    numbers: dict[str, list[int]] = {}
    place = 0
    for name, rows in groups.items():
        numbers[name] = [index for index in range(len(rows)) if (place + index) % world_size == rank]
        place += len(rows)
    if not any(numbers.values()):
        numbers[next(iter(groups))] = [0]
    return numbers


class JointLoader:
    """An iterable of joint batches; its length is the number of batches of the longest adapter (with token budgets, in
    its first epoch).

    ``train``: an endless stream cut into passes of ``len(loader)`` batches. Every adapter is in every batch; one that
    comes to the end of its examples starts its own next epoch, in a new order, with the next batch (the last batch of
    an epoch may be short). A new ``iter`` goes on where the last one stopped, so that no example is left out when a
    pass is cut short, and a restored position is kept.

    ``eval``: each ``iter`` goes once through the examples of every adapter, in order; an adapter without more examples
    leaves the batch.

    Args:
        examples: by adapter.
        batch_sizes: sequences of each adapter in a batch.
        seeds: of each adapter's order.
        max_tokens: by adapter, instead of its batch size: a batch holds as many of its sequences, in their order, as
            have at most so many tokens together, pads not counted.
        shuffle: for all adapters, or by adapter; off in ``eval``.
        pad_token_id: fills ``input_ids`` where ``attention_mask`` is 0.
        mode: ``train`` or ``eval``.
        packed: batches are one row without pads.
        rank, world_size: of this process, which gets its part of every batch (see ``deal``); batch sizes, positions and
            ``len`` are those of all processes together.

    Raises:
        ConfigError: for an unknown mode, a batch size below 1, an adapter without a batch size or seed, or a sequence
            longer than its adapter's token budget.
        DataError: when an adapter has nothing to train on.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        batch_sizes: Mapping[str, int],
        *,
        seeds: Mapping[str, int],
        max_tokens: Mapping[str, int] | None = None,
        shuffle: Mapping[str, bool] | bool = True,
        pad_token_id: int = 0,
        mode: str = "train",
        packed: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"the mode of a JointLoader must be one of {', '.join(MODES)}, not {mode!r}")
        self.mode = mode
        self.rank, self.world_size = rank, world_size
        self.pad_token_id = pad_token_id
        self.packed = packed
        self._streams: dict[str, _Stream] = {}
        self._retired: set[str] = set()
        for name, rows in examples.items():
            budget = (max_tokens or {}).get(name)
            if (name not in batch_sizes and budget is None) or name not in seeds:
                raise ConfigError(f"adapter {name!r} has examples but no batch size or no seed")
            shuffled = shuffle if isinstance(shuffle, bool) else shuffle.get(name, True)
            self.join(name, rows, batch_sizes.get(name, 1), seeds[name], shuffled, budget)
        self._length = max((stream.batches for stream in self._streams.values()), default=0)

    def join(
        self,
        name: str,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        """Take in an adapter, from the next batch on. ``len(loader)`` stays: Lightning asks for it once."""
        if name in self._streams:
            raise ConfigError(f"the loader has an adapter {name!r} already")
        longest = max((len(row.input_ids) for row in examples), default=0)
        if max_tokens is not None and longest > max_tokens:
            raise ConfigError(
                f"adapter {name!r} has a sequence of {longest} tokens but a budget of {max_tokens} a step: "
                f"set data.max_tokens to {longest} or more, or data.max_length to {max_tokens} or less"
            )
        if max_tokens is None and batch_size < 1:
            raise ConfigError(f"the batch size of adapter {name!r} must be at least 1, not {batch_size}")
        if self.mode == "train" and not examples:
            raise DataError(f"adapter {name!r} has no example to train on")
        self._streams[name] = _Stream(examples, batch_size, seed, shuffle and self.mode == "train", max_tokens)

    def leave(self, name: str) -> None:
        """Let an adapter go, from the next batch on; ``len(loader)`` stays."""
        self._known(name)
        del self._streams[name]
        self._retired.discard(name)

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
        return self._length

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
        passed over. One whose examples, batch size, budget or seed have changed since starts its next epoch, with a
        warning."""
        for name, stream in self._streams.items():
            position = state["positions"].get(name)
            if position is not None and not stream.load_state_dict(position):
                warnings.warn(
                    f"the data, batch size, token budget or seed of adapter {name!r} changed since the checkpoint: "
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
        if self.world_size == 1:
            return collate(groups, self.pad_token_id, self.packed)
        batch = collate(deal(groups, self.rank, self.world_size), self.pad_token_id, self.packed)
        batch["numbers"] = dealt_numbers(groups, self.rank, self.world_size)
        return batch


class _Stream:
    """One adapter's endless sequence of batches: epoch after epoch, each in its own order."""

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seed: int, shuffle: bool, max_tokens: int | None = None
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.max_tokens = max_tokens
        self._lengths = [] if max_tokens is None else [len(example.input_ids) for example in examples]
        self._start(epoch=0)
        self.batches = len(self.cuts)

    def _start(self, epoch: int, position: int = 0) -> None:
        """Stand before batch ``position`` of ``epoch``."""
        self.epoch = epoch
        self.position = position
        if self.shuffle:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
            self.order = torch.randperm(len(self.examples), generator=generator).tolist()
        else:
            self.order = list(range(len(self.examples)))
        self.cuts = self._cut()

    def _cut(self) -> list[slice]:
        """The batches of this epoch, as slices of its order."""
        if self.max_tokens is None:
            return [slice(at, at + self.batch_size) for at in range(0, len(self.order), self.batch_size)]
        cuts, start, tokens = [], 0, 0
        for at, row in enumerate(self.order):
            if tokens + self._lengths[row] > self.max_tokens:
                cuts.append(slice(start, at))
                start, tokens = at, 0
            tokens += self._lengths[row]
        return [*cuts, slice(start, len(self.order))] if self.order else []

    def batch(self, index: int) -> list[Example]:
        """Batch ``index`` of the current epoch; empty past its end."""
        return [self.examples[row] for cut in self.cuts[index : index + 1] for row in self.order[cut]]

    def advance(self) -> list[Example]:
        """The next batch, of the next epoch where this one is used up."""
        if self.position >= len(self.cuts):
            self._start(self.epoch + 1)
        self.position += 1
        return self.batch(self.position - 1)

    def state_dict(self) -> dict[str, int | bool | None]:
        return {"epoch": self.epoch, "batch": self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go to the saved position; to the start of the next epoch, and False, if it belongs to another order."""
        same = all(state.get(key) == value for key, value in self._identity().items())
        if same:
            self._start(int(state["epoch"]), int(state["batch"]))
        else:
            self._start(int(state["epoch"]) + 1)
        return same

    def _identity(self) -> dict[str, int | bool | None]:
        """What the batches depend on, the content of the examples aside."""
        return {
            "examples": len(self.examples),
            "batch_size": self.batch_size if self.max_tokens is None else None,
            "max_tokens": self.max_tokens,
            "lengths": None if self.max_tokens is None else stream_seed(*self._lengths),
            "seed": self.seed,
            "shuffle": self.shuffle,
        }
