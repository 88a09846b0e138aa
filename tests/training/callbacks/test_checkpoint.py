"""Best and last of every adapter, by its own metric, as PEFT folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetuna_lightning import peft_io
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.tiny import tiny_batches, tiny_fit, tiny_module

ADAPTERS: dict[str, dict[str, Any]] = {
    "sql": {"rank": 4, "lr": 1e-2, "schedule": "constant"},
    "legal": {"rank": 2, "lr": 1e-2, "schedule": "constant"},
}
NAMES = list(ADAPTERS)


class Scripted(MultiAdapterModule):
    """Its validations report what a test wrote down: ``{adapter: [first, second, ...]}``; None logs nothing."""

    script: Mapping[str, Sequence[float | None]]

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        index = self.__dict__.setdefault("validations", 0)
        self.validations = index + 1
        for name, values in self.script.items():
            value = values[index]
            if value is not None:
                self.log(f"val/{name}/loss", value)
                self.log(f"val/{name}/score", -value)


def scripted(folder: Path, script: Mapping[str, Sequence[float | None]]) -> Scripted:
    plain = tiny_module(folder, ADAPTERS)
    assert plain.backbone_config is not None
    module = Scripted(plain.backbone_config, plain.adapter_configs)
    module.script = script
    return module


def fit(
    module: MultiAdapterModule, *callbacks: Callback, steps: int = 3, validate: bool = True, **options: Any
) -> Trainer:
    """``steps`` steps, with a validation after each."""
    val = tiny_batches(NAMES, 1) if validate else None
    return tiny_fit(module, tiny_batches(NAMES, steps), *callbacks, val=val, **{"val_check_interval": 1, **options})


class Snapshots(Callback):
    """Every adapter's weights after each step."""

    def __init__(self) -> None:
        self.taken: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.taken.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    def after(self, step: int, name: str) -> torch.Tensor:
        """One of an adapter's matrices, as it was after ``step``."""
        return self.taken[step - 1][f"adapters.{name}.deltas.model/layers/0/mlp/up_proj.lora_A"]


def saved(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]


def test_each_adapter_keeps_its_own_best_and_the_last(tmp_path: Path) -> None:
    module = scripted(tmp_path, {"sql": [3.0, 1.0, 2.0], "legal": [1.0, 2.0, 3.0]})
    keep, shots = AdapterCheckpoint("kept"), Snapshots()
    fit(module, keep, shots, default_root_dir=tmp_path)
    assert keep.best_scores == {"sql": 1.0, "legal": 1.0}
    for name, best in (("sql", 2), ("legal", 1)):
        assert torch.equal(saved(tmp_path / "kept" / name / "best"), shots.after(best, name))
        assert torch.equal(saved(tmp_path / "kept" / name / "last"), shots.after(3, name))
    folder = tmp_path / "kept"
    expected = {name: {kind: str(folder / name / kind) for kind in ("best", "last")} for name in NAMES}
    assert keep.paths() == expected
    assert sorted(path.name for path in (folder / "sql").iterdir()) == ["best", "last"]  # nothing beside


def test_the_largest_is_the_best_where_that_was_asked_for(tmp_path: Path) -> None:
    module = scripted(tmp_path, {"sql": [3.0, 1.0, 2.0], "legal": [1.0, 2.0, 3.0]})
    keep = AdapterCheckpoint(monitor="score", mode="max")
    fit(module, keep)
    assert keep.best_scores == {"sql": -1.0, "legal": -1.0}


def test_nan_is_never_an_improvement(tmp_path: Path) -> None:
    module = scripted(tmp_path, {"sql": [math.nan, 2.0, math.nan], "legal": [math.nan] * 3})
    keep, shots = AdapterCheckpoint(), Snapshots()
    fit(module, keep, shots)
    assert keep.best_scores == {"sql": 2.0}
    assert torch.equal(saved(tmp_path / "adapters/sql/best"), shots.after(2, "sql"))
    assert set(keep.paths()["legal"]) == {"last"}


def test_without_validation_the_last_is_the_best(tmp_path: Path) -> None:
    keep, shots = AdapterCheckpoint(), Snapshots()
    fit(tiny_module(tmp_path, ADAPTERS), keep, shots, validate=False, val_check_interval=None)
    for name in NAMES:
        for kind in ("best", "last"):
            assert torch.equal(saved(tmp_path / "adapters" / name / kind), shots.after(3, name))
    assert keep.best_scores == {}


