"""Gradients that wait for the step in the tensors they were written in: every bit as where they are put in ``grad``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

import finetuna_lightning as ft
from finetuna_lightning.backbone import cast_, enable_checkpointing
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
from finetuna_lightning.training.waiting import Standing
from tests.gpu import test_joint_cuda as joint

pytestmark = [joint.pytestmark, pytest.mark.filterwarnings("ignore:.*does not have many workers")]
ACCELERATOR, DTYPE = "gpu", torch.bfloat16
STEPS = 5
RANKS = {"one": 16, "two": 20, "three": 32}
LARGE = dict(hidden_size=272, intermediate_size=528, num_key_value_heads=4, head_dim=64)  # all moments in 8 bits


class Reads(pl.Callback):
    """Finds every gradient in its place."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        names = pl_module.optimizer.due() or list(pl_module.optimizer._noted)
        assert names and all(p.grad is not None for name in names for p in pl_module.adapters[name].parameters())


class Logs(pl.Callback):
    """What was logged of each step; nothing is in any ``grad`` when one begins."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert not pl_module.optimizer._gradients.waiting
        held = pl_module.optimizer.turns["three"].pending
        assert held or all(parameter.grad is None for parameter in pl_module.adapters.parameters())


def trained(
    monkeypatch: pytest.MonkeyPatch, *callbacks: pl.Callback, recompute: bool = False, large: bool = True, **fields: Any
) -> tuple[int, dict[str, Any], list[dict[str, float]]]:
    """How often a step took gradients that waited; what came out of the fit, and its log. One batch has a label that
    there is not, of adapter ``two``, and some have no rows of ``one``; ``three`` is done before the end."""
    taken: list[int] = []
    rows = Standing.rows

    def counted(self: Standing, waiting: Any) -> list[Tensor]:
        found = rows(self, waiting)
        taken.append(len(found))
        return found

    monkeypatch.setattr(Standing, "rows", counted)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for step in range(STEPS):
        names = [name for name in RANKS if name != "one" or step not in (2, 3)]
        ids = torch.randint(96, (2 * len(names), 24), generator=generator)
        labels = ids.clone()
        if step == 3:
            labels[2 * names.index("two"), 5] = 1000
        batches.append({
            "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "adapters": names,
            "rows": [2] * len(names),
        })  # fmt: skip
    configs = {
        "one": ft.AdapterConfig(rank=RANKS["one"], lr=1e-2, target_modules=["q_proj", "down_proj"], max_grad_norm=0.1),
        "two": ft.AdapterConfig(rank=RANKS["two"], lr=1e-2, target_modules=["all-linear"], weight_decay=0.1),
        "three": ft.AdapterConfig(
            rank=RANKS["three"], lr=1e-3, target_modules=["all-linear"], max_grad_norm=None, max_steps=4, **fields
        ),
    }
    model = joint.llama(**(LARGE if large else {}))
    cast_(model, DTYPE)
    if recompute:
        enable_checkpointing(model)
    module = ft.MultiAdapterModule(model, configs, ft.OptimConfig("adamw8bit"))
    logs = Logs()
    trainer = pl.Trainer(
        accelerator=ACCELERATOR, devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, plugins=[ft.EightBitPrecision()], log_every_n_steps=1,
        callbacks=[logs, *callbacks],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    module.optimizer.settle()
    found: dict[str, Any] = {}
    for name, adapter in module.adapters.items():
        optimizer, turn = module.optimizer.optimizers[name], module.optimizer.turns[name]
        found[f"{name}/turn"] = torch.tensor([turn.steps, turn.skipped, turn.in_a_row])
        for key, parameter in adapter.named_parameters():
            found[f"{name}/{key}"] = parameter.detach().clone()
            state = optimizer.state[parameter]
            found |= {f"{name}/{key}/{what}": value.clone() for what, value in state.items() if torch.is_tensor(value)}
            found[f"{name}/{key}/step"] = torch.tensor(state["step"])
    return len([count for count in taken if count]), found, logs.values


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_that_wait_are_stepped_as_those_in_their_place(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, waited, logged = trained(monkeypatch, recompute=recompute)
    assert steps == STEPS - 1  # before its first step an optimizer has no state
    none, read, as_logged = trained(monkeypatch, Reads(), recompute=recompute)
    assert none == 0
    assert_alike(waited, read)
    assert len(logged) == len(as_logged) == STEPS
    for own, theirs in zip(logged, as_logged, strict=True):
        assert own.keys() == theirs.keys() and any("grad_norm" in key for key in own)
        assert all(value == theirs[key] or value != value for key, value in own.items())
    assert waited["two/turn"].tolist() == [STEPS - 1, 1, 0] and waited["one/turn"].tolist() == [STEPS - 2, 0, 0]


def test_moments_in_32_and_8_bits_are_stepped_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, waited, _ = trained(monkeypatch, large=False)
    assert steps == 0
    _, read, _ = trained(monkeypatch, Reads(), large=False)
    assert_alike(waited, read)


def test_an_adapter_that_accumulates_has_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(pl.Callback):
        kept: Sequence[bool] = ()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.kept = [*self.kept, all(p.grad is not None for p in pl_module.adapters["three"].parameters())]

    kept = Kept()
    none, waited, _ = trained(monkeypatch, kept, accumulate=2)
    assert none == 0 and list(kept.kept) == [False, True, False, True, False]
    _, read, _ = trained(monkeypatch, Reads(), accumulate=2)
    assert_alike(waited, read)


def test_an_adapter_that_leaves_takes_its_memory_along(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaves(pl.Callback):
        alive: Sequence[bool] = ()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == STEPS - 1:
                self.parameters = [weakref.ref(p) for p in pl_module.remove_adapter("two").parameters()]

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            gc.collect()
            self.alive = [parameter() is not None for parameter in self.parameters]

    leaves = Leaves()
    steps, _, _ = trained(monkeypatch, leaves)
    assert steps and leaves.alive and not any(leaves.alive)


def test_memory_is_measured_by_steps_whose_gradients_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = AdapterMemoryMonitor(every_n_steps=2, table=False)
    steps, found, _ = trained(monkeypatch, memory)
    assert steps == STEPS // 2  # the second and the fourth
    _, without, _ = trained(monkeypatch)
    assert_alike(found, without)
    for name, parts in memory._largest.items():
        size = sum(value.nbytes for key, value in found.items() if key.startswith(name) and key.endswith(("_A", "_B")))
        assert parts["gradients"] == parts["weights"] == size
