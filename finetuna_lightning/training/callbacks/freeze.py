"""Keeps the shared backbone frozen through a fit, and proves it at the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from finetuna_lightning.backbone import fingerprints, quantized_layers
from finetuna_lightning.errors import ConfigError, FrozenWeightError
from finetuna_lightning.ops import reference

_NAMED = 5  # changed modules that an error names


class FreezeQuantizedWeights(Callback):
    """Freezes the backbone when a fit starts, and raises at its end if one code, scale or other weight of it changed.

    The backbone is quantised before any callback's ``on_fit_start`` (in ``configure_model``, or by the plugin), so the
    fingerprints taken there are of what is trained over. ``on_fit_end`` is the last hook of a fit that did not fail;
    what is raised in it leaves ``Trainer.fit``.

    Args:
        check_every_n_steps: compare the fingerprints during training too, every so many optimizer steps; 0: at the end
            only. Whether a parameter was thawed is looked up at every training epoch and validation in any case.

    Raises:
        FrozenWeightError: naming what changed, what was thawed, or what an optimizer would change.
    """

    def __init__(self, check_every_n_steps: int = 0) -> None:
        if isinstance(check_every_n_steps, bool) or not isinstance(check_every_n_steps, int) or check_every_n_steps < 0:
            raise ConfigError(f"check_every_n_steps must be an integer >= 0, not {check_every_n_steps!r}")
        self.check_every_n_steps = check_every_n_steps
        self._marks: dict[str, str] = {}
        self._checked_at = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, and take the fingerprints."""
        backbone = _backbone(pl_module)
        backbone.requires_grad_(False)
        if not quantized_layers(backbone):
            rank_zero_warn(
                f"FreezeQuantizedWeights: the backbone ({type(backbone).__name__}) has no 8-bit layer, so it is "
                "frozen as it is: use Trainer(plugins=[EightBitPrecision()]), or a BackboneConfig whose scheme is not "
                "'none'"
            )
        _raise_if(_thawed(trainer, backbone))
        self._marks = _fingerprints(backbone)
        self._checked_at = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for thawed parameters."""
        _raise_if(_thawed(trainer, _backbone(pl_module)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for thawed parameters, when validation is part of a fit."""
        if self._marks:
            _raise_if(_thawed(trainer, _backbone(pl_module)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the fingerprints, where that was asked for."""
        if self.check_every_n_steps and trainer.global_step >= self._checked_at + self.check_every_n_steps:
            self._checked_at = trainer.global_step
            self._verify(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the fingerprints for the last time, and say that nothing changed."""
        self._verify(trainer, pl_module)
        self._marks = {}
        backbone = _backbone(pl_module)
        matrices = quantized_layers(backbone).values()
        others = list(backbone.parameters())
        held = sum(q.codes.nbytes + q.scale.nbytes for q in matrices) + sum(p.nbytes for p in others)
        rank_zero_info(
            f"FreezeQuantizedWeights: {len(matrices)} 8-bit matrices and {len(others)} other frozen tensors unchanged "
            f"({held:,} bytes)"
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A fit that failed is not verified."""
        self._marks = {}

    def _verify(self, trainer: Trainer, pl_module: LightningModule) -> None:
        backbone = _backbone(pl_module)
        now = _fingerprints(backbone)
        changed = [name for name in {**self._marks, **now} if self._marks.get(name) != now.get(name)]
        faults = _thawed(trainer, backbone)
        if changed:
            faults.insert(0, f"{_listed(changed)} changed since the fit started")
        _raise_if(faults)


def _backbone(module: LightningModule) -> nn.Module:
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            f"FreezeQuantizedWeights freezes module.backbone, but {type(module).__name__} has none: name it so, or use "
            "MultiAdapterModule"
        )
    return backbone


def _fingerprints(backbone: nn.Module) -> dict[str, str]:
    """Of every 8-bit matrix by the path of its module, and of every other parameter by its name."""
    others = {name: f"{reference.fingerprint(p.reshape(-1)):016x}" for name, p in backbone.named_parameters()}
    return fingerprints(backbone) | others


def _thawed(trainer: Trainer, backbone: nn.Module) -> list[str]:
    """What is wrong with the backbone's parameters: thawed, or in an optimizer."""
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    thawed = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    optimised = [
        names[id(parameter)]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    ]
    faults = [f"{_listed(thawed)} thawed (requires_grad is True)"] if thawed else []
    return faults + ([f"{_listed(optimised)} in an optimizer's parameter group"] if optimised else [])


def _listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _raise_if(faults: list[str]) -> None:
    if faults:
        raise FrozenWeightError(
            f"the frozen backbone was touched: {'; '.join(faults)}. Every adapter stands on these weights, so "
            "they must stay as loaded; to train a module in full, name it in an adapter's plain_modules"
        )
