"""The Hydra tree: every file composed and instantiated, the commands in their heads, no drift from the dataclasses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from finetuna_lightning import conf
from finetuna_lightning.build import build_adapters, build_data, build_module, build_sources, check_samples
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig, OptimConfig
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.precision import EightBitPrecision

assert conf.__file__ is not None
FOLDER = Path(conf.__file__).parent
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
NEEDED = ["data.path=some.txt", "backbone.name_or_path=quickstart"]
COMMAND = re.compile(r"# (finetuna-(?:train|estimate)(?: \S+)*)")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("finetuna_lightning.conf", version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """A run's configuration, as the program gets it."""
    config = compose(name, [*overrides, f"hydra.runtime.output_dir={Path.cwd()}"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    run = {key: value for key, value in config.items() if key != "hydra"}
    return OmegaConf.to_container(OmegaConf.create(run), resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def choice(file: str) -> list[str]:
    """The override that composes ``file``."""
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    return [f"{group}={name}"] if group else []


def test_the_tree_is_there() -> None:
    groups = {file.split("/")[0] for file in FILES if "/" in file}
    assert groups == {"adapter", "backbone", "callbacks", "data", "experiment", "hydra", "logger", "optim", "trainer"}


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_composed_and_instantiated(file: str) -> None:
    needed = [] if file.startswith(("experiment", "data/quickstart")) else NEEDED
    config = composed(*choice(file), *needed, "trainer.accelerator=cpu")
    values = plain(config)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    assert all(isinstance(callback, pl.Callback) for callback in callbacks)
    logger = instantiate(config.logger) if config.logger else False
    assert logger is False or isinstance(logger, Logger)
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=logger)
    assert isinstance(trainer, pl.Trainer)
    assert isinstance(trainer.precision_plugin, EightBitPrecision)
    assert trainer.precision_plugin.dtype == values["backbone"]["dtype"]
    assert Path(trainer.default_root_dir) == Path.cwd()
    module, data = build_module(values), build_data(values)
    assert module.adapter_names == list(data.sources)
    check_samples(values)


@pytest.mark.parametrize("file", FILES)
def test_every_file_opens_with_a_command_that_works(file: str) -> None:
    head = []
    for line in (FOLDER / file).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head += [found[1] for found in [COMMAND.match(line)] if found]
    assert head, f"{file} does not open with the command that uses it"
    for command in head:
        program, *words = shlex.split(command)
        top = Path(file).stem if "/" not in file else "train"
        assert program == f"finetuna-{top}"
        sweep = words[:1] == ["-m"]
        overrides = [re.sub(r",.*", "", word) if sweep else word for word in words if word not in ("-m", "...")]
        plain(composed(*overrides, name=top))
        group, name = Path(file).parent.as_posix(), Path(file).stem
        if group not in (".", "hydra") and len(head) == 1:
            config = composed(*overrides)
            assert f"{group}={name}" in overrides or OmegaConf.select(config.hydra.runtime.choices, group) == name


@pytest.mark.parametrize(
    ("group", "kind", "default"),
    [("backbone", BackboneConfig, "quickstart"), ("adapter", AdapterConfig, "lora"), ("optim", OptimConfig, "adamw")],
)
def test_a_group_s_settings_are_the_fields_of_its_dataclass(group: str, kind: Any, default: str) -> None:
    for file in (file for file in FILES if file.startswith(group + "/")):
        assert set(plain(composed(*choice(file), *NEEDED))[group]) == {field.name for field in fields(kind)}, file
    assert plain(composed(f"{group}={default}", "data.path=some.txt"))[group] == asdict(kind())


def test_the_data_s_settings_are_the_fields_of_its_dataclass_and_module() -> None:
    for file in (file for file in FILES if file.startswith("data/")):
        names = set(plain(composed(*choice(file), *NEEDED))["data"])
        assert names == {field.name for field in fields(DataConfig)} | {
            "batch_size",
            "eval_batch_size",
            "packing",
            "sources",
        }, file
    values = plain(composed("data=file", "data.path=some.txt"))["data"]
    for name, value in asdict(DataConfig("some.txt")).items():
        if name != "batch_size":
            assert values[name] == value, name
    module = AdapterDataModule({"a": DataConfig("some.txt")})
    assert (values["batch_size"], values["eval_batch_size"]) == (module.batch_size, module.eval_batch_size)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_an_optimizer_s_file_is_called_after_it(name: str) -> None:
    assert composed(f"optim={name}").optim.name == name


def test_the_large_backbone_must_be_named() -> None:
    """It would train the quickstart's in silence."""
    assert composed("backbone=large").backbone.name_or_path is None


def test_adapters_and_sources_come_by_name_from_the_command_line() -> None:
    config = plain(composed("adapters={sql: {rank: 2}, legal: {}}", "adapter.lr=0.1",
                            "data.sources={sql: {path: a.txt}, legal: {path: b.txt, batch_size: 2}}",
                            "samples={sql: SELECT}"))  # fmt: skip
    adapters, sources = build_adapters(config), build_sources(config)
    assert [(name, a.rank, a.lr) for name, a in adapters.items()] == [("sql", 2, 0.1), ("legal", 8, 0.1)]
    assert [(name, s.path, s.batch_size) for name, s in sources.items()] == [
        ("sql", "a.txt", None),
        ("legal", "b.txt", 2),
    ]
    assert config["samples"] == {"sql": "SELECT"}
