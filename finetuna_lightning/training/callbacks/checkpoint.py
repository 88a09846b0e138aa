"""Keeps every adapter's best and last weights, by its own validation metric, as PEFT folders."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from finetuna_lightning.adapters import Adapter
from finetuna_lightning.errors import ConfigError, did_you_mean, one_of
from finetuna_lightning.files import replacing_folder
from finetuna_lightning.training.report import bank_of

MODES = ("min", "max")


class AdapterCheckpoint(Callback):
    """Writes ``<dirpath>/<adapter>/best`` and ``<dirpath>/<adapter>/last``.

    ``best`` after each validation in which the adapter's own ``val/<adapter>/<monitor>`` improved, whatever its company
    did; ``last`` after each validation, with every state of the trainer that is saved, at the end of the fit, and when
    the fit fails. An adapter that is never validated has, at the end of the fit, its last weights as its best. Every
    folder is in PEFT's format, written beside and renamed, so that a kill at any moment leaves a whole one of each. An
    adapter whose weights are not finite is not written.

    Args:
        dirpath: relative to the trainer's ``default_root_dir``, or absolute.
        monitor: the adapter's metric: ``loss``, ``perplexity``, ``accuracy``, ``f1``.
        mode: ``min`` or ``max``.
        save_last: keep ``last`` too.
        every_n_steps: write ``last`` also every so many optimizer steps.

    Example:
        >>> keep = AdapterCheckpoint("adapters", monitor="accuracy", mode="max")
    """

    def __init__(
        self,
        dirpath: str = "adapters",
        monitor: str = "loss",
        mode: str = "min",
        save_last: bool = True,
        every_n_steps: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(one_of("AdapterCheckpoint.mode", mode, MODES))
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps < 1):
            raise ConfigError(f"AdapterCheckpoint.every_n_steps must be None or an integer >= 1, not {every_n_steps!r}")
        self.dirpath, self.monitor, self.mode = dirpath, monitor, mode
        self.save_last, self.every_n_steps = save_last, every_n_steps
        self.best_scores: dict[str, float] = {}
        self._paths: dict[str, dict[str, str]] = {}
        self._validated: set[str] = set()
        self._last_at = -1  # the step of the newest ``last``
        self._training = False

    @property
    def state_key(self) -> str:
        """Callbacks that monitor different things keep states of their own in a Lightning checkpoint."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def paths(self) -> dict[str, dict[str, str]]:
        """By adapter, the folders written: ``{"sql": {"best": ".../sql/best", "last": ".../sql/last"}}``."""
        return {name: dict(kinds) for name, kinds in self._paths.items()}

    def folder(self, trainer: Trainer) -> Path:
        """Where the adapters' folders are."""
        return (Path(trainer.default_root_dir) / Path(self.dirpath).expanduser()).absolute()

    # ---- hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        self._training, self._last_at, self._validated = True, -1, set()
        bank = bank_of(pl_module, type(self).__name__)
        for name in list(self.best_scores):
            if name not in bank or not self._brought_along(trainer, name):
                del self.best_scores[name]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what improved."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        scores = self._scores(trainer, pl_module)
        if trainer.sanity_checking:
            return  # the metric's name is checked before the first step, and nothing more
        self._validated |= scores.keys()
        for name, score in scores.items():
            if self._improves(name, score) and self._save(trainer, pl_module, name, "best"):
                self.best_scores[name] = score
        self._save_last(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save ``last`` where it is due by the number of steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last weights; for an adapter that no validation met, the best too."""
        self._save_last(trainer, pl_module)
        for name in bank_of(pl_module, type(self).__name__):
            if name not in self._validated and name not in self.best_scores:
                self._save(trainer, pl_module, name, "best")
        self._training = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is missing of a run that was killed after its last step: resumed, it has nothing left to train."""
        if trainer.ckpt_path is not None and self._last_at == -1:
            self._save_last(trainer, pl_module)
            for name in bank_of(pl_module, type(self).__name__):
                known = name in self.best_scores and self._brought_along(trainer, name)
                if not known and not (self.folder(trainer) / name / "best").is_dir():
                    self._save(trainer, pl_module, name, "best")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save ``last``: the adapters beside a state of the trainer are then of its step, or, after a kill between the
        two, of a later one."""
        if self._training:
            self._save_last(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what was trained until then; a fault in doing so must not hide the first."""
        if self._training:
            self._training = False
            try:
                self._save_last(trainer, pl_module)
            except Exception as error:
                rank_zero_warn(f"AdapterCheckpoint: the last weights could not be saved: {error}")

    # ---- the Lightning checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """Best scores and folders, by adapter."""
        return {"best_scores": dict(self.best_scores), "paths": self.paths()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best scores of the run that is resumed."""
        self.best_scores = {name: float(score) for name, score in state_dict["best_scores"].items()}
        self._paths = {name: dict(kinds) for name, kinds in state_dict["paths"].items()}

    # ---- what the hooks do ----

    def _scores(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The monitored metric of each adapter that this validation met."""
        metrics = trainer.callback_metrics
        scores: dict[str, float] = {}
        for name in bank_of(pl_module, type(self).__name__):
            prefix = f"val/{name}/"
            logged = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
            if self.monitor in logged:
                scores[name] = float(metrics[prefix + self.monitor])
            elif logged:
                raise ConfigError(
                    f"AdapterCheckpoint monitors {self.monitor!r}, but of adapter {name!r} validation logs "
                    f"{', '.join(sorted(logged))}{did_you_mean(self.monitor, logged)}"
                )
        return scores

    def _improves(self, name: str, score: float) -> bool:
        best = self.best_scores.get(name)
        if math.isnan(score) or best is None:
            return not math.isnan(score)
        return score < best if self.mode == "min" else score > best

    def _save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_last and self._last_at != trainer.global_step:
            for name in bank_of(pl_module, type(self).__name__):
                self._save(trainer, pl_module, name, "last")
            self._last_at = trainer.global_step

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str, kind: str) -> bool:
        """Write one folder, on the first process; whether there is a new one."""
        adapter = bank_of(pl_module, type(self).__name__)[name]
        assert isinstance(adapter, Adapter)
        if not all(bool(parameter.isfinite().all()) for parameter in adapter.parameters()):
            rank_zero_warn(f"AdapterCheckpoint: adapter {name!r} holds NaN or infinity and is not saved as its {kind}")
            return False
        path = self.folder(trainer) / name / kind
        if trainer.is_global_zero:
            adapter.save_pretrained(path)
        self._paths.setdefault(name, {})[kind] = str(path)
        return True

    def _brought_along(self, trainer: Trainer, name: str) -> bool:
        """Have the best weights of a resumed run in this run's folder; False where they are gone."""
        target = self.folder(trainer) / name / "best"
        source = Path(self._paths.get(name, {}).get("best", target))
        if not source.is_dir():
            rank_zero_warn(f"AdapterCheckpoint: {source} is gone, so the best of {name!r} starts anew")
            return False
        if source != target and trainer.is_global_zero:
            with replacing_folder(target) as beside:
                shutil.copytree(source, beside, dirs_exist_ok=True)
        self._paths[name] = {"best": str(target)}
        return True
