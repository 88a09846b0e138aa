"""The trainer's state: when it is written, what signals do, and what ckpt_path="last" finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.trainer_state import TrainerCheckpoint
from tests.resilience.runs import Diary, data_of, differences, module_of, state_of, trainer_of

NAMES = ["sql", "chat"]


def fit(folder: Path, *callbacks: Callback, ckpt: str | None = None, **options: Any) -> Trainer:
    trainer = trainer_of(folder / "run", *callbacks, **options)
    trainer.fit(module_of(folder, NAMES), datamodule=data_of(folder, NAMES), ckpt_path=ckpt)
    return trainer


def step_of(folder: Path, name: str = "last") -> int:
    return int(torch.load(folder / f"run/checkpoints/{name}.ckpt", weights_only=True)["global_step"])


class At(Callback):
    """Do something in a hook when so many batches have begun."""

    def __init__(self, hook: str, batch: int, action: Callable[[], Any]) -> None:
        def act(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.fit_loop.total_batch_idx == batch and not self.done:
                self.done = True
                action()

        self.done = False
        setattr(self, hook, act)


class Written(TrainerCheckpoint):
    """Notes the step of each state that it writes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps: list[int] = []

    def _save(self, trainer: Trainer) -> None:
        before = self._saved_at
        super()._save(trainer)
        if self._saved_at != before:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_minutes": None}, [1, 6]),  # the first, and the last
        ({"every_minutes": None, "every_n_steps": 2}, [1, 2, 4, 6, 6]),  # the end of a fit is a state of its own
        ({"every_minutes": 1e-9}, [1, 2, 3, 4, 5, 6, 6]),
        ({"every_minutes": 60.0}, [1, 6]),
    ],
)
def test_when_it_is_written(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    keep = Written(**options)
    fit(tmp_path, keep, max_steps=6, limit_val_batches=0)
    assert keep.steps == steps


def test_it_is_written_after_each_validation(tmp_path: Path) -> None:
    keep = Written(every_minutes=None)
    fit(tmp_path, keep, max_steps=5, val_check_interval=4)
    assert keep.steps == [1, 2, 4, 5]


def test_the_state_before_is_kept_and_nothing_else(tmp_path: Path) -> None:
    fit(tmp_path, TrainerCheckpoint(every_n_steps=1), max_steps=3, limit_val_batches=0)
    assert sorted(item.name for item in (tmp_path / "run/checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    trainer = fit(tmp_path, TrainerCheckpoint(every_n_steps=2, every_minutes=None), ckpt="last", max_steps=5,
                  limit_val_batches=0)  # fmt: skip
    assert trainer.global_step == 5
    assert (step_of(tmp_path), step_of(tmp_path, "previous")) == (5, 4)


def test_the_adapters_beside_a_state_are_of_its_step(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    class Look(TrainerCheckpoint):
        def _save(self, trainer: Trainer) -> None:
            super()._save(trainer)
            steps.append((trainer.global_step, adapters._last_at))

    adapters = AdapterCheckpoint()
    fit(tmp_path, adapters, Look(every_n_steps=1), max_steps=3, limit_val_batches=0)
    assert steps and all(mine == theirs for mine, theirs in steps)
    assert (tmp_path / "run/adapters/sql/last").is_dir()


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


HOOKS = {"in a batch": "on_before_zero_grad", "before a validation": "on_validation_start",
         "in a validation": "on_validation_batch_start"}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Diary]:
    """The end and the diary of a run to which no signal comes."""
    whole = Diary()
    return state_of(fit(tmp_path_factory.mktemp("whole"), whole, max_steps=6)), whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", HOOKS)
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(
    tmp_path: Path, uninterrupted: tuple[dict[str, Any], Diary], where: str, number: int
) -> None:
    """In the middle of an accumulation or of a validation, with the batch and validation losses to come."""
    end, whole = uninterrupted
    batch = 4 if where != "in a batch" else 6
    first, before = TrainerCheckpoint(every_minutes=None), signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, Diary(), At(HOOKS[where], batch, kill(number)), first, max_steps=6)
    assert caught.value.code == (143 if number == signal.SIGTERM else 1)
    assert isinstance(caught.value, SIGTERMException) == (number == signal.SIGTERM)
    assert signal.getsignal(number) is before
    assert step_of(tmp_path) == batch // 2
    again = Diary()
    assert differences(state_of(fit(tmp_path, again, TrainerCheckpoint(), ckpt="last", max_steps=6)), end) == []
    assert again.train == {at: loss for at, loss in whole.train.items() if at[0] > batch}
    assert again.val == {at: loss for at, loss in whole.val.items() if at[0] >= batch}


def test_the_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path: Path) -> None:
    twice = At("on_before_zero_grad", 6, lambda: [kill(signal.SIGINT)() for _ in range(2)])
    with pytest.raises(SystemExit):
        fit(tmp_path, twice, TrainerCheckpoint(every_minutes=None), max_steps=6)
    assert step_of(tmp_path) == 2  # of the validation after batch 4


