"""Stops every adapter by itself, when its own validation metric no longer improves."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from finetuna_lightning.errors import ConfigError, did_you_mean, one_of
from finetuna_lightning.training.module import MultiAdapterModule

MODES = ("min", "max")


class AdapterEarlyStopping(Callback):
    """Takes an adapter out of the training once its ``val/<adapter>/<monitor>`` has not improved for ``patience``
    validations in a row. The others do not notice; the fit ends with the last. ``AdapterCheckpoint`` has its best.

    Args:
        monitor: the adapter's metric: ``loss``, ``perplexity``, ``accuracy``, ``f1``.
        patience: validations without improvement after which an adapter stops.
        min_delta: a change smaller than this is none.
        mode: ``min`` or ``max``.

    Attributes:
        stopped: by adapter, why and when.

    Example:
        >>> stop = AdapterEarlyStopping(monitor="accuracy", patience=3, mode="max")
    """

    def __init__(self, monitor: str = "loss", patience: int = 3, min_delta: float = 0.0, mode: str = "min") -> None:
        if mode not in MODES:
            raise ConfigError(one_of("AdapterEarlyStopping.mode", mode, MODES))
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"AdapterEarlyStopping.patience must be an integer >= 1, not {patience!r}")
        if not min_delta >= 0:
            raise ConfigError(f"AdapterEarlyStopping.min_delta must be a number >= 0, not {min_delta!r}")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, mode
        self.stopped: dict[str, str] = {}
        self._best: dict[str, float] = {}
        self._waited: dict[str, int] = {}

    @property
    def state_key(self) -> str:
        """Callbacks that monitor different things keep states of their own in a Lightning checkpoint."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    # ---- hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit starts anew, unless it goes on from a checkpoint, which is loaded after this."""
        if stage == TrainerFn.FITTING:
            _module(pl_module)
            self.stopped, self._best, self._waited = {}, {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume: who has stopped stays out."""
        module = _module(pl_module)
        for name, reason in self.stopped.items():
            if name in module.adapters:
                module.stop_adapter(name, reason)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at every adapter that still trains."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = _module(pl_module)
        for name in module.adapter_names:
            score = self._score(trainer, name)
            if score is None or trainer.sanity_checking or name in module.retired:
                continue
            if self._improves(name, score):
                self._best[name], self._waited[name] = score, 0
                continue
            self._waited[name] = self._waited.get(name, 0) + 1
            if self._waited[name] >= self.patience:
                self._stop(trainer, module, name)

    # ---- the Lightning checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """By adapter: the best score, the validations since, and who has stopped."""
        return {"best": dict(self._best), "waited": dict(self._waited), "stopped": dict(self.stopped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the run that is resumed would have."""
        self._best, self._waited = dict(state_dict["best"]), dict(state_dict["waited"])
        self.stopped = dict(state_dict["stopped"])

    # ---- what the hooks do ----

    def _score(self, trainer: Trainer, name: str) -> float | None:
        prefix, metrics = f"val/{name}/", trainer.callback_metrics
        logged = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
        if logged and self.monitor not in logged:
            raise ConfigError(
                f"AdapterEarlyStopping monitors {self.monitor!r}, but of adapter {name!r} validation logs "
                f"{', '.join(sorted(logged))}{did_you_mean(self.monitor, logged)}"
            )
        return float(metrics[prefix + self.monitor]) if logged else None

    def _improves(self, name: str, score: float) -> bool:
        best = self._best.get(name)
        if math.isnan(score) or best is None:
            return not math.isnan(score)
        return score < best - self.min_delta if self.mode == "min" else score > best + self.min_delta

    def _stop(self, trainer: Trainer, module: MultiAdapterModule, name: str) -> None:
        best = f"{self._best[name]:.4g}" if name in self._best else "none"
        reason = (
            f"stopped early at step {trainer.global_step}: {self.patience} validations without a better "
            f"{self.monitor} than {best}"
        )
        self.stopped[name] = reason
        rank_zero_info(f"adapter {name!r} {reason}")
        module.stop_adapter(name, reason)


def _module(module: LightningModule) -> MultiAdapterModule:
    if not isinstance(module, MultiAdapterModule):
        raise ConfigError(f"AdapterEarlyStopping needs a MultiAdapterModule, not {type(module).__name__}")
    return module