def test_an_adapter_that_no_validation_meets_has_a_best_too(tmp_path: Path) -> None:
    keep = AdapterCheckpoint()
    fit(scripted(tmp_path, {"sql": [3.0, 1.0, 2.0], "legal": [None] * 3}), keep)
    assert keep.best_scores == {"sql": 1.0}
    assert (tmp_path / "adapters/legal/best/adapter_config.json").is_file()


def test_last_can_be_left_out(tmp_path: Path) -> None:
    keep = AdapterCheckpoint(save_last=False)
    fit(tiny_module(tmp_path, ADAPTERS), keep)
    assert {kind for kinds in keep.paths().values() for kind in kinds} == {"best"}


def test_what_was_written_for_a_step_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = spy(monkeypatch)
    fit(tiny_module(tmp_path, ADAPTERS), AdapterCheckpoint(every_n_steps=1), steps=1)
    assert writes == ["sql/last", "legal/last", "sql/best", "legal/best"]


def test_the_check_before_training_writes_nothing(tmp_path: Path) -> None:
    there: list[bool] = []

    class Look(Callback):
        def on_train_start(self, *_: Any) -> None:
            there.append((tmp_path / "adapters").exists())

    fit(tiny_module(tmp_path, ADAPTERS), AdapterCheckpoint(), Look(), num_sanity_val_steps=1)
    assert there == [False]


def test_last_is_written_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = spy(monkeypatch)
    fit(
        tiny_module(tmp_path, ADAPTERS),
        AdapterCheckpoint(every_n_steps=2),
        steps=5,
        validate=False,
        val_check_interval=None,
    )
    assert [path for path in writes if path.startswith("sql")] == ["sql/last", "sql/last", "sql/last", "sql/best"]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    writes: list[str] = []
    original = peft_io.save_folder

    def note(path: Path, folder: Any) -> Path:
        writes.append("/".join(Path(path).parts[-2:]))
        return original(path, folder)

    monkeypatch.setattr("finetuna_lightning.adapters.save_folder", note)
    return writes


