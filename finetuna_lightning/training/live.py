"""Who trains, while a fit runs: adapters that are done, stopped or in quarantine leave the batches; others join the
bank or leave it. What is done to one adapter touches nothing of another."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

from finetuna_lightning.adapters import Adapter
from finetuna_lightning.configs import AdapterConfig, DataConfig, as_config, check_adapter_names
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.metrics import AdapterMetrics
from finetuna_lightning.training.optim import Turn, adapter_optimizer, adapter_turn, check_optimizer

Module = Any  # MultiAdapterModule, which stands above this file


def total_steps(trainer: Trainer) -> float:
    """Joint steps of the whole fit; infinite where nothing bounds it."""
    total = float(trainer.estimated_stepping_batches)
    return math.inf if total < 0 else total


def warn_of_joint_accumulation(module: Module) -> None:
    """Say so where ``Trainer(accumulate_grad_batches)`` makes steps depend on the company: Lightning steps early at the
    end of every pass, and how long a pass is depends on the longest adapter."""
    trainer: Trainer = module.trainer
    size, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if size > 1 and math.isfinite(batches) and batches % size and len(module.adapters) > 1:
        rank_zero_info(
            f"a pass has {batches} batches, no multiple of accumulate_grad_batches={size}, so that Lightning steps "
            f"early at its end: for steps that do not depend on the company set accumulate={size} in AdapterConfig"
        )


# ---- leaving the batches ---------------------------------------------------------------------------------------------


def retire(module: Module) -> None:
    """Take out of the batches whoever has done its ``max_steps``, was stopped or is in quarantine, and take back who no
    longer is; when nobody is left, end the fit."""
    optimizer, loader = module.optimizer, module.trainer.train_dataloader
    done = set()
    turns = {name: optimizer.turns[name] for name in module.adapters if name in optimizer.turns}
    for name, turn in turns.items():
        limit = module.config_of(name).max_steps
        if turn.quarantined or name in module.stopped or (limit is not None and turn.steps >= limit):
            done.add(name)
        if turn.quarantined and name not in module.retired:
            rank_zero_info(f"adapter {name!r} is {_quarantine(turn)}; the others go on")
    for changed, what in ((done, "retire"), (module.retired - done, "reinstate")):
        for name in sorted(changed):
            if hasattr(loader, what):
                getattr(loader, what)(name)
    for name in done - module.retired:
        optimizer.drop(name)
    module.retired = done
    if done >= set(turns):
        module.trainer.should_stop = True


def _quarantine(turn: Turn) -> str:
    return (
        f"in quarantine, with its weights of step {turn.steps}: its loss or gradient was not finite "
        f"{turn.in_a_row} times in a row"
    )


def report(module: Module) -> dict[str, dict[str, Any]]:
    """By adapter: ``steps``, ``skipped`` and, in words, its ``state``."""
    rows: dict[str, dict[str, Any]] = {}
    optimizer = module.optimizer
    optimizer.settle()
    for name in module.adapters:
        if name not in optimizer.turns:  # put into the bank by hand, during the fit
            continue
        turn = optimizer.turns[name]
        limit = module.config_of(name).max_steps
        if turn.quarantined:
            state = _quarantine(turn)
        elif name in module.stopped:
            state = module.stopped[name]
        else:
            state = "done" if limit is not None and turn.steps >= limit else "trained to the end"
        rows[name] = {"steps": turn.steps, "skipped": turn.skipped, "state": state}
    return rows


# ---- joining and leaving the bank ------------------------------------------------------------------------------------


def adopt(module: Module, name: str) -> None:
    """Give an adapter that was put into the bank by hand a configuration, and metrics."""
    module._known(name)
    adapter: Adapter = module.adapters[name]
    config = AdapterConfig(
        rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, bias=adapter.bias, seed=adapter.seed,
        target_modules=adapter.target_modules, plain_modules=adapter.plain_modules,
    )  # fmt: skip
    _register(module, name, config)
    _measure(module, name)


def join(module: Module, name: str, config: AdapterConfig, data: DataConfig | None) -> Adapter:
    """See ``MultiAdapterModule.add_adapter``."""
    config = as_config(AdapterConfig, config, f"adapter {name!r}")
    check_optimizer(name, config, module.optim_config)
    check_adapter_names([*module.adapters, name])
    trainer = _running(module)
    source: Any = getattr(trainer, "datamodule", None)
    if (data is not None) != isinstance(source, AdapterDataModule):
        raise ConfigError(
            f"adapter {name!r} joins a fit with an AdapterDataModule, so it needs data=DataConfig(...)"
            if data is None
            else f"adapter {name!r} was given data, but there is no fit with an AdapterDataModule to take it"
        )
    _register(module, name, config)
    try:
        adapter: Adapter = module.attach(module.adapters, name)
        try:
            if data is not None:
                source.join(name, data, module.backbone_info())
        except Exception:
            module.adapters.remove(name)
            raise
    except Exception:
        _forget(module, name)
        raise
    module.train(module.training)
    _measure(module, name)
    if trainer is not None:
        left = total_steps(trainer) - trainer.global_step
        optimizer = adapter_optimizer(name, adapter.parameters(), config, module.optim_config)
        module.optimizer.add(name, optimizer, adapter_turn(config, left))
        _renew_validation(trainer)
    return adapter


def leave(module: Module, name: str) -> Adapter:
    """See ``MultiAdapterModule.remove_adapter``."""
    if len(module.adapters) == 1:
        raise ConfigError(f"adapter {name!r} is the last one: a module needs one")
    trainer = _running(module)
    adapter: Adapter = module.adapters.remove(name)
    _forget(module, name)
    if name in module.val_metrics:
        del module.val_metrics[name]
    module.stopped.pop(name, None)
    module.retired.discard(name)
    if trainer is not None:
        module.optimizer.remove(name)
        source: Any = getattr(trainer, "datamodule", None)
        if not isinstance(source, AdapterDataModule):
            source = trainer.train_dataloader
        if hasattr(source, "leave"):
            source.leave(name)
        _renew_validation(trainer)
        retire(module)
    return adapter


def _running(module: Module) -> Trainer | None:
    """The trainer of a fit that runs.

    Raises:
        ConfigError: when it has several processes, each of which knows the parameters that there were.
    """
    trainer: Trainer | None = module._trainer
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.state.status != TrainerStatus.RUNNING:
        return None
    if trainer.world_size > 1:
        raise ConfigError(f"adapters join and leave a fit of one process, not of {trainer.world_size}")
    return trainer


def _register(module: Module, name: str, config: AdapterConfig) -> None:
    module.adapter_configs[name] = config
    module.hparams["adapters"][name] = asdict(config)  # a checkpoint rebuilds the module from these


def _forget(module: Module, name: str) -> None:
    module.adapter_configs.pop(name, None)
    module.hparams["adapters"].pop(name, None)


def _measure(module: Module, name: str) -> None:
    metrics = AdapterMetrics(module.task, module.backbone_info().num_labels)
    module.val_metrics[name] = metrics.to(module.device)


def _renew_validation(trainer: Trainer) -> None:
    """Have the validation loader made anew, for who is there now; Lightning keeps the one of the fit's start."""
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None
