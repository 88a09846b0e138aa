"""Shows each adapter's loss while it trains: a live bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from finetuna_lightning.errors import ConfigError

_LINES = 20  # of a run, where nobody watches
_SMOOTHING = 0.9
_UNBOUNDED_SECONDS = 30.0  # between lines, when nobody knows how long the run is


class AdapterProgress(ProgressBar):
    """Progress with every adapter's smoothed loss, in place of Lightning's bar, and the history of the losses.

    On a terminal a bar, refreshed in place. In a log file about 20 lines a run:
    ``step 40/150  27%  1.20 s/step  2,560 tokens/s  eta 2:11  english 4.910  c_headers 3.970``. Tokens are those that
    the attention mask lets through. After each validation a line with every adapter's held-out loss, and its perplexity
    or accuracy.

    Losses stay on their device until they are shown: no step waits for the GPU on their behalf.

    Args:
        refresh_seconds: between two drawings of the bar.
        every_n_steps: between two lines where there is no terminal; None chooses for about 20 in all.

    Attributes:
        history: by adapter, the training loss of every optimizer step: ``(step, loss)``, the first step being 1.
        val_history: the same for the loss of each validation.
    """

    def __init__(self, refresh_seconds: float = 1.0, every_n_steps: int | None = None) -> None:
        super().__init__()
        if not refresh_seconds > 0:
            raise ConfigError(f"AdapterProgress.refresh_seconds must be above 0, not {refresh_seconds!r}")
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps < 1):
            raise ConfigError(f"AdapterProgress.every_n_steps must be None or an integer >= 1, not {every_n_steps!r}")
        self.refresh_seconds, self.every_n_steps = refresh_seconds, every_n_steps
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.val_history: dict[str, list[tuple[int, float]]] = {}
        self.console: Console | None = None  # None: standard output, looked up when a run starts
        self.enabled = True
        self._pending: list[tuple[int, str, Tensor]] = []
        self._means: dict[str, tuple[float, float]] = {}  # smoothed loss by adapter: weighted sum, sum of weights
        self._live: Live | None = None
        self._bar: Bar | None = None
        self._total = math.inf  # optimizer steps of the whole run
        self._shown = -1  # the step of the newest line
        self._clock = _Clock()

    # ---- Lightning's ProgressBar ----

    def enable(self) -> None:
        """Show (Lightning calls it)."""
        self.enabled = True

    def disable(self) -> None:
        """Show nothing; the history is kept all the same."""
        self.enabled = False
        self._stop_live()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """A line above the bar."""
        if self.enabled:
            self._console().print(*args, **kwargs, highlight=False, soft_wrap=True)

    # ---- training ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the bar; a new fit starts a new history, unless it goes on with one."""
        if trainer.global_step == 0:
            self.history, self.val_history, self._means = {}, {}, {}
        self._pending, self._shown = [], -1
        self._total = float(trainer.estimated_stepping_batches)
        self._clock = _Clock(trainer.global_step)
        self._start_live()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the losses; show them when it is time."""
        stepped = trainer.global_step != self._clock.step
        step = trainer.global_step if stepped else trainer.global_step + 1  # of which this batch is a part
        metrics = trainer.callback_metrics
        for name in _names(batch):
            loss = metrics.get(f"train/{name}/loss")
            if loss is not None:
                self._pending.append((step, name, loss.detach()))
        self._clock.add(batch)
        if stepped:
            self._clock.step = step
            if self._due(step):
                self._show()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One line with every adapter's held-out metrics."""
        self._clock.resume()
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        parts = []
        for name, values in _by_adapter(trainer.callback_metrics, "val").items():
            if "loss" in values:
                self.val_history.setdefault(name, []).append((trainer.global_step, values["loss"]))
            second = next(
                (f" ({what} {values[what]:.4g})" for what in ("perplexity", "accuracy") if what in values), ""
            )
            parts.append(f"{name} {values.get('loss', math.nan):.3f}{second}")
        if parts:
            self.print(f"validation at step {trainer.global_step}:  {'  '.join(parts)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last line, wherever the run ended."""
        if self._clock.step != self._shown:
            self._show()
        self._stop_live()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._collect()
        self._stop_live()

    # ---- the other loops ----

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far validation is."""
        self._evaluated(trainer, batch_idx, trainer.num_val_batches, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far the test is."""
        self._evaluated(trainer, batch_idx, trainer.num_test_batches, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far prediction is."""
        self._evaluated(trainer, batch_idx, trainer.num_predict_batches, dataloader_idx)

    def _evaluated(self, trainer: Trainer, index: int, totals: Any, loader: int) -> None:
        """Within a fit the bar says it; by itself, a quarter at a time, a line does."""
        total = totals[loader] if isinstance(totals, list) else totals
        if trainer.state.fn == TrainerFn.FITTING:
            if self._live is not None and self._clock.time_to_draw(self.refresh_seconds):
                self._draw(f"validating: batch {index + 1}/{total}")
        elif trainer.state.fn is not None and math.isfinite(total) and (index + 1) * 4 // total > index * 4 // total:
            self.print(f"{trainer.state.fn.value}: batch {index + 1}/{total}")

    # ---- showing ----

    def _console(self) -> Console:
        return self.console or (self._live.console if self._live is not None else Console())

    def _start_live(self) -> None:
        console = self._console()
        if self.enabled and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None

    def _due(self, step: int) -> bool:
        if self._live is not None:
            return self._clock.time_to_draw(self.refresh_seconds)
        if self.every_n_steps is None and not math.isfinite(self._total):
            return self._clock.time_to_draw(_UNBOUNDED_SECONDS)
        every = self.every_n_steps or max(1, math.ceil(self._total / _LINES))
        return step % every == 0

    def _show(self) -> None:
        self._collect()
        self._shown = self._clock.step
        losses = "".join(f"  {name} {loss:.3f}" for name, loss in self.smoothed().items())
        line = self._clock.line(self._total) + losses
        if self._live is not None:
            self._bar = Bar(total=self._total if math.isfinite(self._total) else None, completed=self._shown)
            self._draw(line)
        else:
            self.print(line)
        self._clock.lap()

    def _draw(self, line: str) -> None:
        assert self._live is not None
        drawing = Table.grid(expand=True)
        if self._bar is not None:
            drawing.add_row(self._bar)
        drawing.add_row(Text(line, overflow="fold"))
        self._live.update(drawing, refresh=True)

    def smoothed(self) -> dict[str, float]:
        """Each adapter's loss, as an exponential moving average over about ten steps."""
        return {name: total / weight for name, (total, weight) in self._means.items()}

    def _collect(self) -> None:
        """Move the pending losses into the history: one transfer for all of them."""
        if not self._pending:
            return
        values = torch.stack([loss.float() for *_, loss in self._pending]).tolist()
        by_step: dict[tuple[str, int], list[float]] = {}
        for (step, name, _), value in zip(self._pending, values, strict=True):
            by_step.setdefault((name, step), []).append(value)
        self._pending = []
        for (name, step), several in by_step.items():  # several: accumulated batches
            loss = sum(several) / len(several)
            self.history.setdefault(name, []).append((step, loss))
            if math.isfinite(loss):
                total, weight = self._means.get(name, (0.0, 0.0))
                self._means[name] = (
                    _SMOOTHING * total + (1 - _SMOOTHING) * loss,
                    _SMOOTHING * weight + (1 - _SMOOTHING),
                )


class _Clock:
    """Steps, tokens and seconds since the last line, without the time that validation takes."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.first = step, step
        self.started = self.drawn = time.monotonic()
        self._paused_at: float | None = None
        self.lap()

    def lap(self) -> None:
        self._lap_started, self._lap_step, self._paused = time.monotonic(), self.step, 0.0
        self._tokens: list[Tensor] = []
        self.drawn = self._lap_started

    def add(self, batch: Any) -> None:
        """Count a batch's tokens, on its device."""
        if isinstance(batch, Mapping):
            if isinstance(mask := batch.get("attention_mask"), Tensor):
                self._tokens.append(mask.sum())
            elif isinstance(ids := batch.get("input_ids"), Tensor):
                self._tokens.append(torch.tensor(ids.numel(), device=ids.device))

    def pause(self) -> None:
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        if self._paused_at is not None:
            self._paused += time.monotonic() - self._paused_at
            self._paused_at = None

    def time_to_draw(self, seconds: float) -> bool:
        """Whether so many seconds have passed since this was last true."""
        now = time.monotonic()
        if now - self.drawn < seconds:
            return False
        self.drawn = now
        return True

    def line(self, total: float) -> str:
        """``step 40/150  27%  1.20 s/step  2,560 tokens/s  eta 2:11``."""
        now = time.monotonic()
        passed = max(now - self._lap_started - self._paused, 1e-9)
        known = math.isfinite(total)
        parts = [f"step {self.step}/{int(total)}  {self.step / max(total, 1):.0%}" if known else f"step {self.step}"]
        if self.step > self._lap_step:
            parts.append(f"{passed / (self.step - self._lap_step):.2f} s/step")
        if self._tokens:
            parts.append(f"{int(torch.stack(self._tokens).sum()) / passed:,.0f} tokens/s")
        if known and self.step > self.first:
            parts.append(f"eta {_minutes((now - self.started) / (self.step - self.first) * (total - self.step))}")
        return "  ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _names(batch: Any) -> Iterable[str]:
    return dict.fromkeys(batch["adapters"]) if isinstance(batch, Mapping) and "adapters" in batch else ()


def _by_adapter(metrics: Mapping[str, Tensor], stage: str) -> dict[str, dict[str, float]]:
    """``val/sql/loss`` and so on, as ``{"sql": {"loss": ...}}``."""
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == stage:
            found.setdefault(parts[1], {})[parts[2]] = float(value)
    return found
