"""The check of joint against alone, and that it is a check: each of the mistakes that joint training invites is made on
purpose, in the one function that it belongs to, and each is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.seeds import stream_seed
from finetuna_lightning.training import live
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import AdapterOptimizers
from tests.helpers.joint import Weights, difference, of, only, run
from tests.helpers.tiny import VOCAB_SIZE, Batches, tiny_batches

NAMES = ["x", "y"]
CONFIGS: dict[str, dict[str, Any]] = {
    "x": {
        "rank": 4, "dropout": 0.2, "lr": 1e-2, "accumulate": 2, "schedule": "cosine", "warmup_steps": 1,
        "max_grad_norm": 0.05, "optimizer": "sgd", "max_steps": 4,
    },
    "y": {"rank": 2, "alpha": 64.0, "lr": 5e-3, "max_grad_norm": None, "optimizer": "sgd"},
}  # fmt: skip
STEPS = 6


def ragged() -> Batches:
    """Joint batches in which y has three rows and more targets than x."""
    batches = tiny_batches(NAMES, STEPS, rows=[2, 3])
    for batch in batches:
        batch["labels"][0, 6:] = -100
    return batches


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """What x and y become by themselves, no mistake being made."""
    found = {name: Weights() for name in NAMES}
    for name, weights in found.items():
        run(tmp_path_factory.mktemp(name), {name: CONFIGS[name]}, weights, batches=only(ragged(), name))
    return found


def joint_against_alone(folder: Path, alone: dict[str, Weights]) -> float:
    """The largest difference of any weight of x and y, after any batch, from those of the adapter alone; relative to
    how far it went. Loss, gradients, dropout, accumulation, clipping and schedule all have a part in it."""
    joint = Weights()
    run(folder / "joint", CONFIGS, joint, batches=ragged())
    found = 0.0
    for name, weights in alone.items():
        way = difference(of(weights.taken[-1], name), of(weights.taken[0], name))
        pairs = zip(joint.taken, weights.taken, strict=True)
        found = max(found, *(difference(of(a, name), of(b, name)) / way for a, b in pairs))
    return found


def fault_against_none(folder: Path) -> float:
    """The largest difference of any of x's weights between a run in which y has a bad label and one in which it has
    none, relative as above; infinite where something of x, or of y, is no number."""
    clean, bad, faulty = Weights(), Weights(), ragged()
    for batch in faulty.batches[2:]:
        batch["labels"][3, 5] = VOCAB_SIZE
    run(folder / "clean", CONFIGS, clean, batches=ragged())
    run(folder / "bad", CONFIGS, bad, batches=faulty)
    way = difference(of(clean.taken[-1], "x"), of(clean.taken[0], "x"))
    pairs = zip(clean.taken, bad.taken, strict=True)
    found = max(difference(of(a, "x"), of(b, "x")) for a, b in pairs) / way
    return found if all(bool(value.isfinite().all()) for value in bad.taken[-1].values()) else math.inf


def test_joint_is_as_alone(tmp_path: Path, alone: dict[str, Weights]) -> None:
    assert joint_against_alone(tmp_path, alone) < 1e-5


def test_a_fault_is_not_noticed(tmp_path: Path) -> None:
    assert fault_against_none(tmp_path) == 0.0


Patch = Callable[[pytest.MonkeyPatch], None]


def joint_token_count(patch: pytest.MonkeyPatch) -> None:
    """Each loss divided by the targets of the whole batch."""
    own = MultiAdapterModule.losses

    def losses(self: MultiAdapterModule, output: Any, batch: Any) -> Iterator[Any]:
        parts = list(own(self, output, batch))
        together = torch.stack([count for _, _, count, _ in parts]).sum()
        yield from ((name, total, together, cut) for name, total, _, cut in parts)

    patch.setattr(MultiAdapterModule, "losses", losses)


def global_clipping(patch: pytest.MonkeyPatch) -> None:
    """One norm over all adapters, clipped to the smallest limit."""

    def clip(self: AdapterOptimizers) -> dict[str, Tensor]:
        having = [p for name in self.due() for p in self._parameters(name) if p.grad is not None]
        if having and not self._norms:
            norm = nn.utils.clip_grad_norm_(having, 0.05)
            self._norms = dict.fromkeys(self.due(), norm)
        return dict(self._norms)

    patch.setattr(AdapterOptimizers, "clip", clip)


def shared_dropout_stream(patch: pytest.MonkeyPatch) -> None:
    """One position for all adapters."""
    drawn: dict[int, int] = {}

    def seed(self: AdapterBank, name: str) -> int:
        drawn[id(self)] = drawn.get(id(self), 0) + 1
        return stream_seed(0, "dropout", drawn[id(self)])

    patch.setattr(AdapterBank, "_dropout_seed", seed)


def shared_accumulation_counter(patch: pytest.MonkeyPatch) -> None:
    """Everybody steps when the first does."""

    def due(self: AdapterOptimizers) -> list[str]:
        names = self._taking_part()
        return names if any(self.turns[n].pending + 1 >= self.turns[n].accumulate for n in names) else []

    patch.setattr(AdapterOptimizers, "due", due)


def shared_gradients_clearing(patch: pytest.MonkeyPatch) -> None:
    """Gradients are cleared before every batch, also those that wait."""

    def zero_grad(self: AdapterOptimizers, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    patch.setattr(AdapterOptimizers, "zero_grad", zero_grad)


def shared_schedule(patch: pytest.MonkeyPatch) -> None:
    """The learning rate by the steps of whoever has taken most."""

    def rate(self: AdapterOptimizers, name: str) -> float:
        group, steps = self.optimizers[name].param_groups[0], max(turn.steps for turn in self.turns.values())
        factor = self.turns[name].factor
        peak = group.setdefault("initial_lr", group["lr"])
        return float(peak if factor is None else peak * factor(steps))

    patch.setattr(AdapterOptimizers, "rate", rate)


def shared_steps(patch: pytest.MonkeyPatch) -> None:
    """``max_steps`` counted in steps of the trainer: x, which takes one in two batches, leaves too early."""

    def retire(module: Any) -> None:
        limit = CONFIGS["x"]["max_steps"]
        module.retired = {"x"} if module.global_step >= limit else set()

    patch.setattr(live, "retire", retire)


@pytest.mark.parametrize(
    "mutant",
    [
        joint_token_count,
        global_clipping,
        shared_dropout_stream,
        shared_accumulation_counter,
        shared_gradients_clearing,
        shared_schedule,
        shared_steps,
    ],
)
def test_a_mutant_is_no_longer_as_alone(
    tmp_path: Path, alone: dict[str, Weights], monkeypatch: pytest.MonkeyPatch, mutant: Patch
) -> None:
    mutant(monkeypatch)
    found = joint_against_alone(tmp_path, alone)
    assert not found < 1e-3, f"{mutant.__name__}: {found}"  # NaN is no agreement either


# ---- faults ----------------------------------------------------------------------------------------------------------


def mask_by_multiplication(patch: pytest.MonkeyPatch) -> None:
    """A bad adapter's gradient times zero, and a step with it."""

    def take(self: AdapterOptimizers, name: str, good: Tensor) -> None:
        for parameter in self._parameters(name):
            if parameter.grad is not None:
                parameter.grad.mul_(good)
        self.optimizers[name].step()

    def training_step(self: MultiAdapterModule, batch: Any, batch_idx: int) -> Tensor:
        batch, fit = self._guarded(batch)
        parts = []
        for name, total, count, _ in self.losses(self(batch, training=True), batch):
            mean = total / count
            mean = mean * torch.where(fit[name], 1.0, math.nan)
            self.optimizer.note(name, mean.detach().isfinite())
            parts.append(mean / self.config_of(name).accumulate)
        return torch.stack(parts).sum()

    patch.setattr(AdapterOptimizers, "_take", take)
    patch.setattr(MultiAdapterModule, "training_step", training_step)


