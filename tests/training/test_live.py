"""Adapters that join and leave a running fit, and what a step of one's own is: the others are bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig
from finetuna_lightning.errors import ConfigError, DataError, FinetunaError, TargetError
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.joint import At, Rest, Weights, difference, of, only, run, same, settings
from tests.helpers.runs import language_model, text_file
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit, tiny_module

NEW = AdapterConfig(rank=3, lr=1e-2, dropout=0.1, target_modules=["q_proj", "v_proj"])


# ---- with the data module --------------------------------------------------------------------------------------------


def source(folder: Path, name: str, lines: int = 30) -> DataConfig:
    folder.mkdir(exist_ok=True)
    return DataConfig(text_file(folder / f"{name}.txt", name, lines=lines), max_length=16)


def text_run(
    folder: Path, names: list[str], *callbacks: Any, steps: int = 8, ckpt: str | None = None, **more: Any
) -> tuple[MultiAdapterModule, Trainer]:
    module = MultiAdapterModule(
        BackboneConfig(language_model(folder / "llama")),
        {name: AdapterConfig(**fields) for name, fields in settings(names).items()},
    )
    data = AdapterDataModule({name: source(folder, name) for name in names}, batch_size=2)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_steps=steps, callbacks=list(callbacks), num_sanity_val_steps=0, **more,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The two adapters that the other runs have too, by themselves."""
    weights = Weights()
    text_run(tmp_path_factory.mktemp("plain"), ["x", "y"], weights)
    return weights


def close(weights: Weights, plain: Weights, names: list[str], exact: int) -> None:
    """Bit-identical in the first steps, whose batches are the same; then to rounding: a product over more rows may
    round its rows otherwise."""
    for step, (mine, theirs) in enumerate(zip(weights.taken, plain.taken, strict=True)):
        for name in names:
            if step < exact:
                assert same(of(mine, name), of(theirs, name)), (step, name)
            assert difference(of(mine, name), of(theirs, name)) < 1e-5, (step, name)


def test_an_adapter_joins_a_running_fit_and_the_others_do_not_notice(tmp_path: Path, plain: Weights) -> None:
    joins = At(3, lambda _, module: module.add_adapter("new", NEW, source(tmp_path, "new", lines=60)))
    weights, memory = Weights(), AdapterMemoryMonitor(every_n_steps=1, table=False)
    module, trainer = text_run(tmp_path, ["x", "y"], weights, joins, memory, val_check_interval=5)
    close(weights, plain, ["x", "y"], exact=3)
    assert [bool(of(taken, "new")) for taken in weights.taken] == [False] * 3 + [True] * 5
    moved = [not same(of(b, "new"), of(a, "new")) for a, b in zip(weights.taken[3:], weights.taken[4:], strict=False)]
    assert all(moved)
    assert module.optimizer.turns["new"].steps == 5  # batches 4 to 8
    assert [group["name"] for group in module.optimizer.param_groups] == ["x", "y", "new"]
    factors = [module.optimizer.turns["new"].factor(step) for step in range(6)]  # type: ignore[misc]
    assert factors == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])  # its linear schedule ends with the run
    assert trainer.callback_metrics["val/new/loss"].isfinite()  # it is validated with the others
    assert memory.report()["adapters"]["new"]["optimizer"] > 0


def test_what_a_joined_adapter_becomes_does_not_depend_on_when_it_joined(tmp_path: Path) -> None:
    early, late = Weights(), Weights()
    constant = AdapterConfig(rank=3, schedule="constant", lr=1e-2, dropout=0.1, target_modules=["q_proj"])
    for at, weights in ((2, early), (4, late)):
        joins = At(at, lambda _, module: module.add_adapter("new", constant, source(tmp_path, "new")))
        text_run(tmp_path, ["x", "y"], weights, joins)
    for step in range(4):
        assert difference(of(early.taken[2 + step], "new"), of(late.taken[4 + step], "new")) < 1e-5


def test_an_adapter_leaves_a_running_fit_and_the_others_do_not_notice(tmp_path: Path, plain: Weights) -> None:
    removed: list[Any] = []
    leaves = At(4, lambda _, module: removed.append(module.remove_adapter("y")))
    weights = Weights()
    module, trainer = text_run(tmp_path, ["x", "y"], weights, leaves, val_check_interval=6)
    close(weights, plain, ["x"], exact=4)
    assert module.adapter_names == ["x"] == list(module.optimizer.optimizers) == list(module.adapter_configs)
    assert same(dict(removed[0].named_parameters()), {
        key.removeprefix("y."): value for key, value in of(plain.taken[3], "y").items()
    })  # fmt: skip
    assert "val/y/loss" not in trainer.callback_metrics


