"""A workload through ``Trainer.fit``, over a backbone that outlives the fit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import finetuna_lightning as ft
from benchmarks.common import GIB, PROJECTIONS, SharedBackbone, joint_batches, loader_of, release_memory
from benchmarks.workloads import ALPHA, Workload, tokens_of
from finetuna_lightning.backbone import enable_checkpointing
from finetuna_lightning.training.optim import optimizer_bytes


@dataclass(frozen=True)
class Settings:
    """How a workload is run. ``steps`` are timed, after ``warmup`` ones. ``precision`` and ``module``: other arguments
    of ``EightBitPrecision`` and ``MultiAdapterModule``; ``fresh``: over a backbone of its own."""

    steps: int = 8
    warmup: int = 3
    compute: str = "auto"
    scheme: str = "int8"
    optim: str = "adamw8bit"
    packed: bool = True
    recompute: bool = False
    precision: Mapping[str, Any] = field(default_factory=dict)
    module: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


@dataclass
class Figures:
    """What a run came to; bytes are 0 where the device does not count them.

    ``seconds``: of one step, on the wall, over all timed steps, with one synchronisation before and one after them.
    ``median``: of one step by the device's own clock (the host's on the CPU). ``peak``: allocated at most in the whole
    fit; ``steady``: in the timed steps; ``asked``: what they asked for at most (the allocator's blocks are up to 1 MiB
    larger each); ``reserved``: by the allocator. ``own``: by kind, the adapters' bytes.
    """

    seconds: float = float("nan")
    median: float = float("nan")
    tokens: float = 0.0
    peak: int = 0
    steady: int = 0
    asked: int = 0
    reserved: int = 0
    backbone: int = 0
    own: dict[str, int] = field(default_factory=dict)
    loss: float = float("nan")
    compute: str = ""
    failed: str = ""

    @property
    def rate(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds

    def cells(self) -> list[str]:
        """As a row of a table: s/step, median, tokens/s, peak and reserved GiB, loss."""
        if self.failed:
            return [self.failed, "", "", "", "", ""]
        return [
            f"{self.seconds:.4f}", f"{self.median:.4f}", f"{self.rate:,.0f}", gib(self.peak), gib(self.reserved),
            f"{self.loss:.3f}",
        ]  # fmt: skip


COLUMNS = ["s/step", "median", "tokens/s", "peak GiB", "reserved", "loss"]


def gib(size: float) -> str:
    """In GiB; a dash where the device does not count."""
    return f"{size / GIB:.2f}" if size else "-"


class StepClock:
    """When steps begin, without waiting for the device; wall time over the timed ones, which does."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.started = self.stopped = float("nan")

    def mark(self) -> None:
        """A timed step begins, or the last one has ended."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def start(self) -> None:
        """Wait for the device, then count."""
        self.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Wait for the device, then stop counting."""
        self.mark()
        self.synchronize()
        self.stopped = time.perf_counter()

    def synchronize(self) -> None:
        """Wait for the device, where there is one to wait for."""
        if self.cuda:
            torch.cuda.synchronize()

    def median(self) -> float:
        """Seconds of a step."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        steps = sorted(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs)
        return steps[len(steps) // 2]


class Meter(pl.Callback):
    """Times the steps of a fit and counts its bytes."""

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self.clock, self.warmup, self.last = StepClock(device), warmup, warmup + steps - 1
        self.figures = Figures()
        self._before = 0
        self._gradients: int | None = None

    @property
    def reads_gradients(self) -> bool:
        """Of the first step, none of which is timed; of the others they may wait past ``grad``."""
        return self._gradients is None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._gradients is None:
            self._gradients = storage_bytes(p.grad for p in pl_module.adapters.parameters() if p.grad is not None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warmup:
            self.clock.start()
            if self.clock.cuda:
                self._before = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        if batch_idx >= self.warmup:
            self.clock.mark()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.last:
            return
        self.clock.stop()
        figures, bank = self.figures, pl_module.adapters
        if self.clock.cuda:
            figures.steady = torch.cuda.max_memory_allocated()
            figures.asked = torch.cuda.memory_stats()["requested_bytes.all.peak"]
            figures.peak = max(self._before, figures.steady)
            figures.reserved = torch.cuda.max_memory_reserved()
        parameters = list(bank.parameters())
        figures.own = {
            "weights": storage_bytes(parameters),
            "gradients": self._gradients or 0,
            "state": sum(optimizer_bytes(pl_module.optimizer).values()),
        }
        figures.backbone = bank.backbone_nbytes
        figures.compute = compute_of(pl_module.backbone)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.figures.loss = float(trainer.callback_metrics.get("train/loss", float("nan")))


class Leave(pl.Callback):
    """Takes a fit apart at its end: the backbone stays on the device for the next one, adapters and optimizers are let
    go. Lightning carries everything to the CPU before any hook of the end but ``on_train_end``."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.optimizers = []
        pl_module.cpu = lambda: pl_module

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.strategy.optimizers = []
        pl_module.backbone = pl_module._bank = None
        pl_module._plain_backbone = ()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def compute_of(backbone: Any) -> str:
    """How products with the backbone's matrices are computed: one name, or several joined."""
    kinds = {module.compute for module in backbone.modules() if hasattr(module, "codes") and hasattr(module, "compute")}
    return "+".join(sorted(kinds))


def build(backbone: Any, work: Workload, given: Settings, lr: float = 1e-4) -> ft.MultiAdapterModule:
    """The module: LoRA on the seven projections, each adapter of its own rank."""
    if given.recompute:
        enable_checkpointing(backbone)
    adapters = {
        name: ft.AdapterConfig(rank=rank, alpha=ALPHA, lr=lr, target_modules=PROJECTIONS)
        for name, rank in work.ranks.items()
    }
    return ft.MultiAdapterModule(backbone, adapters, ft.OptimConfig(given.optim), **given.module)


def fit(module: ft.MultiAdapterModule, batches: list[Any], device: torch.device, given: Settings,
        callbacks: Sequence[pl.Callback], frozen: bool = True) -> None:  # fmt: skip
    """``Trainer.fit`` over ``batches``, as a user would call it, without logs and checkpoints."""
    callbacks = [*callbacks, *([ft.FreezeQuantizedWeights()] if frozen else []), Leave()]
    precision = ft.EightBitPrecision(scheme=given.scheme, compute=given.compute, **given.precision)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_steps=len(batches), logger=False,
        plugins=[precision], callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    trainer.fit(module, loader_of(batches))


def run(
    shared: SharedBackbone, work: Workload, given: Settings, extra: Sequence[pl.Callback] = (), after: int = 0
) -> Figures:
    """Figures of ``work``. A run that the device's memory does not hold says so in ``failed``.

    ``extra``: callbacks; ``after``: steps for them that are not timed.
    """
    if given.fresh:
        shared.free()
    release_memory()
    lengths = work.lengths(given.warmup + given.steps + after)
    batches = joint_batches(lengths, shared.shape["vocab_size"], given.packed)
    meter = Meter(shared.device, given.warmup, given.steps)
    module = build(shared.model(), work, given)
    release_memory()
    if shared.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        fit(module, batches, shared.device, given, [*extra, meter])
    except torch.cuda.OutOfMemoryError:
        return Figures(failed="out of memory")
    finally:
        del module
        release_memory()
    figures = meter.figures
    figures.seconds = (meter.clock.stopped - meter.clock.started) / given.steps
    figures.median = meter.clock.median()
    timed = lengths[given.warmup : given.warmup + given.steps]
    figures.tokens = sum(tokens_of(step) for step in timed) / given.steps
    return figures
