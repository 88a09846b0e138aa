"""Keeps the trainer's state, so that a run that was killed, stopped or interrupted goes on where it was."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.files import keep_as
from finetuna_lightning.training.checkpoint_io import is_whole, newest_checkpoint

SIGTERM_CODE = 128 + signal.SIGTERM


class TrainerCheckpoint(ModelCheckpoint):
    """Writes ``<dirpath>/last.ckpt``, and keeps the state before as ``previous.ckpt``.

    A state is adapters, optimizer, schedules, loader positions, random states, and the gradients of an accumulation
    that is under way. It is written after the first step, then every so many steps or minutes, after each validation,
    at the end of the fit, and on SIGTERM and Ctrl-C. Each file is written beside, synced and renamed: a kill -9 at any
    moment leaves a whole one, and ``AdapterCheckpoint`` writes every adapter's ``last`` with each of them.

    On SIGTERM the batch that runs is finished (of a validation one batch; that validation runs again on resuming), the
    state is written and the process exits with 143; the signals that come meanwhile change nothing. The first Ctrl-C
    does the same with Lightning's exit code 1; the second stops at once, and the state written before stays.

    ``trainer.fit(..., ckpt_path="last")`` finds the newest state that can be loaded, or starts a new run where there is
    none. It is a ``ModelCheckpoint`` for that reason alone: it keeps no best; ``AdapterCheckpoint`` does.

    Args:
        dirpath: relative to the trainer's ``default_root_dir``, or absolute.
        every_n_steps: write every so many optimizer steps.
        every_minutes: write when so many minutes have passed since the last; on several processes not looked at.

    Example:
        >>> keep = TrainerCheckpoint("checkpoints", every_minutes=10)
    """

    def __init__(
        self,
        dirpath: str = "checkpoints",
        every_n_steps: int | None = None,
        every_minutes: float | None = 5.0,
    ) -> None:
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps < 1):
            raise ConfigError(f"TrainerCheckpoint.every_n_steps must be None or an integer >= 1, not {every_n_steps!r}")
        if every_minutes is not None and not every_minutes > 0:
            raise ConfigError(f"TrainerCheckpoint.every_minutes must be None or above 0, not {every_minutes!r}")
        super().__init__(save_last=True, save_top_k=0)
        self.place, self.every_n_steps, self.every_minutes = dirpath, every_n_steps, every_minutes
        self._saved_at: tuple[int, int, bool] | None = None
        self._saved_time = 0.0
        self._stepped_at = -1  # the step at the newest batch's end
        self._fitting = False
        self._trusted = False  # whether last.ckpt is known to be whole
        self._interrupted = False
        self._handler: Any = None

    @property
    def state_key(self) -> str:
        """One state for whatever settings: there is nothing in it."""
        return type(self).__qualname__

    def folder(self, trainer: Trainer) -> Path:
        """Where the states are."""
        return (Path(trainer.default_root_dir) / Path(self.place).expanduser()).absolute()

    # ---- Lightning's ckpt_path="last" ----

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        newest = newest_checkpoint(self.folder(trainer))
        return set() if newest is None else {str(newest)}

    # ---- hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where to write."""
        self.dirpath = str(self.folder(trainer))
        self._saved_at, self._interrupted = None, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save, and Ctrl-C waits for the end of a batch."""
        there = None if trainer.ckpt_path or self._trusted else newest_checkpoint(self.folder(trainer))
        if there is not None:
            rank_zero_warn(
                f"TrainerCheckpoint: {there} is the state of another run, which this one will replace; to go on with "
                "it pass ckpt_path='last'"
            )
        self._fitting, self._saved_time, self._stepped_at = True, time.monotonic(), trainer.global_step
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._on_sigint)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due; stop where that was asked for."""
        stepped, self._stepped_at = trainer.global_step != self._stepped_at, trainer.global_step
        if (stepped and self._is_due(trainer)) or self._is_stopping(trainer):
            self._save(trainer)
        if not _is_finished(trainer):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was told to stop does not begin to validate."""
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Nor does it go on."""
        self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was validated, with the best scores that came of it."""
        if self._fitting and not trainer.sanity_checking:
            self._save(trainer)
            if not _is_finished(trainer):
                self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: an epoch is a cut in an endless stream."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state."""
        self._save(trainer)
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if the fit stopped where a step had ended; a failure in the middle of one leaves the state before."""
        if self._fitting and isinstance(exception, SIGTERMException | _Interrupt):
            try:
                self._save(trainer)
            except Exception as error:
                rank_zero_warn(f"TrainerCheckpoint: the trainer's state could not be saved: {error}")
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = SIGTERM_CODE
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        self._end()

    # ---- the Lightning checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder is all that there is to know."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    # ---- what the hooks do ----

    def _is_due(self, trainer: Trainer) -> bool:
        if self._saved_at is None:
            return True  # so that a folder that cannot be written is found with the first step
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        minutes = self.every_minutes if trainer.world_size == 1 else None  # clocks differ, and all must save together
        return minutes is not None and time.monotonic() - self._saved_time >= 60 * minutes

    def _save(self, trainer: Trainer) -> None:
        """Write the state, if it is not that of the newest file, and keep that one."""
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        now = (trainer.global_step, progress.completed, trainer.validating)
        if now == self._saved_at or getattr(trainer, "fast_dev_run", False):
            return
        folder = self.folder(trainer)
        last = folder / "last.ckpt"
        if trainer.is_global_zero and last.exists() and (self._trusted or is_whole(last)):
            keep_as(last, folder / "previous.ckpt")
        trainer.save_checkpoint(last, weights_only=False)
        self._trusted, self._saved_at, self._saved_time = True, now, time.monotonic()
        self.last_model_path = str(last)

    def _is_stopping(self, trainer: Trainer) -> bool:
        """Whether a signal asked for the end. On several processes Lightning sees to it that all stop together."""
        return trainer.world_size == 1 and (trainer.received_sigterm or self._interrupted)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._fitting and trainer.state.fn == TrainerFn.FITTING and self._is_stopping(trainer):
            raise SIGTERMException if trainer.received_sigterm else _Interrupt

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            signal.default_int_handler(signum, frame)
        self._interrupted = True
        rank_zero_info("Ctrl-C: stopping after this batch; once more stops at once, without saving")

    def _end(self) -> None:
        self._fitting = False
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._on_sigint:
            signal.signal(signal.SIGINT, self._handler)
        self._handler = None


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C, at the end of a batch."""


def _is_finished(trainer: Trainer) -> bool:
    """Whether the fit ends with this step by itself, so that there is nothing to stop."""
    return trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)