@pytest.mark.parametrize("what", ["join", "leave"])
def test_batches_of_the_same_rows_are_bit_identical(tmp_path: Path, what: str) -> None:
    """Ready batches, in which the rows of an adapter that is not there yet, or no more, belong to a stand-in."""
    names, configs = ["x", "y", "z"], settings(["x", "y", "z"])
    whole = tiny_batches(names, 6)
    steady = Weights()
    run(tmp_path / "steady", configs, steady, batches=whole)
    mixed = tiny_batches(names, 6)
    there = range(3) if what == "leave" else range(3, 6)
    for index, batch in enumerate(mixed):
        batch["adapters"] = ["x", "y", "z" if index in there else "stand_in"]
    start = {"x": configs["x"], "y": configs["y"], "stand_in": configs["y"]}
    if what == "leave":
        start["z"] = configs["z"]
    weights = Weights()
    change = At(
        3,
        lambda _, module: (
            module.remove_adapter("z") if what == "leave" else module.add_adapter("z", AdapterConfig(**configs["z"]))
        ),
    )
    run(tmp_path / "mixed", start, change, weights, batches=mixed)
    for step in range(6):
        assert all(same(of(weights.taken[step], name), of(steady.taken[step], name)) for name in ("x", "y"))


def test_a_checkpoint_after_a_change_has_who_is_there(tmp_path: Path) -> None:
    def change(_: Trainer, module: MultiAdapterModule) -> None:
        module.add_adapter("new", NEW, source(tmp_path, "new"))
        module.remove_adapter("y")

    module, trainer = text_run(tmp_path, ["x", "y"], At(3, change))
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    back = MultiAdapterModule.load_from_checkpoint(tmp_path / "at.ckpt")
    assert back.adapter_names == ["x", "new"]
    assert back.adapter_configs == module.adapter_configs
    assert same(back.adapters.state_dict(), module.adapters.state_dict())


@pytest.mark.parametrize(
    ("name", "config", "data", "error", "message"),
    [
        ("x", NEW, "new", ConfigError, "duplicate|already"),
        ("a.b", NEW, "new", ConfigError, "not allowed"),
        ("new", NEW, None, ConfigError, "needs data=DataConfig"),
        ("new", AdapterConfig(target_modules=["q_porj"]), "new", TargetError, "did you mean 'q_proj'"),
        ("new", AdapterConfig(optimizer="sgd", eps=0.1), "new", ConfigError, "adapter 'new': adapter.eps is set"),
        ("new", NEW, "gone", DataError, "gone"),
    ],
)
def test_a_mistake_changes_nothing(
    tmp_path: Path, plain: Weights, name: str, config: AdapterConfig, data: str | None, error: type, message: str
) -> None:
    def join(_: Trainer, module: MultiAdapterModule) -> None:
        given = None if data is None else source(tmp_path, "new")
        if given is not None and data == "gone":
            given.path = str(tmp_path / "gone.txt")
        with pytest.raises(FinetunaError, match=message) as caught:
            module.add_adapter(name, config, given)
        assert isinstance(caught.value, error)

    weights = Weights()
    module, _ = text_run(tmp_path, ["x", "y"], weights, At(2, join))
    assert module.adapter_names == list(module.adapter_configs) == list(module.hparams["adapters"]) == ["x", "y"]
    close(weights, plain, ["x", "y"], exact=8)


def test_the_last_adapter_and_one_that_is_not_there_do_not_leave(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, {"x": {}})
    with pytest.raises(ConfigError, match="'x' is the last one"):
        module.remove_adapter("x")
    with pytest.raises(ConfigError, match=r"no adapter 'xx'; did you mean|no adapter 'xx'"):
        module.remove_adapter("xx")
    with pytest.raises(ConfigError, match="no fit with an AdapterDataModule"):
        module.add_adapter("new", NEW, DataConfig("x.txt"))


def test_without_a_fit_adapters_come_and_go_too(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, {"x": {}})
    module.add_adapter("new", NEW)
    module.remove_adapter("x")
    trainer = tiny_fit(module, tiny_batches(["new"], 2), val=tiny_batches(["new"], 1))
    assert module.optimizer.turns["new"].steps == 2
    assert "val/new/loss" in trainer.callback_metrics


