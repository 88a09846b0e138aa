"""Each adapter stops by its own metric; the others go on as if nothing had been."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.early_stopping import AdapterEarlyStopping
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.joint import At, Rest, Weights, of, same, settings
from tests.helpers.tiny import tiny_batches, tiny_fit, tiny_module

NAMES = ["sql", "legal", "code"]
BETTER = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]


class Scripted(MultiAdapterModule):
    """Its validation after step n reports what a test wrote down for it: ``{adapter: [first, second, ...]}``."""

    script: Mapping[str, Sequence[float]]

    def on_validation_epoch_end(self) -> None:
        index = max(0, self.global_step - 1)
        for name, values in self.script.items():
            self.log(f"val/{name}/loss", values[index])
            self.log(f"val/{name}/accuracy", -values[index])


def fit(
    folder: Path, script: Mapping[str, Sequence[float]], *callbacks: Any, done: int = 0, **options: Any
) -> tuple[Scripted, Trainer]:
    plain = tiny_module(folder, settings(NAMES))
    assert plain.backbone_config is not None
    module = Scripted(plain.backbone_config, plain.adapter_configs)
    module.script = script
    batches = Rest(tiny_batches(NAMES, 6), done)
    return module, tiny_fit(
        module, batches, *callbacks, val=tiny_batches(NAMES, 1), **{"val_check_interval": 1, **options}
    )


def test_an_adapter_stops_by_its_own_metric_and_the_others_are_bit_identical(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = {"sql": [5.0, 4.0, 4.0, 4.5, 4.5, 4.5], "legal": BETTER, "code": BETTER}
    weights, undisturbed, stop = Weights(), Weights(), AdapterEarlyStopping(patience=2)
    with caplog.at_level(logging.INFO):
        module, trainer = fit(tmp_path, script, stop, weights, AdapterCheckpoint(str(tmp_path / "adapters")))
    fit(tmp_path / "other", script, undisturbed)
    for step in range(6):
        for name in ("legal", "code"):
            assert same(of(weights.taken[step], name), of(undisturbed.taken[step], name))
    assert same(of(weights.taken[5], "sql"), of(undisturbed.taken[3], "sql"))  # it stood still after step 4
    assert not same(of(undisturbed.taken[5], "sql"), of(undisturbed.taken[3], "sql"))
    assert (module.retired, trainer.global_step) == ({"sql"}, 6)
    reason = "stopped early at step 4: 2 validations without a better loss than 4"
    assert stop.stopped == {"sql": reason}
    assert [r.getMessage() for r in caplog.records if "stopped early" in r.getMessage()] == [f"adapter 'sql' {reason}"]
    assert module.adapter_report()["sql"] == {"steps": 4, "skipped": 0, "state": reason}
    tensors = load_file(tmp_path / "adapters" / "sql" / "best" / "adapter_model.safetensors")  # that of step 2
    one = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(one, weights.taken[1]["sql.deltas.model/layers/0/self_attn/q_proj.lora_B"])


def test_the_run_ends_when_all_have_stopped(tmp_path: Path) -> None:
    script = {"sql": [1.0] * 6, "legal": [2.0, 1.0, 1.0, 1.0, 1.0, 1.0], "code": [float("nan")] * 6}
    module, trainer = fit(tmp_path, script, stop := AdapterEarlyStopping(patience=2))
    assert (trainer.global_step, module.retired) == (4, set(NAMES))
    assert [stop.stopped[name].split(":")[0][-1] for name in NAMES] == ["3", "4", "2"]
    assert stop.stopped["code"].endswith("without a better loss than none")


@pytest.mark.parametrize(("delta", "stops"), [(0.0, False), (0.5, False), (1.5, True)])
def test_a_change_smaller_than_min_delta_is_none(tmp_path: Path, delta: float, stops: bool) -> None:
    script = dict.fromkeys(NAMES, BETTER)
    stop = AdapterEarlyStopping(monitor="accuracy", mode="max", patience=1, min_delta=delta)
    _, trainer = fit(tmp_path, script, stop)
    assert (set(stop.stopped) == set(NAMES)) is stops
    assert trainer.global_step == (2 if stops else 6)


def test_a_resume_goes_on_counting(tmp_path: Path) -> None:
    """Cut after step 3: sql has stopped, legal has waited once of twice."""
    script = {"sql": [1.0] * 6, "legal": [3.0, 2.0, 2.0, 2.0, 2.0, 2.0], "code": BETTER}

    def save(trainer: Trainer, _: Any) -> None:
        trainer.save_checkpoint(tmp_path / "at.ckpt")

    whole, _ = fit(tmp_path / "a", script, AdapterEarlyStopping(patience=2), At(4, save, before=True))
    module, _ = fit(
        tmp_path / "b", script, stop := AdapterEarlyStopping(patience=2), ckpt_path=str(tmp_path / "at.ckpt"), done=3
    )
    assert {name: reason.split(":")[0] for name, reason in stop.stopped.items()} == {
        "sql": "stopped early at step 3", "legal": "stopped early at step 4",
    }  # fmt: skip
    assert module.retired == whole.retired == {"sql", "legal"}


def test_a_new_fit_starts_anew(tmp_path: Path) -> None:
    stop = AdapterEarlyStopping(patience=1)
    fit(tmp_path / "a", dict.fromkeys(NAMES, [1.0] * 6), stop)
    module, trainer = fit(tmp_path / "b", dict.fromkeys(NAMES, BETTER), stop)
    assert (stop.stopped, module.retired, trainer.global_step) == ({}, set(), 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "mix"}, "AdapterEarlyStopping.mode must be one of min, max"),
        ({"patience": 0}, "patience must be an integer >= 1, not 0"),
        ({"patience": True}, "patience must be an integer >= 1"),
        ({"min_delta": -1.0}, "min_delta must be a number >= 0"),
        ({"min_delta": float("nan")}, "min_delta must be a number >= 0"),
    ],
)
def test_a_wrong_setting_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterEarlyStopping(**fields)


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitors 'los', but of adapter 'sql' .* accuracy, loss; did you mean"):
        fit(tmp_path, dict.fromkeys(NAMES, BETTER), AdapterEarlyStopping("los"))
