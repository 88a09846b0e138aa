"""Gradients past autograd, and those that wait for the step. (That they are stepped as the others: tests/gpu.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.configs import AdapterConfig, OptimConfig
from finetuna_lightning.nn.gradients import Gradients
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import AdapterOptimizers, build_optimizer
from finetuna_lightning.training.waiting import Standing
from tests.helpers.flat import give, weights
from tests.helpers.tiny import tiny_batches, tiny_fit, tiny_module

BOTH: dict[str, dict[str, Any]] = {"sql": {}, "legal": {"rank": 8}}


class Halves:
    """Writes the gradients of its parameters one behind another, those of the first half into one tensor."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._cut = len(self.parameters) // 2

    def write(self) -> list[Tensor]:
        """Tensors that hold what stands in ``grad``, where nothing is afterwards."""
        flat = [torch.cat([p.grad.flatten() for p in own if p.grad is not None]) for own in self._halves()]
        for parameter in self.parameters:
            parameter.grad = None
        return flat

    def _halves(self) -> list[list[Tensor]]:
        return [self.parameters[: self._cut], self.parameters[self._cut :]]

    def views(self, written: Sequence[Tensor]) -> list[Tensor]:
        """Each parameter's."""
        cuts = [flat.split([p.numel() for p in own]) for flat, own in zip(written, self._halves(), strict=True)]
        return [part.view_as(p) for part, p in zip([*cuts[0], *cuts[1]], self.parameters, strict=True)]

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where each is."""
        written = [torch.empty(sum(p.numel() for p in own)) for own in self._halves()]
        which = [0] * self._cut + [1] * (len(self.parameters) - self._cut)
        views = self.views(written)
        at = [view.data_ptr() - written[one].data_ptr() for view, one in zip(views, which, strict=True)]
        return torch.tensor(which), torch.tensor(at)


def company(kind: str = "adamw8bit") -> tuple[dict[str, list[nn.Parameter]], AdapterOptimizers]:
    owned = {name: weights("cpu") for name in "xy"}
    config = AdapterConfig(optimizer=kind, lr=1e-2, schedule="constant", max_grad_norm=0.5)
    return owned, build_optimizer(owned, dict.fromkeys(owned, config), OptimConfig())


def put(owned: dict[str, list[nn.Parameter]], optimizer: AdapterOptimizers, step: int) -> None:
    """The gradients of ``step``, that wait."""
    gradients = Gradients(wait=True)
    optimizer.expect(gradients)
    for name, parameters in owned.items():
        give(parameters, step)
        source = Halves(parameters)
        gradients.put(source, source.write())
        optimizer.note(name, torch.ones((), dtype=torch.bool))


def grads(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    return [parameter.grad for parameter in parameters]


def test_gradients_are_put_in_place_at_once_or_later_or_added() -> None:
    for wait in (False, True):
        parameters = weights("cpu")
        source, gradients = Halves(parameters), Gradients(wait)
        total: list[Tensor] = []
        for step in range(3):
            kept = grads(parameters)
            give(parameters, step)
            own = [g.clone() for g in grads(parameters) if g is not None]
            total = [a + b for a, b in zip(total, own, strict=True)] if total else own
            written = source.write()
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.grad = before
            gradients.put(source, written)
            if step == 1:
                assert (grads(parameters) == [None] * len(parameters)) is wait
                gradients.bind()
                assert not gradients.waiting
        for parameter, wanted in zip(parameters, total, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, wanted)


def test_where_weights_and_gradients_stand() -> None:
    owned, optimizer = company()
    for parameters in owned.values():
        give(parameters, 0)
    optimizer.step()
    optimizers = [optimizer.optimizers[name] for name in "yx"]
    shelves = [shelf for own in optimizers for shelf in own._arranged()]  # type: ignore[attr-defined]
    assert len(shelves) == 4  # moments in 8 and in 32 bits
    sources = [Halves(owned["x"]), Halves(owned["y"][::-1])]
    for number, source in enumerate(sources):
        give(source.parameters, number)  # type: ignore[arg-type]
    waiting = [(source, source.write()) for source in sources]
    standing = Standing(waiting, shelves)
    assert standing.of(waiting, shelves)
    wanted = {id(p): view.data_ptr() for source, tensors in waiting
              for p, view in zip(source.parameters, source.views(tensors), strict=True)}  # fmt: skip
    for _ in range(2):
        for shelf, row in zip(shelves, standing.rows(waiting), strict=True):
            assert row.tolist() == [[p.data_ptr() for p in shelf.parameters], [wanted[id(p)] for p in shelf.parameters]]
    assert not standing.of(waiting[::-1], shelves) and not standing.of(waiting[:1], shelves)
    assert not standing.of(waiting, shelves[::-1])
    assert Standing(waiting[:1], shelves).rows(waiting[:1]) == []  # y has none
    assert Standing([*waiting, waiting[0]], shelves).rows([*waiting, waiting[0]]) == []  # x has two


@pytest.mark.parametrize("kind", ["adamw8bit", "adamw", "sgd"])
def test_who_needs_gradients_in_place_has_them(kind: str) -> None:
    owned, optimizer = company(kind)
    others, twin = company(kind)
    for step in range(3):
        put(owned, optimizer, step)
        for name, parameters in others.items():
            give(parameters, step)
            twin.note(name, torch.ones((), dtype=torch.bool))
        norms = optimizer.clip()
        for name, norm in twin.clip().items():
            assert torch.equal(norms[name], norm)
        for each in (optimizer, twin):
            each.step()
            each.release()
            each.zero_grad()
        for name, parameters in owned.items():
            assert all(map(torch.equal, parameters, others[name]))
            assert grads(parameters) == [None] * len(parameters)


def test_what_waits_is_in_a_checkpoint_and_goes_with_its_step_alone() -> None:
    owned, optimizer = company()
    put(owned, optimizer, 0)
    saved = optimizer.state_dict()["adapters"]
    give(twin := weights("cpu"), 0)
    for name in "xy":
        assert all(torch.equal(saved[name]["gradients"][i], p.grad) for i, p in enumerate(twin) if p.grad is not None)

    put(owned, optimizer, 1)
    optimizer.drop("x")
    assert grads(owned["x"]) == [None] * len(twin) and all(g is not None for g in grads(owned["y"]))

    put(owned, optimizer, 2)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in owned["x"]]
    optimizer.step()
    assert all(map(torch.equal, before, owned["x"]))

    put(owned, optimizer, 3)
    optimizer.expect(Gradients(wait=True))  # a pass without a step in between: its gradients are added to
    assert all(g is not None for g in grads(owned["x"]))


# ---- when they may wait ----------------------------------------------------------------------------------------------


class After(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None: ...


class Before(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...


class BeforeOfNothing(Before):
    reads_gradients = False


class AtTheEnd(Callback):
    def on_train_batch_end(self, *_: Any) -> None: ...


class ReadsAtTheEnd(AtTheEnd):
    reads_gradients = True


class Hooks(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(lambda *_: None)


def overriding(name: str) -> Callable[[MultiAdapterModule], None]:
    def change(module: MultiAdapterModule) -> None:
        own = getattr(MultiAdapterModule, name)
        module.__class__ = type("Own", (MultiAdapterModule,), {name: lambda self, *args, **kw: own(self, *args, **kw)})

    return change


@pytest.mark.filterwarnings("ignore:.*accumulate_grad_batches")
@pytest.mark.parametrize(
    ("callbacks", "change", "options", "wanted"),
    [
        ([], None, {}, [True] * 4),
        ([AtTheEnd()], None, {}, [True] * 4),
        ([After()], None, {}, [False] * 4),
        ([Before()], None, {}, [False] * 4),
        ([AtTheEnd(), BeforeOfNothing()], None, {}, [True] * 4),
        ([ReadsAtTheEnd()], None, {}, [False] * 4),
        ([Hooks()], None, {}, [False] * 4),
        ([AdapterMemoryMonitor(2, table=False)], None, {}, [False, True, False, True]),
        ([], overriding("on_after_backward"), {}, [False] * 4),
        ([], overriding("configure_gradient_clipping"), {}, [False] * 4),
        ([], overriding("optimizer_step"), {}, [False] * 4),
        ([], overriding("on_train_epoch_end"), {}, [True] * 4),
        ([], None, {"accumulate_grad_batches": 2}, [False] * 4),
        ([], None, {"precision": "bf16-mixed"}, [False] * 4),
    ],
)
def test_they_wait_where_nobody_reads_them(
    callbacks: list[Callback], change: Any, options: dict[str, Any], wanted: list[bool], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert waits(tiny_module(tmp_path, BOTH), callbacks, change, options, monkeypatch) == wanted


def test_they_do_not_wait_where_an_adapter_accumulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module(tmp_path, BOTH | {"legal": {"accumulate": 2}})
    assert waits(module, [], None, {}, monkeypatch) == [False] * 4


def waits(
    module: MultiAdapterModule, callbacks: list[Callback], change: Any, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> list[bool]:  # fmt: skip
    """Of each of four batches, whether its gradients may wait."""
    seen: list[bool] = []
    follow = AdapterBank.follow

    def watched(self: AdapterBank, route: Any, **more: Any) -> Any:
        seen.append(route.gradients.wait)
        return follow(self, route, **more)

    monkeypatch.setattr(AdapterBank, "follow", watched)
    if change is not None:
        change(module)
    tiny_fit(module, tiny_batches(list(BOTH), 4), *callbacks, **options)
    return seen