def test_an_interrupted_fit_keeps_the_weights_it_had(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise ZeroDivisionError("the first fault")

    shots = Snapshots()
    with pytest.raises(ZeroDivisionError):
        fit(
            tiny_module(tmp_path, ADAPTERS), shots, Fail(), AdapterCheckpoint(), validate=False, val_check_interval=None
        )
    assert torch.equal(saved(tmp_path / "adapters/sql/last"), shots.after(2, "sql"))
    assert not (tmp_path / "adapters/sql/best").exists()


def test_a_fit_that_fails_before_its_first_step_writes_nothing_and_loads_nothing(tmp_path: Path) -> None:
    class Fail(Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    module = tiny_module(tmp_path, ADAPTERS)
    with pytest.raises(ZeroDivisionError):
        fit(module, Fail(), AdapterCheckpoint())
    assert module.backbone is None
    assert not (tmp_path / "adapters").exists()


def test_a_fault_in_mid_save_leaves_the_old_folder_and_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second validation's best is written half when the disk is full."""
    original, calls = peft_io.save_file, []

    def full(tensors: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) > 4:  # best and last of two adapters are there
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(peft_io, "save_file", full)
    shots = Snapshots()
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(OSError, match="no space left"):
        fit(scripted(tmp_path, {"sql": [3.0, 2.0, 1.0], "legal": [3.0, 2.0, 1.0]}), shots, AdapterCheckpoint())
    for name in NAMES:
        for kind in ("best", "last"):
            assert torch.equal(saved(tmp_path / "adapters" / name / kind), shots.after(1, name))
        assert sorted(path.name for path in (tmp_path / "adapters" / name).iterdir()) == ["best", "last"]


def test_an_adapter_of_nan_does_not_replace_a_good_one(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                next(pl_module.adapters["sql"].parameters()).data[0] = math.nan

    shots = Snapshots()
    with pytest.warns(UserWarning, match="'sql' holds NaN"):
        fit(tiny_module(tmp_path, ADAPTERS), shots, AdapterCheckpoint(every_n_steps=1), Spoil(), validate=False,
            val_check_interval=None)  # fmt: skip
    assert torch.equal(saved(tmp_path / "adapters/sql/last"), shots.after(2, "sql"))
    assert torch.equal(saved(tmp_path / "adapters/legal/last"), shots.after(3, "legal"))


def test_an_unknown_metric_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, ADAPTERS)
    with pytest.raises(ConfigError, match=r"'perplexitty'.*loss, perplexity; did you mean 'perplexity'\?"):
        fit(module, AdapterCheckpoint(monitor="perplexitty"), num_sanity_val_steps=1)
    assert module.global_step == 0


def test_validating_alone_writes_nothing(tmp_path: Path) -> None:
    trainer = fit(tiny_module(tmp_path, ADAPTERS), steps=1)
    keep = AdapterCheckpoint()
    trainer.callbacks.append(keep)  # type: ignore[attr-defined]
    trainer.validate(trainer.lightning_module, tiny_batches(NAMES, 1), verbose=False)
    assert keep.paths() == {}


def resume(tmp_path: Path, root: Path, script: Mapping[str, Sequence[float]], **options: Any) -> AdapterCheckpoint:
    """One validated step; its Lightning checkpoint; then another step from there, in ``root``."""
    first = AdapterCheckpoint()
    trainer = fit(scripted(tmp_path, {name: values[:1] for name, values in script.items()}), first, steps=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = AdapterCheckpoint()
    module = scripted(tmp_path, {name: values[1:] for name, values in script.items()})
    fit(module, again, max_epochs=2, steps=1, default_root_dir=root, ckpt_path=str(tmp_path / "run.ckpt"), **options)
    return again


def test_a_resumed_run_remembers_the_best(tmp_path: Path) -> None:
    again = resume(tmp_path, tmp_path, {"sql": [1.0, 2.0], "legal": [2.0, 1.0]})
    assert again.best_scores == {"sql": 1.0, "legal": 1.0}
    sql, legal = tmp_path / "adapters/sql", tmp_path / "adapters/legal"
    assert not torch.equal(saved(sql / "best"), saved(sql / "last"))
    assert torch.equal(saved(legal / "best"), saved(legal / "last"))


def test_a_resumed_run_that_does_not_validate_keeps_the_best(tmp_path: Path) -> None:
    again = resume(
        tmp_path, tmp_path, {"sql": [1.0, 0.0], "legal": [2.0, 0.0]}, validate=False, val_check_interval=None
    )
    assert again.best_scores == {"sql": 1.0, "legal": 2.0}
    assert not torch.equal(saved(tmp_path / "adapters/sql/best"), saved(tmp_path / "adapters/sql/last"))


def test_a_run_resumed_in_another_folder_takes_the_best_along(tmp_path: Path) -> None:
    again = resume(tmp_path, tmp_path / "second", {"sql": [1.0, 2.0], "legal": [2.0, 1.0]})
    assert again.best_scores == {"sql": 1.0, "legal": 1.0}
    assert torch.equal(saved(tmp_path / "second/adapters/sql/best"), saved(tmp_path / "adapters/sql/best"))
    assert again.paths()["sql"]["best"] == str(tmp_path / "second/adapters/sql/best")


def test_a_best_that_is_gone_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterCheckpoint, "state_dict", lambda self: {"best_scores": {"sql": 0.0}, "paths": {}})
    with pytest.warns(UserWarning, match="is gone"):
        again = resume(tmp_path, tmp_path / "second", {"sql": [1.0, 2.0], "legal": [2.0, 1.0]})
    assert again.best_scores == {"sql": 2.0, "legal": 1.0}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_the_folders_load_in_peft_and_in_a_bank(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, ADAPTERS)
    fit(module, AdapterCheckpoint())
    for path in (tmp_path / "adapters/sql/best", tmp_path / "adapters/sql/last"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
        peft.PeftModel.from_pretrained(base, str(path))
    theirs = base.get_parameter("model.layers.0.mlp.up_proj.lora_A.default.weight")
    assert torch.equal(theirs, saved(tmp_path / "adapters/sql/last"))
    loaded = module.adapters.load("again", tmp_path / "adapters/sql/last")
    mine = dict(module.adapters["sql"].named_parameters())
    assert all(torch.equal(parameter, mine[key]) for key, parameter in loaded.named_parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterCheckpoint(mode="mim"), "did you mean 'min'"),
        (lambda: AdapterCheckpoint(every_n_steps=0), "every_n_steps"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], AdapterCheckpoint], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
