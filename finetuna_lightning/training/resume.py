"""What Lightning's own checkpoint lacks for a resume that is exact: gradients of an accumulation that is under way,
random states, a validation that was due and had not ended, and optimizer state by adapter name."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from finetuna_lightning.errors import CheckpointError
from finetuna_lightning.training.loader import JointLoader

# ---- gradients ------------------------------------------------------------------------------------------------------


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the newest batch ended without an optimizer step, so that its gradients are still wanted."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop.epoch_loop._should_accumulate()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of ``module`` by parameter name, of those that have one."""
    return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def put_gradients(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the parameters that ``saved`` names their gradients back; one that is gone is passed over."""
    for name, parameter in module.named_parameters():
        if name in saved:
            parameter.grad = saved[name].to(parameter.device, parameter.dtype).clone()


# ---- random states --------------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states of Python's and torch's global generators, as tensors and plain values.

    The package's own streams do not read them; a dropout layer inside a module that is trained in full, or a loss of
    the user's, may."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Undo what was drawn since ``random_states``. States of devices that are not here are passed over."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count() if torch.cuda.is_available() else 0]):
        torch.cuda.set_rng_state(state.cpu(), device)


# ---- the loader -----------------------------------------------------------------------------------------------------


def load_positions(trainer: Trainer) -> None:
    """Give the joint loader its positions, where Lightning has not: asked how many steps there will be, it sets the
    loader up before it has read the checkpoint's, and after a finished epoch it does not read them at all. The loader's
    iterators stand still until the first batch, so this is in time."""
    loop = trainer.fit_loop
    states = loop._combined_loader_states_to_load
    if states and loop._combined_loader is not None and isinstance(trainer.train_dataloader, JointLoader):
        loop._combined_loader._load_state_dicts(states)
        loop._combined_loader_states_to_load = []


# ---- validation -----------------------------------------------------------------------------------------------------


def repeat_unfinished_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Have a run that is resumed from ``checkpoint`` begin with the validation that was due at its step, if that had
    not ended: Lightning alone would leave it out, and an adapter could miss its best weights.

    Lightning goes back to a validation whose progress says that a batch was begun and not finished; none is counted as
    done, since the sums of the metrics are not saved.
    """
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    loop = trainer.fit_loop.epoch_loop
    train: Any = loop.batch_progress
    val: Any = loop.val_loop.batch_progress
    running = trainer.validating and not (val.is_last_batch and val.current.completed == val.current.ready)
    batch_ends = trainer.training and train.current.completed == train.current.processed - 1
    fetcher = trainer.fit_loop._data_fetcher
    due = batch_ends and fetcher is not None and loop._should_check_val_fx(fetcher)
    if not running and not due:
        return
    loops = checkpoint["loops"]["fit_loop"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress = loops["epoch_loop.val_loop.batch_progress"]
    progress.update(total=dict(begun), current=dict(begun), is_last_batch=False)
    if due:  # on_train_batch_end: the batch itself is done
        for part in ("total", "current"):
            counts = loops["epoch_loop.batch_progress"][part]
            counts["completed"] = counts["processed"]


def leave_finished_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Have a run that is resumed from ``checkpoint``, which was saved in ``on_train_epoch_end`` or at the end of a fit,
    begin with the next epoch. Where ``max_steps`` counts, Lightning takes the epoch for unfinished and trains one batch
    too many in it; a state saved at the end of the epoch's last batch it reads rightly, so it is given that."""
    if trainer.state.fn != TrainerFn.FITTING or trainer.max_steps == -1 or trainer.validating:
        return
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress
    ended = epoch.processed == epoch.ready and batch.current.completed == batch.current.processed
    if not ended or not batch.is_last_batch:
        return
    loops = checkpoint["loops"]["fit_loop"]
    for part in ("total", "current"):
        loops["epoch_progress"][part]["processed"] -= 1
        loops["epoch_progress"][part]["completed"] = loops["epoch_progress"][part]["processed"]
        loops["epoch_loop.batch_progress"][part]["completed"] -= 1


# ---- optimizer and schedule by name ---------------------------------------------------------------------------------
# Torch keeps both by position. An optimizer whose own state goes by adapter name makes this part superfluous.


def group_names(optimizer_state: Mapping[str, Any]) -> list[str]:
    """The adapters of a saved optimizer, in the order of its groups."""
    return [str(group.get("name")) for group in optimizer_state["param_groups"]]


def optimizer_state_by_name(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """``fresh``, an optimizer's ``state_dict`` of the adapters that are here now, with the group and the moments of
    every adapter that is in ``saved`` too.

    Raises:
        CheckpointError: for an adapter that has another number of parameters than in ``saved``.
    """
    theirs = dict(zip(group_names(saved), saved["param_groups"], strict=True))
    groups, state = [], {}
    for group in fresh["param_groups"]:
        old = theirs.get(group["name"])
        if old is None:
            groups.append(group)
            continue
        if len(old["params"]) != len(group["params"]):
            raise CheckpointError(
                f"adapter {group['name']!r} has {len(group['params'])} parameters, in the checkpoint "
                f"{len(old['params'])}: its target_modules, plain_modules or bias changed"
            )
        groups.append({**old, "params": group["params"]})
        for mine, its in zip(group["params"], old["params"], strict=True):
            if its in saved["state"]:
                state[mine] = saved["state"][its]
    return {**saved, "state": state, "param_groups": groups}


def scheduler_state_by_name(
    saved: Mapping[str, Any], theirs: Sequence[str], fresh: Mapping[str, float]
) -> dict[str, Any]:
    """A ``LambdaLR``'s state for the adapters of ``fresh`` (learning rates by name), from that of ``theirs``."""
    rates = {key: dict(zip(theirs, saved[key], strict=True)) for key in ("base_lrs", "_last_lr")}
    lists: dict[str, Any] = {key: [values.get(name, lr) for name, lr in fresh.items()] for key, values in rates.items()}
    return {**saved, **lists, "lr_lambdas": [None] * len(fresh)}