def joint_verdict(patch: pytest.MonkeyPatch) -> None:
    """No one steps when one cannot, as a GradScaler over one optimizer would have it."""
    own = AdapterOptimizers._take

    def step(self: AdapterOptimizers, name: str, good: Tensor) -> None:
        together = [turn.finite for turn in self.turns.values() if turn.finite is not None]
        own(self, name, torch.stack([good, *together]).all())

    patch.setattr(AdapterOptimizers, "_take", step)


def joint_norm_of_a_fault(patch: pytest.MonkeyPatch) -> None:
    """Global clipping, once one gradient is no number."""

    def clip(self: AdapterOptimizers) -> dict[str, Tensor]:
        if self._norms:
            return dict(self._norms)
        due = self.due()
        having = [p for name in due for p in self._parameters(name) if p.grad is not None]
        bad = [self.turns[name].finite for name in due]
        if any(flag is not None and not flag for flag in bad):
            for parameter in having:
                assert parameter.grad is not None
                parameter.grad.mul_(math.nan)
        self._norms = {name: torch.ones(()) for name in due}
        return dict(self._norms)

    patch.setattr(AdapterOptimizers, "clip", clip)


@pytest.mark.parametrize("mutant", [mask_by_multiplication, joint_verdict, joint_norm_of_a_fault])
def test_a_mutant_spreads_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Patch) -> None:
    mutant(monkeypatch)
    assert fault_against_none(tmp_path) != 0.0