def test_an_adapter_put_into_the_bank_by_hand_trains_with_the_defaults(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, {"x": {}})
    module.adapters.add("hand", rank=2, alpha=4.0, targets=["q_proj"], seed=5)
    before = {key: value.detach().clone() for key, value in module.adapters["hand"].named_parameters()}
    tiny_fit(module, tiny_batches(["x", "hand"], 2), val=tiny_batches(["x", "hand"], 1))
    assert module.adapter_configs["hand"] == AdapterConfig(rank=2, alpha=4.0, target_modules=["q_proj"], seed=5)
    assert module.adapter_seed("hand") == 5
    assert not same(dict(module.adapters["hand"].named_parameters()), before)


def test_one_put_into_the_bank_by_hand_during_a_fit_waits_for_the_next(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, {"x": {}})
    tiny_fit(module, tiny_batches(["x"], 3), At(1, lambda _, m: m.adapters.add("hand", rank=2, targets=["q_proj"])))
    assert list(module.adapter_report()) == ["x"]
    tiny_fit(module, tiny_batches(["x", "hand"], 2))
    assert module.adapter_report()["hand"]["steps"] == 2


# ---- a step of one's own ---------------------------------------------------------------------------------------------

OWN: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate": 3},
    "lion": {"optimizer": "lion8bit", "lr": 1e-3},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1},
    "adafactor": {"optimizer": "adafactor"},
    "betas": {"betas": [0.5, 0.6], "eps": 1e-3},
    "schedule": {"schedule": "cosine", "warmup_steps": 2, "max_steps": 4},
    "all": {"accumulate": 2, "optimizer": "sgd", "schedule": "linear", "warmup_steps": 1, "max_steps": 3, "lr": 0.1},
}


@pytest.mark.parametrize("own", OWN)
def test_in_company_it_is_as_alone(tmp_path: Path, own: str) -> None:
    """To rounding against the run alone, whose batches have fewer rows; to the last bit against other company."""
    configs = settings(["x", "y", "z"], x=OWN[own])
    batches, steps = tiny_batches(list(configs), 9), 9
    joint, alone, other = Weights(), Weights(), Weights()
    module, _ = run(tmp_path / "joint", configs, joint, batches=batches)
    solo, _ = run(tmp_path / "alone", {"x": configs["x"]}, alone, batches=only(batches, "x"))
    company = {"x": configs["x"], "y": {"rank": 1, "lr": 1.0, "optimizer": "sgd"}, "z": {"accumulate": 4, "rank": 3}}
    run(tmp_path / "other", company, other, batches=batches)
    for step in range(steps):
        assert same(of(joint.taken[step], "x"), of(other.taken[step], "x"))
        if step < len(alone.taken):
            assert difference(of(joint.taken[step], "x"), of(alone.taken[step], "x")) < 1e-5
    assert module.optimizer.turns["x"].steps == solo.optimizer.turns["x"].steps


def test_own_accumulation_is_lightning_s(tmp_path: Path) -> None:
    """Bit for bit, the step of which is the mean over the batches' means."""
    mine, theirs = Weights(), Weights()
    config = {"rank": 4, "dropout": 0.2, "lr": 1e-2, "max_steps": 2, "warmup_steps": 1}
    run(tmp_path / "a", {"x": config | {"accumulate": 3}}, mine, batches=tiny_batches(["x"], 6))
    run(tmp_path / "b", {"x": config}, theirs, batches=tiny_batches(["x"], 6), accumulate_grad_batches=3)
    assert all(same(a, b) for a, b in zip(mine.taken, theirs.taken, strict=True))
    moved = [not same(a, b) for a, b in zip(mine.taken, mine.taken[1:], strict=False)]
    assert moved == [False, True, False, False, True]


def test_own_accumulation_beside_the_trainer_s(tmp_path: Path) -> None:
    """Two of the trainer's steps, each over two batches, make one of x's."""
    weights = Weights()
    module, _ = run(tmp_path, settings(["x", "y"], x={"accumulate": 2}), weights, steps=8, accumulate_grad_batches=2)
    assert {name: turn.steps for name, turn in module.optimizer.turns.items()} == {"x": 2, "y": 4}
    x = [not same(of(a, "x"), of(b, "x")) for a, b in zip(weights.taken, weights.taken[1:], strict=False)]
    assert x == [False, False, True, False, False, False, True]


def test_accumulation_goes_on_over_epochs_and_validations(tmp_path: Path) -> None:
    """Three batches a pass; a step every two. With validations between, nothing waits in vain."""
    one, two = Weights(), Weights()
    config = settings(["x"], x={"accumulate": 2, "schedule": "constant"})
    batches = tiny_batches(["x"], 3)
    run(tmp_path / "a", config, one, batches=Batches(batches.batches * 2))
    run(tmp_path / "b", config, two, batches=batches, max_epochs=2, val=tiny_batches(["x"], 1), val_check_interval=1)
    assert all(same(a, b) for a, b in zip(one.taken, two.taken, strict=True))


