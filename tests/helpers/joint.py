"""Eight adapters over one tiny model, their batches, and what became of them: for tests that compare two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit, tiny_module

State = dict[str, Tensor]
EIGHT = [f"a{index}" for index in range(8)]


def settings(names: Sequence[str] = EIGHT, **changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Configurations of different rank, dropout and schedule; ``changes`` by name."""
    kinds: list[dict[str, Any]] = [
        {"rank": 4, "dropout": 0.1, "lr": 1e-2, "target_modules": ["q_proj", "up_proj"]},
        {"rank": 2, "dropout": 0.2, "lr": 5e-3, "schedule": "cosine", "warmup_steps": 2},
    ]
    return {name: {**kinds[index % 2], **changes.get(name, {})} for index, name in enumerate(names)}


class Weights(Callback):
    """Every adapter's weights after each batch."""

    def __init__(self) -> None:
        self.taken: list[State] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.taken.append({key: value.detach().clone() for key, value in pl_module.adapters.named_parameters()})


class At(Callback):
    """Calls ``do(trainer, module)`` after batch ``step`` (counted from 1), or before it."""

    def __init__(self, step: int, do: Callable[[Trainer, MultiAdapterModule], Any], before: bool = False) -> None:
        self.step, self.do, self.before, self.batches = step, do, before, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        if self.before and self.batches == self.step:
            self.do(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self.before and self.batches == self.step:
            self.do(trainer, pl_module)


class Rest(Batches):
    """The batches after the first ``done``, as a loader that Lightning may resume in the middle."""

    def __init__(self, batches: Batches, done: int) -> None:
        super().__init__(batches.batches)
        self.done = done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches[self.done :])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def of(state: Mapping[str, Tensor], name: str) -> State:
    return {key: value for key, value in state.items() if key.startswith(name + ".")}


def run(
    folder: Path,
    configs: dict[str, dict[str, Any]],
    *callbacks: Callback,
    batches: Batches | None = None,
    steps: int = 6,
    **options: Any,
) -> tuple[MultiAdapterModule, State]:
    """Fit for ``steps`` joint batches; the module, and the weights at the end."""
    module = tiny_module(folder, configs)
    tiny_fit(module, batches or tiny_batches(list(configs), steps), *callbacks, **options)
    return module, {key: value.detach().clone() for key, value in module.adapters.named_parameters()}


def only(batches: Batches, name: str) -> Batches:
    """The rows of one adapter."""
    found = []
    for batch in batches:
        if name in batch["adapters"]:
            at = batch["adapters"].index(name)
            rows = slice(sum(batch["rows"][:at]), sum(batch["rows"][: at + 1]))
            own = {key: value[rows] for key, value in batch.items() if isinstance(value, Tensor)}
            found.append(own | {"adapters": [name], "rows": [batch["rows"][at]]})
    return Batches(found)


def difference(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any value; raises where the names differ, and NaN where one is."""
    assert mine.keys() == theirs.keys() != set()
    return max(float((mine[key] - theirs[key]).abs().max()) for key in mine)


def same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all bits are the same."""
    assert mine.keys() == theirs.keys() != set()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)