def test_a_second_sigterm_while_saving_does_no_harm(tmp_path: Path) -> None:
    class Slow(TrainerCheckpoint):
        def _save(self, trainer: Trainer) -> None:
            if trainer.received_sigterm:
                kill(signal.SIGTERM)()
            super()._save(trainer)
            if trainer.received_sigterm:
                kill(signal.SIGTERM)()

    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, At("on_before_zero_grad", 6, kill(signal.SIGTERM)), Slow(every_minutes=None), max_steps=6)
    assert (caught.value.code, step_of(tmp_path)) == (143, 3)


def test_an_error_in_a_step_leaves_the_state_before(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, At("on_before_zero_grad", 6, fail), TrainerCheckpoint(every_minutes=None), max_steps=6)
    assert step_of(tmp_path) == 2


def test_a_handler_of_the_user_s_stays(tmp_path: Path) -> None:
    def own(*_: Any) -> None:
        pass

    seen: list[Any] = []
    before = signal.signal(signal.SIGINT, own)
    try:
        look = At("on_before_zero_grad", 0, lambda: seen.append(signal.getsignal(signal.SIGINT)))
        fit(tmp_path, look, TrainerCheckpoint(), max_steps=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [own]


# ---- ckpt_path="last" -----------------------------------------------------------------------------------------------


def test_last_is_the_newest_that_can_be_loaded(tmp_path: Path) -> None:
    fit(tmp_path, TrainerCheckpoint(every_n_steps=1), max_steps=3, limit_val_batches=0)
    last = tmp_path / "run/checkpoints/last.ckpt"
    previous = step_of(tmp_path, "previous")
    last.write_bytes(last.read_bytes()[:5000])
    keep = Written(every_minutes=None)
    trainer = fit(tmp_path, keep, ckpt="last", max_steps=6)
    assert trainer.ckpt_path == str(last.with_name("previous.ckpt"))
    assert keep.steps[0] == previous + 1


def test_a_damaged_last_does_not_take_the_place_of_the_good_one(tmp_path: Path) -> None:
    """Killed while it then writes its first state, the run must still have the good one."""
    fit(tmp_path, TrainerCheckpoint(every_n_steps=1), max_steps=3, limit_val_batches=0)
    last = tmp_path / "run/checkpoints/last.ckpt"
    good = last.with_name("previous.ckpt").read_bytes()
    last.write_bytes(b"half")
    kept: list[bytes] = []

    class Look(TrainerCheckpoint):
        def on_save_checkpoint(self, *_: Any) -> None:
            kept.append(last.with_name("previous.ckpt").read_bytes())

    fit(tmp_path, Look(every_minutes=None), ckpt="last", max_steps=6, limit_val_batches=0)
    assert kept[0] == good


def test_without_a_state_last_starts_a_new_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        trainer = fit(tmp_path, TrainerCheckpoint(), ckpt="last", max_steps=2)
    assert trainer.global_step == 2


def test_a_new_run_says_that_it_will_replace_another_s_state(tmp_path: Path) -> None:
    fit(tmp_path, TrainerCheckpoint(), max_steps=1)
    with pytest.warns(UserWarning, match=r"last\.ckpt is the state of another run.*pass ckpt_path='last'"):
        fit(tmp_path, TrainerCheckpoint(), max_steps=1)


def test_a_run_killed_after_its_last_step_gets_its_folders_when_it_is_resumed(tmp_path: Path) -> None:
    """Then there is nothing left to train, and Lightning leaves the loop out."""
    trainer = fit(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fit(tmp_path, AdapterCheckpoint(), ckpt=str(tmp_path / "end.ckpt"), max_steps=2, limit_val_batches=0)
    for name in NAMES:
        for kind in ("best", "last"):
            assert (tmp_path / "run/adapters" / name / kind / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": True}, {"every_minutes": 0}])
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"TrainerCheckpoint\.every_"):
        TrainerCheckpoint(**options)
