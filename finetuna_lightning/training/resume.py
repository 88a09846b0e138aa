"""What Lightning's own checkpoint lacks for a resume that is exact: random states, a validation that was due and
had not ended, the loader's position. (Gradients of an accumulation under way are with the optimizer's state.)"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from finetuna_lightning.training.loader import JointLoader

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
