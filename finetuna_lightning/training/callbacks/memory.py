"""Counts the bytes of a run: the backbone once, and each adapter's weights, gradients, optimizer state, activations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finetuna_lightning.adapters import Adapter
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.batches import route_of
from finetuna_lightning.training.optim import optimizer_bytes
from finetuna_lightning.training.report import bank_of, memory_table

PARTS = ("weights", "gradients", "optimizer", "activations")


class AdapterMemoryMonitor(Callback):
    """Measures, on the first and then every ``every_n_steps``-th optimizer step, what each adapter costs in bytes.

    ``weights``, ``gradients`` and ``optimizer`` are exact. ``activations`` is an adapter's share of what the forward
    pass keeps for the backward pass: every storage once, without parameters and buffers, divided in proportion to the
    tokens (pads included) of each adapter's sequences. Logged as ``memory/<adapter>/<part>``, with
    ``memory/backbone/bytes`` and ``memory/peak/bytes``: of a CUDA device what torch had allocated at the most,
    elsewhere the process's peak resident size. Steps that are not measured cost one comparison.

    Args:
        every_n_steps: steps from one measurement to the next.
        table: print a table when the fit ends.
    """

    def __init__(self, every_n_steps: int = 50, table: bool = True) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be an integer >= 1, not {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self.table = table
        self._saved: SavedForBackward | None = None
        self._measuring: int | None = None  # the step that is being measured
        self._now: dict[str, dict[str, int]] = {}
        self._largest: dict[str, dict[str, int]] = {}
        self._backbone = 0
        self._peak: tuple[int, str] = (0, "")

    # ---- one measured step ----

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._largest, self._measuring = {}, None
        self._backbone = bank_of(pl_module, type(self).__name__).backbone_nbytes

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """On a step to measure, start to count what is saved for the backward pass."""
        if trainer.global_step % self.every_n_steps == 0:
            if self._measuring != trainer.global_step:  # not a later batch of the same, accumulated step
                self._measuring = trainer.global_step
                names = bank_of(pl_module, type(self).__name__)
                self._now = {name: dict.fromkeys(PARTS, 0) for name in names}
            self._saved = SavedForBackward(pl_module)
            self._saved.start()
            self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over: divide what it saved."""
        if self._saved is not None:
            saved, self._saved, batch = self._saved, None, self.__dict__.pop("_batch")
            saved.stop()
            for name, share in shares(saved.total, batch, list(self._now)).items():
                self._now[name]["activations"] = max(self._now[name]["activations"], share)

    @property
    def reads_gradients(self) -> bool:
        """Whether this step is measured: in all others gradients may wait past ``grad`` (see ``training.waiting``)."""
        return self._measuring is not None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradients stand in full now; after the step they are freed."""
        if self._measuring is not None:
            for name, adapter in bank_of(pl_module, type(self).__name__).items():
                grads = [p.grad for p in adapter.parameters() if p.grad is not None]
                parts = self._now.setdefault(name, dict.fromkeys(PARTS, 0))  # it may have joined since
                parts["gradients"] = sum(grad.nbytes for grad in grads)  # many are parts of one storage

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the measured step: weights and optimizer state, and the log."""
        self._stop()
        if self._measuring is not None and trainer.global_step > self._measuring:
            step, self._measuring = self._measuring, None
            self._count_states(trainer, pl_module)
            self._log(trainer, step)

    def _count_states(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states = [optimizer_bytes(optimizer) for optimizer in trainer.optimizers]
        for name, adapter in bank_of(pl_module, type(self).__name__).items():
            assert isinstance(adapter, Adapter)
            parts = self._now.setdefault(name, dict.fromkeys(PARTS, 0))
            parts["weights"] = adapter.nbytes
            parts["optimizer"] = sum(state.get(name, 0) for state in states)
            largest = self._largest.setdefault(name, dict.fromkeys(PARTS, 0))
            largest.update({part: max(largest[part], size) for part, size in parts.items()})
        self._peak = peak_bytes(trainer.strategy.root_device)

    def _log(self, trainer: Trainer, step: int) -> None:
        # straight to the loggers: self.log would round to float32, and drop steps that log_every_n_steps leaves out
        values = {f"memory/{name}/{part}": size for name, parts in self._now.items() for part, size in parts.items()}
        values |= {"memory/backbone/bytes": self._backbone, "memory/peak/bytes": self._peak[0]}
        for logger in trainer.loggers:
            logger.log_metrics({key: float(value) for key, value in values.items()}, step=step)

    def _stop(self) -> None:
        if self._saved is not None:
            self._saved.stop()
            self._saved = None
            self.__dict__.pop("_batch", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind when a forward pass fails."""
        self._stop()
        self._measuring = None

    # ---- the end ----

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if not self._largest:  # the fit took no step
            self._now = {}
            self._count_states(trainer, pl_module)
        if self.table and trainer.is_global_zero:
            Console().print(memory_table(self.report()))

    def report(self) -> dict[str, Any]:
        """The figures, in bytes, each part the largest that was measured.

        Returns:
            ``backbone`` (``bytes``), ``adapters`` (by name: the four parts, and ``total``, all but the activations),
            ``together`` (one backbone and all totals), ``separate`` (a backbone for each adapter and all totals),
            ``saving``, ``peak``, ``peak_of``.
        """
        adapters = {
            name: {**parts, "total": parts["weights"] + parts["gradients"] + parts["optimizer"]}
            for name, parts in self._largest.items()
        }
        totals = sum(parts["total"] for parts in adapters.values())
        together, separate = self._backbone + totals, len(adapters) * self._backbone + totals
        return {
            "backbone": {"bytes": self._backbone},
            "adapters": adapters,
            "together": together,
            "separate": separate,
            "saving": separate - together,
            "peak": self._peak[0],
            "peak_of": self._peak[1],
        }


class SavedForBackward:
    """Between ``start`` and ``stop``, adds up the storages that autograd saves, each once, without ``module``'s own."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {_storage(tensor)[0] for tensor in (*module.parameters(), *module.buffers())}
        self._hooks = saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.total = 0

    def start(self) -> None:
        """Hooks set within (gradient checkpointing's) take precedence: what they hold back is not counted."""
        self._hooks.__enter__()

    def stop(self) -> None:
        self._hooks.__exit__()

    def _count(self, tensor: Tensor) -> Tensor:
        key, size = _storage(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self.total += size
        return tensor.detach()  # the tensor itself, when it is its own node's output, would be a reference cycle


def _storage(tensor: Tensor) -> tuple[tuple[torch.device, int], int]:
    try:
        storage = tensor.untyped_storage()
        return (tensor.device, storage.data_ptr()), storage.nbytes()
    except RuntimeError:  # a subclass without memory of its own
        return (tensor.device, 0), 0


def shares(total: int, batch: Any, names: Sequence[str]) -> dict[str, int]:
    """``total`` divided among the adapters of ``batch`` by their rows, which are padded to one length, or by their
    packed tokens; nothing is lost to rounding. Without a route in the batch, all of ``names`` have equal parts."""
    if isinstance(batch, dict) and "adapters" in batch and "rows" in batch:
        weights: dict[str, int] = {}
        route = route_of(batch)
        for name, size in zip(route.names, route.sizes, strict=True):
            weights[name] = weights.get(name, 0) + size
    else:
        weights = dict.fromkeys(names, 1)
    parts: dict[str, int] = {}
    passed, given, whole = 0, 0, sum(weights.values())
    for name, weight in weights.items():
        passed += weight
        parts[name] = total * passed // max(whole, 1) - given
        given += parts[name]
    return parts


def peak_bytes(device: torch.device) -> tuple[int, str]:
    """The most memory in use so far, and of what: torch's allocations on a CUDA device, else this process (0 where the
    system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "GPU memory"
    try:
        import resource  # not on Windows
    except ImportError:
        return 0, "process memory"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process memory"
