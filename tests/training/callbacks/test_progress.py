"""Each adapter's loss, as it trains: in lines, on a terminal, and in the history."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.callbacks.progress import AdapterProgress
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit, tiny_module

ADAPTERS: dict[str, dict[str, Any]] = {"sql": {"rank": 4, "lr": 1e-2}, "legal": {"rank": 2, "lr": 1e-2}}
NAMES = list(ADAPTERS)


@pytest.fixture
def module(tmp_path: Path) -> MultiAdapterModule:
    return tiny_module(tmp_path, ADAPTERS)


class Losses(Callback):
    """What training logged, read at once."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {name: [] for name in NAMES}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in batch["adapters"]:
            self.seen[name].append(float(trainer.callback_metrics[f"train/{name}/loss"]))


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def test_a_log_file_gets_about_twenty_lines(module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_fit(module, tiny_batches(NAMES, 50, rows=1, length=4), AdapterProgress())
    shown = lines(capsys.readouterr().out)
    assert len(shown) == 17
    number = r"[\d,]+"
    pattern = rf"step 3/50  6%  \d+\.\d\d s/step  {number} tokens/s  eta \d+:\d\d  sql \d\.\d{{3}}  legal \d\.\d{{3}}"
    assert re.fullmatch(pattern, shown[0])
    assert shown[-1].startswith("step 50/50  100%")
    assert "eta 0:00" in shown[-1]


def test_the_interval_can_be_chosen(module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_fit(module, tiny_batches(NAMES, 7), AdapterProgress(every_n_steps=3))
    assert [line.split("/")[0] for line in lines(capsys.readouterr().out)] == ["step 3", "step 6", "step 7"]


def test_a_run_that_stops_early_has_a_last_line(module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    tiny_fit(module, tiny_batches(NAMES, 9), AdapterProgress(every_n_steps=3), Stop())
    assert [line.split("/")[0] for line in lines(capsys.readouterr().out)] == ["step 3", "step 4"]


def test_pads_are_no_tokens(module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By the clock the first two steps take two seconds each, the others four."""
    now = [0.0]

    class Tick(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            now[0] += 2.0 if trainer.global_step < 2 else 4.0

    monkeypatch.setattr("finetuna_lightning.training.callbacks.progress.time.monotonic", lambda: now[0])
    batches = tiny_batches(NAMES, 4, length=12)
    for batch in batches:
        batch["attention_mask"][:, 6:] = 0
        batch["labels"][:, 6:] = -100
    tiny_fit(module, batches, Tick(), AdapterProgress(every_n_steps=2))
    shown = lines(capsys.readouterr().out)
    assert "2.00 s/step  12 tokens/s  eta 0:04" in shown[0]  # 4 rows of 6 tokens in 2 s; 2 of 4 steps took 4 s
    assert "4.00 s/step  6 tokens/s  eta 0:00" in shown[1]
    assert len(shown) == 2


def test_validation_is_a_line_and_not_training_time(
    module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]

    class Tick(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 1.0

        def on_validation_batch_start(self, *_: Any) -> None:
            now[0] += 100.0

    monkeypatch.setattr("finetuna_lightning.training.callbacks.progress.time.monotonic", lambda: now[0])
    progress = AdapterProgress(every_n_steps=4)
    options = {"val_check_interval": 2, "num_sanity_val_steps": 1}
    tiny_fit(module, tiny_batches(NAMES, 4), Tick(), progress, val=tiny_batches(NAMES, 1), **options)
    out = capsys.readouterr().out
    assert "1.00 s/step" in lines(out)[0]
    number = r"\d\.\d{3} \(perplexity [\d.]+\)"
    found = re.findall(rf"validation at step (\d):  sql {number}  legal {number}\n", out)
    assert found == ["2", "4"]
    assert [step for step, _ in progress.val_history["sql"]] == [2, 4]
    shown = float(re.findall(r"sql (\d\.\d+) \(", out)[-1])
    assert progress.val_history["sql"][-1][1] == pytest.approx(shown, abs=1e-3)


def test_the_history_is_every_loss_of_every_step(module: MultiAdapterModule) -> None:
    progress, losses = AdapterProgress(every_n_steps=4), Losses()
    tiny_fit(module, tiny_batches(NAMES, 6), progress, losses)
    assert progress.history == {name: list(enumerate(losses.seen[name], start=1)) for name in NAMES}
    assert len(set(losses.seen["sql"])) == 6


def test_an_adapter_that_left_the_batches_adds_nothing(module: MultiAdapterModule) -> None:
    batches = tiny_batches(NAMES, 2).batches + tiny_batches(["sql"], 2).batches
    progress = AdapterProgress()
    tiny_fit(module, Batches(batches), progress)
    assert [step for step, _ in progress.history["sql"]] == [1, 2, 3, 4]
    assert [step for step, _ in progress.history["legal"]] == [1, 2]


def test_accumulated_batches_are_one_step(module: MultiAdapterModule) -> None:
    progress, losses = AdapterProgress(), Losses()
    tiny_fit(module, tiny_batches(NAMES, 4), progress, losses, accumulate_grad_batches=2)
    a, b, c, d = losses.seen["sql"]
    expected = [(1, pytest.approx((a + b) / 2)), (2, pytest.approx((c + d) / 2))]
    assert progress.history["sql"] == expected


def test_losses_are_read_out_in_batches(module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    original = AdapterProgress._collect

    def note(self: AdapterProgress) -> None:
        transfers.append(len(self._pending))
        original(self)

    monkeypatch.setattr(AdapterProgress, "_collect", note)
    tiny_fit(module, tiny_batches(NAMES, 8), AdapterProgress(every_n_steps=4))
    assert [count for count in transfers if count] == [8, 8]  # 4 steps of 2 adapters


def test_the_shown_loss_is_smoothed_without_the_pull_of_its_start() -> None:
    progress = AdapterProgress()
    progress._pending = [(1, "sql", torch.tensor(4.0))]
    progress._collect()
    assert progress.smoothed() == {"sql": pytest.approx(4.0)}
    progress._pending = [(2, "sql", torch.tensor(2.0)), (3, "sql", torch.tensor(float("nan")))]
    progress._collect()
    assert progress.smoothed() == {"sql": pytest.approx((0.9 * 4.0 + 2.0) / 1.9)}
    assert len(progress.history["sql"]) == 3


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def test_on_a_terminal_a_bar_is_drawn_in_place(module: MultiAdapterModule) -> None:
    progress = AdapterProgress(refresh_seconds=1e-9)
    progress.console = terminal()
    tiny_fit(module, tiny_batches(NAMES, 3), progress, val=tiny_batches(NAMES, 2))
    out = progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 3/3  100%" in out
    assert "━" in out
    assert "\x1b[" in out  # the cursor goes back
    assert "validating: batch 2/2" in out
    assert "validation at step 3" in out
    assert progress._live is None


def test_the_terminal_is_given_back_when_a_fit_fails(module: MultiAdapterModule) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            raise ZeroDivisionError

    progress = AdapterProgress()
    progress.console = terminal()
    with pytest.raises(ZeroDivisionError):
        tiny_fit(module, tiny_batches(NAMES, 3), progress, Fail())
    assert progress._live is None
    assert progress.console.file.getvalue().endswith("\x1b[?25h")  # type: ignore[attr-defined]
    assert len(progress.history["sql"]) == 1


def test_it_stands_in_for_lightnings_own_bar(module: MultiAdapterModule) -> None:
    trainer = tiny_fit(module, tiny_batches(NAMES, 1), AdapterProgress())
    bars = [callback for callback in trainer.callbacks if isinstance(callback, pl.callbacks.ProgressBar)]  # type: ignore[attr-defined]
    assert [type(bar) for bar in bars] == [AdapterProgress]


def test_disabled_it_shows_nothing_and_keeps_the_history(
    module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = AdapterProgress()
    progress.disable()
    tiny_fit(module, tiny_batches(NAMES, 2), progress)
    assert capsys.readouterr().out == ""
    assert len(progress.history["sql"]) == 2


def test_validating_alone_is_no_part_of_the_history(
    module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = AdapterProgress()
    trainer = tiny_fit(module, tiny_batches(NAMES, 1), progress)
    trainer.validate(module, tiny_batches(NAMES, 1), verbose=False)
    assert progress.val_history == {}
    assert "validation at step" not in capsys.readouterr().out


def test_a_test_run_says_how_far_it_is(module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_fit(module, tiny_batches(NAMES, 1), AdapterProgress())
    capsys.readouterr()
    trainer.test(module, tiny_batches(NAMES, 8), verbose=False)
    assert re.findall(r"test: batch (\d)/8", capsys.readouterr().out) == ["2", "4", "6", "8"]


@pytest.mark.parametrize("settings", [{"refresh_seconds": 0}, {"every_n_steps": 0}, {"every_n_steps": True}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        AdapterProgress(**settings)