@pytest.mark.parametrize("trainers", [1, 3])
def test_a_resume_amid_an_accumulation_is_exact(tmp_path: Path, trainers: int) -> None:
    configs = settings(["x", "y"], x={"accumulate": 3 if trainers == 1 else 1})
    batches = tiny_batches(list(configs), 6)
    save = At(2, lambda trainer, _: trainer.save_checkpoint(tmp_path / "at.ckpt"))
    options: dict[str, Any] = {"accumulate_grad_batches": trainers}
    _, whole = run(tmp_path / "a", configs, save, batches=batches, **options)
    _, weights = run(tmp_path / "b", configs, batches=Rest(batches, 2), ckpt_path=str(tmp_path / "at.ckpt"), **options)
    assert same(weights, whole)


def test_one_that_is_stopped_amid_an_accumulation_keeps_nothing_waiting(tmp_path: Path) -> None:
    stop = At(3, lambda _, module: module.stop_adapter("x", "enough"))
    module, _ = run(tmp_path, settings(["x", "y"], x={"accumulate": 2}), stop)
    assert module.adapter_report()["x"] == {"steps": 1, "skipped": 0, "state": "enough"}
    assert module.optimizer.state_dict()["adapters"]["x"]["gradients"] == {}


def test_a_resume_with_more_steps_goes_on_at_once(tmp_path: Path) -> None:
    """The schedule had come to zero; the new one has not."""
    batches = tiny_batches(["x", "y"], 4)
    save = At(4, lambda trainer, _: trainer.save_checkpoint(tmp_path / "at.ckpt"))
    run(tmp_path / "a", settings(["x", "y"]), save, batches=batches)
    weights, rates = Weights(), []
    note = At(1, lambda _, module: rates.extend(g["lr"] for g in module.optimizer.param_groups), before=True)
    run(
        tmp_path / "b", settings(["x", "y"]), weights, note, batches=batches, max_epochs=2,
        ckpt_path=str(tmp_path / "at.ckpt"),
    )  # fmt: skip
    assert rates == pytest.approx([1e-2 * 0.5, 5e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 6)).item())])


def test_the_learning_rate_monitor_draws_a_curve_for_each_adapter(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    monitor = LearningRateMonitor("step")
    joins = At(2, lambda _, module: module.add_adapter("z", AdapterConfig(rank=2, lr=0.5, schedule="constant")))
    batches = tiny_batches(["x", "y"], 4)
    for batch in batches.batches[2:]:
        batch["adapters"] = ["x", "z"]
    run(
        tmp_path, settings(["x", "y"], x={"accumulate": 2}), monitor, joins, batches=batches, log_every_n_steps=1,
        logger=CSVLogger(tmp_path / "logs"),
    )  # fmt: skip
    assert monitor.lrs["lr/x"] == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3])  # two steps of its own
    assert monitor.lrs["lr/y"] == pytest.approx([5e-3 / 3, 5e-3 * 2 / 3, 5e-3, 5e-3])
    assert monitor.lrs["lr/z"] == [0.5, 0.5]


def test_recomputing_and_a_clip_that_never_bites_change_nothing(tmp_path: Path) -> None:
    """With routing, dropout and accumulation; and clipping that bites does change something."""
    changes = {"accumulate": 2, "max_grad_norm": None}
    configs = settings(["x", "y"], x=changes, y=changes)
    kept, again, loose, tight = Weights(), Weights(), Weights(), Weights()
    run(tmp_path / "a", configs, kept)
    module = tiny_module(tmp_path / "b", configs, gradient_checkpointing=True)
    tiny_fit(module, tiny_batches(["x", "y"], 6), again)
    for norm, weights in ((1e6, loose), (1e-3, tight)):
        run(
            tmp_path / str(norm),
            {k: v | {"max_grad_norm": norm, "optimizer": "sgd"} for k, v in configs.items()},
            weights,
        )
    free = Weights()
    run(tmp_path / "c", {k: v | {"optimizer": "sgd"} for k, v in configs.items()}, free)
    assert all(same(a, b) for a, b in zip(kept.taken, again.taken, strict=True))
    assert all(same(a, b) for a, b in zip(free.taken, loose.taken, strict=True))
    assert not same(free.taken[-1], tight.taken[-1])
