"""One optimizer in Lightning's eyes, which holds a real one for each adapter: its own class, settings, accumulation,
steps, schedule and clipping. What one adapter does, or fails to do, no other one notices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from finetuna_lightning.configs import AdapterConfig, OptimConfig, optimizer_settings
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.nn.gradients import Gradients
from finetuna_lightning.training.flat_optim import FLAT, FlatStep, Layout, flat_optimizer, step_together
from finetuna_lightning.training.norms import gradient_norms, norms_at
from finetuna_lightning.training.quarantine import LateVerdicts, agreed
from finetuna_lightning.training.waiting import Standing

Factor = Callable[[int], float]
_grad = attrgetter("grad")


def _absent(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether none has a gradient."""
    return all(map(is_, map(_grad, parameters), repeat(None)))


def schedule_factor(kind: str, warmup_steps: int, total_steps: float) -> Factor:
    """The learning rate's factor after ``step`` optimizer steps.

    Linear from 0 to 1 over ``warmup_steps`` (the first step already moves), then ``constant``, or ``linear`` or
    ``cosine`` decay to 0 at ``total_steps``; where these are infinite, constant.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if kind == "constant" or math.isinf(total_steps):
            return 1.0
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        return left if kind == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))

    return factor


@dataclass
class Turn:
    """How far one adapter is, and when its next step is due.

    Args:
        accumulate: batches in one optimizer step.
        max_bad_steps: skipped steps in a row after which the adapter is in quarantine.
        factor: of the learning rate, by the steps taken.
        steps: optimizer steps taken.
        pending: batches since, whose gradients wait.
        skipped: steps that were not taken because the loss or a gradient was not finite; ``in_a_row`` of them since the
            last one that was.
        finite: whether the losses since the last step were, on their device.
    """

    accumulate: int = 1
    max_bad_steps: int = 3
    factor: Factor | None = None
    steps: int = 0
    pending: int = 0
    skipped: int = 0
    in_a_row: int = 0
    finite: Tensor | None = None

    @property
    def quarantined(self) -> bool:
        return self.in_a_row >= self.max_bad_steps

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1


_COUNTS = ("steps", "pending", "skipped", "in_a_row")


class AdapterOptimizers(Optimizer):
    """An optimizer for each adapter, as one: ``param_groups`` has one group an adapter, with its ``name``.

    Call ``note`` for every adapter of a batch, then ``step``: those whose accumulation is complete are clipped and
    stepped, each by itself. A step whose loss or gradient norm is not finite is skipped: weights, state and step count
    stay as they are. Where nothing is noted, whatever has a gradient takes part.

    Flat optimizers, and torch's AdamW on a GPU, select on the device, and the count follows one step late, so that the
    host never waits. For SGD, Adafactor and the paged kinds the host asks (and bitsandbytes, whose paged state it is,
    waits at every tensor).

    Args:
        optimizers: by adapter, over one parameter group each.
        turns: by adapter.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], turns: Mapping[str, Turn]) -> None:
        self.optimizers = dict(optimizers)
        self.turns = dict(turns)
        self._noted: set[str] = set()
        self._norms: dict[str, Tensor] = {}
        self._loaded: dict[str, dict[int, Tensor]] = {}  # gradients of a checkpoint, until their adapter's next batch
        self._taken: dict[str, Tensor] = {}  # whether the device takes the step, of those that it decides about
        self._late: list[LateVerdicts] = []
        self._gradients = Gradients()
        self._standing: Standing | None = None
        self._rows: dict[str, tuple[Layout, Tensor]] = {}  # of what waits: how it is laid out, and where it stands
        super().__init__([{}], {})

    # ---- torch's attributes, which belong to the optimizers within ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, value: Any) -> None: ...

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        states = (optimizer.state for optimizer in self.optimizers.values())
        return defaultdict(dict, {parameter: state for own in states for parameter, state in own.items()})

    @state.setter
    def state(self, value: Any) -> None: ...

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group of another kind, under its ``name``, stepped by AdamW; adapters come by ``add``."""
        if param_group:
            group = {"max_grad_norm": None, **param_group}
            self.add(group["name"], torch.optim.AdamW([group]), Turn())

    def add(self, name: str, optimizer: Optimizer, turn: Turn) -> None:
        """Take in one more adapter."""
        self.optimizers[name], self.turns[name] = optimizer, turn
        self._set_rate(name)

    def remove(self, name: str) -> None:
        """Let an adapter go, with its state."""
        self.settle()
        self.drop(name)
        self._standing = None
        del self.optimizers[name], self.turns[name]

    # ---- a step ----

    def note(self, name: str, finite: Tensor) -> None:
        """Adapter ``name`` has rows in this batch; ``finite``: whether its loss is, a 0-dim bool on its device."""
        self._put_back(name)
        turn = self.turns[name]
        turn.finite = finite if turn.finite is None else turn.finite & finite
        self._noted.add(name)

    def expect(self, gradients: Gradients) -> None:
        """Those of the pass that begins; what still waits of an earlier one is put in place."""
        self._bind()
        self._gradients = gradients

    @property
    def may_wait(self) -> bool:
        """Whether a pass's gradients may wait (see ``Gradients``) for the step, which takes them all."""
        return all(turn.accumulate == 1 and not turn.pending for turn in self.turns.values())

    def _bind(self) -> None:
        self._gradients.bind()
        self._rows.clear()

    def _stand(self) -> None:
        """Find where the gradients that wait stand; put them in place where somebody whose step is due needs that."""
        waiting = self._gradients.waiting
        if not waiting or self._rows:
            return
        due = self.due()
        owners = (self.optimizers[name] for name in due)
        found = [owner.lone_shelf() if isinstance(owner, FlatStep) else None for owner in owners]
        shelves = [shelf for shelf in found if shelf is not None]
        if shelves and len(shelves) == len(found):
            if self._standing is None or not self._standing.of(waiting, shelves):
                self._standing = Standing(waiting, shelves)
            for name, shelf, row in zip(due, shelves, self._standing.rows(waiting), strict=False):
                self._rows[name] = shelf.layout, row
        if not self._rows:
            self._bind()

    def due(self) -> list[str]:
        """The adapters whose accumulation the current batch completes."""
        return [n for n in self._taking_part() if self.turns[n].pending + 1 >= self.turns[n].accumulate]

    def _taking_part(self) -> list[str]:
        if self._noted:
            return [name for name in self.optimizers if name in self._noted]
        return [name for name in self.optimizers if any(p.grad is not None for p in self._parameters(name))]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        groups = self.optimizers[name].param_groups
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    def clip(self) -> dict[str, Tensor]:
        """Clip the gradient norm of every adapter whose step is due to its own ``max_grad_norm``; the norms before.

        Gradients of flat optimizers stay as they are until they are gathered, in ``step``."""
        self._stand()
        alike: dict[Layout, list[str]] = defaultdict(list)
        owned: dict[str, list[Tensor]] = {}
        for name in self.due():
            if name in self._norms:
                continue
            if name in self._rows:
                alike[self._rows[name][0]].append(name)
            else:
                gradients = [g for g in map(_grad, self._parameters(name)) if g is not None]
                owned |= {name: gradients} if gradients else {}
        self._norms |= zip(owned, gradient_norms(list(owned.values())), strict=True)
        for layout, names in alike.items():
            at = torch.stack([self._rows[name][1][1] for name in names])
            self._norms |= zip(names, norms_at(at, layout.sizes, layout.programs.device), strict=True)
        for name, gradients in owned.items():
            coefficient = None if isinstance(self.optimizers[name], FlatStep) else self._coefficient(name)
            if coefficient is not None:
                torch._foreach_mul_(gradients, coefficient)
        return dict(self._norms)

    def _coefficient(self, name: str) -> Tensor | None:
        """What brings the gradients of ``name`` to its ``max_grad_norm``, as ``clip_grad_norm_`` has it."""
        limit = self.optimizers[name].param_groups[0]["max_grad_norm"]
        return None if limit is None else (limit / (self._norms[name] + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every adapter that is due; each is clipped, where that has not been done."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.settle()
        self.clip()
        due = self.due()
        for name in self._taking_part():
            self.turns[name].pending += 1
        verdicts = agreed(self._good([name for name in due if name in self._norms]))
        for name, flag in verdicts.items():
            self._take(name, flag)
        taking = (self.optimizers[name] for name in verdicts)
        step_together([optimizer for optimizer in taking if isinstance(optimizer, FlatStep)])
        if self._taken:
            self._late.append(LateVerdicts(self._taken))
            self._taken.clear()
        for name in due:
            self.turns[name].pending, self.turns[name].finite = 0, None
        self._gradients.waiting.clear()
        self._rows.clear()
        self._noted.clear()
        self._norms.clear()
        return loss

    def _good(self, names: list[str]) -> dict[str, Tensor]:
        """By adapter, whether its losses and its gradients' norm are finite, on the device."""
        if not names:
            return {}
        norms = torch.stack([self._norms[name] for name in names]).isfinite().unbind()
        losses = [self.turns[name].finite for name in names]
        return {n: norm if own is None else norm & own for n, norm, own in zip(names, norms, losses, strict=True)}

    def _took(self, name: str, good: Tensor) -> None:
        """The device takes the step, or does not: it counts until ``settle``."""
        self.turns[name].steps += 1
        self._taken[name] = good

    def _take(self, name: str, good: Tensor) -> None:
        """Step adapter ``name`` if that is good; a flat one is told, and stepped with the others."""
        optimizer, turn = self.optimizers[name], self.turns[name]
        heeds = getattr(optimizer, "_step_supports_amp_scaling", False)  # torch's word for one that heeds found_inf
        if isinstance(optimizer, FlatStep):
            optimizer.found_inf, optimizer.coefficient = (~good).float(), self._coefficient(name)
            optimizer.standing = self._rows[name][1] if name in self._rows else None
            self._took(name, good)
        elif heeds and good.is_cuda:
            optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
            optimizer.step()
            self._took(name, good)
        elif good:
            optimizer.step()
            turn.steps, turn.in_a_row = turn.steps + 1, 0
        else:
            turn.skip()
            optimizer.zero_grad()

    def settle(self) -> None:
        """Take back the counts of steps that the device did not take."""
        for verdicts in self._late:
            for name, taken in verdicts.read().items():
                turn = self.turns[name]
                if taken:
                    turn.in_a_row = 0
                    continue
                optimizer = self.optimizers[name]
                if isinstance(optimizer, FlatStep):
                    optimizer.take_back()
                turn.steps -= 1
                turn.skip()
                self._set_rate(name)
        self._late.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that have been used; those of an adapter that accumulates stay."""
        self._gradients.waiting.clear()  # where any does, none waits
        self._rows.clear()
        for name, optimizer in self.optimizers.items():
            if self.turns[name].pending == 0:
                if set_to_none:
                    self._forget(name)
                else:
                    optimizer.zero_grad(False)

    def _forget(self, name: str) -> None:
        """The gradients of ``name``; torch's own ``zero_grad`` takes longer to begin than this takes."""
        parameters = self._parameters(name)
        if not _absent(parameters):
            for parameter in parameters:
                parameter.grad = None

    def release(self) -> None:
        """Forget the gradients of steps that have been taken, so that the next forward pass has their memory."""
        for name in self.optimizers:
            if self.turns[name].pending == 0 and name not in self._noted:
                self._forget(name)

    def drop(self, name: str) -> None:
        """Forget what adapter ``name`` has accumulated."""
        self._bind()
        self.turns[name].pending, self.turns[name].finite = 0, None
        self._noted.discard(name)
        self._loaded.pop(name, None)
        self.optimizers[name].zero_grad()

    # ---- learning rates ----

    def rate(self, name: str) -> float:
        """The learning rate of the next step of adapter ``name``."""
        group, factor = self.optimizers[name].param_groups[0], self.turns[name].factor
        peak = group.setdefault("initial_lr", group["lr"])
        return float(peak if factor is None else peak * factor(self.turns[name].steps))

    def _set_rate(self, name: str) -> None:
        self.optimizers[name].param_groups[0]["lr"] = self.rate(name)

    # ---- a checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """By adapter name: the state of its optimizer, its counts, and the gradients that it has accumulated."""
        self.settle()
        self._bind()
        saved = {}
        for name, optimizer in self.optimizers.items():
            turn, waiting = self.turns[name], name in self._noted or self.turns[name].pending > 0
            gradients = self._loaded.get(name) or {
                i: p.grad for i, p in enumerate(self._parameters(name)) if p.grad is not None
            }
            saved[name] = {
                "kind": type(optimizer).__name__,
                "state": optimizer.state_dict()["state"],
                **{what: getattr(turn, what) for what in _COUNTS},
                "noted": name in self._noted,
                "finite": turn.finite is None or bool(turn.finite),
                "gradients": gradients if waiting else {},
            }
        return {"adapters": saved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, by name. An adapter that is not in it starts afresh, one that is only there is
        passed over, and one with another class of optimizer starts that afresh and keeps its counts; each with a line
        in the log. Learning rates, decays and the like are those of this run."""
        self.settle()
        saved = state_dict["adapters"]
        for name in saved:
            if name not in self.optimizers:
                rank_zero_info(f"the checkpoint's optimizer state of adapter {name!r} is passed over: it is not here")
        for name, optimizer in self.optimizers.items():
            if name not in saved:
                rank_zero_info(f"adapter {name!r} is not in the checkpoint: its optimizer starts afresh")
                continue
            self._load(name, optimizer, saved[name])

    def _load(self, name: str, optimizer: Optimizer, mine: Mapping[str, Any]) -> None:
        if mine["kind"] == type(optimizer).__name__:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": mine["state"], "param_groups": groups})
        else:
            rank_zero_info(
                f"adapter {name!r} was trained by {mine['kind']} and is now by {type(optimizer).__name__}, whose state "
                "starts afresh"
            )
        turn = self.turns[name]
        for what in _COUNTS:
            setattr(turn, what, mine[what])
        self._loaded[name] = dict(mine["gradients"])
        waiting = mine["noted"] or turn.pending > 0
        device = self._parameters(name)[0].device
        turn.finite = torch.tensor(mine["finite"], device=device) if waiting else None
        if mine["noted"]:
            self._noted.add(name)
        self._set_rate(name)

    def _put_back(self, name: str) -> None:
        """The accumulated gradients of a checkpoint, once the batch comes that adds to them: Lightning clears all
        gradients when a fit starts."""
        parameters = self._parameters(name)
        for index, gradient in self._loaded.pop(name, {}).items():
            parameters[index].grad = gradient.to(parameters[index].device, copy=True)


class AdapterSchedules(LRScheduler):
    """Each adapter's learning rate by its own step count: a step that an adapter accumulates for, skips or, having
    left, does not take, moves nothing. A resume goes by the schedules of this run, whatever the last one's were."""

    optimizer: AdapterOptimizers

    def get_lr(self) -> list[float | Tensor]:
        """In the order of the optimizer's groups."""
        return [self.optimizer.rate(name) for name in self.optimizer.optimizers]

    def state_dict(self) -> dict[str, Any]:
        """The joint count; the steps of each adapter are with its optimizer."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the joint count; the optimizer's state has been loaded before."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = self.get_lr()


# ---- from configurations ---------------------------------------------------------------------------------------------


def check_optimizer(name: str, config: AdapterConfig, optim: OptimConfig) -> None:
    """Raise ConfigError, naming the adapter, for a setting that its optimizer does not take."""
    try:
        optimizer_settings(config, optim)
    except ConfigError as error:
        raise ConfigError(f"adapter {name!r}: {error}") from None


def adapter_optimizer(
    name: str, parameters: Iterable[nn.Parameter], config: AdapterConfig, optim: OptimConfig
) -> Optimizer:
    """The optimizer of one adapter, over one group; ``group["name"]`` and ``group["max_grad_norm"]`` say whose it is
    and how it is clipped."""
    kind, settings = optimizer_settings(config, optim)
    trained = [p for p in parameters if p.requires_grad]
    group = {
        "params": trained,
        "name": name,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
    }
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    if kind == "adamw":
        fused = len({p.device for p in trained}) == 1 and trained[0].device.type in ("cuda", "cpu")
        return torch.optim.AdamW([group], fused=fused or None, **settings)
    if kind == "sgd":
        return torch.optim.SGD([group], lr=config.lr, **settings)
    if kind == "adafactor":
        return torch.optim.Adafactor([group], lr=config.lr)
    if kind in FLAT:
        return flat_optimizer(kind, [group], **settings)
    import bitsandbytes.optim as eight_bit  # slow to import

    names = {"paged_adamw8bit": "PagedAdamW8bit", "paged_lion8bit": "PagedLion8bit"}
    optimizer: Optimizer = getattr(eight_bit, names[kind])([group], **settings)
    return optimizer


def adapter_turn(config: AdapterConfig, left: float = math.inf) -> Turn:
    """The turn of an adapter that joins now. ``left``: batches to come; its schedule ends with them, or with its
    ``max_steps``."""
    own = left if math.isinf(left) else left // config.accumulate
    factor = schedule_factor(config.schedule, config.warmup_steps, min(own, config.max_steps or own))
    return Turn(config.accumulate, config.max_bad_steps, factor)


def build_optimizer(
    parameters: Mapping[str, Iterable[nn.Parameter]],
    adapters: Mapping[str, AdapterConfig],
    optim: OptimConfig,
    total_steps: float = math.inf,
) -> AdapterOptimizers:
    """An optimizer and a schedule for each adapter. ``total_steps``: of the trainer; an adapter's own schedule ends
    with them (divided by its ``accumulate``) or with its ``max_steps``, whichever comes first."""
    return AdapterOptimizers(
        {name: adapter_optimizer(name, parameters[name], config, optim) for name, config in adapters.items()},
        {name: adapter_turn(config, total_steps) for name, config in adapters.items()},
    )


def optimizer_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of optimizer state by group name (shared lookup tables of 8-bit optimizers are counted where first met)."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    states = optimizer.state
    for group in optimizer.param_groups:
        total = 0
        for parameter in group["params"]:
            for value in states.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in seen:
                    seen.add(value.untyped_storage().data_ptr())
                    total += value.untyped_storage().nbytes()
        sizes[group["name"]] = total
    return sizes
