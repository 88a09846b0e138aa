"""From a composed configuration to objects. Mistakes in it are reported here, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuna_lightning.configs import (
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    OptimConfig,
    as_config,
    check_adapter_names,
)
from finetuna_lightning.errors import ConfigError, did_you_mean
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule

_DATA_MODULE_KEYS = ("batch_size", "eval_batch_size", "max_tokens", "packing", "sources")


def adapter_names(config: Mapping[str, Any]) -> list[str]:
    """The names of ``adapters``; without any, those of ``data.sources``; without these, the name of the data file.

    Raises:
        ConfigError: for a name that is not allowed, or a source that no adapter uses.
    """
    adapters, sources = list(config["adapters"] or {}), list(config["data"]["sources"] or {})
    names = adapters or sources
    if not names:
        path = config["data"]["path"]
        if not path:
            raise ConfigError("there is no data: set data.path=FILE, or data.sources={name: {path: FILE}}")
        names = [re.sub(r"[^A-Za-z0-9_-]+", "_", Path(str(path)).stem.split(":")[-1]).strip("_-") or "adapter"]
    check_adapter_names(names)
    for name in sources:
        if name not in names:
            raise ConfigError(f"data.sources has {name!r}, which is no adapter{did_you_mean(name, names)}")
    return names


def _merged(defaults: Mapping[str, Any], changes: Any, what: str) -> dict[str, Any]:
    if changes is not None and not isinstance(changes, Mapping):
        raise ConfigError(f"{what} must be a mapping of settings, not {changes!r}")
    return {**defaults, **(changes or {})}


def build_adapters(config: Mapping[str, Any]) -> dict[str, AdapterConfig]:
    """Each adapter's configuration: ``adapter``, with what ``adapters.<name>`` changes."""
    changes = config["adapters"] or {}
    return {
        name: as_config(
            AdapterConfig, _merged(config["adapter"], changes.get(name), f"adapters.{name}"), f"adapters.{name}"
        )
        for name in adapter_names(config)
    }


def build_sources(config: Mapping[str, Any]) -> dict[str, DataConfig]:
    """Each adapter's data: ``data``, with what ``data.sources.<name>`` changes."""
    data = config["data"]
    shared = {key: value for key, value in data.items() if key not in _DATA_MODULE_KEYS}
    sources = {}
    for name in adapter_names(config):
        fields = _merged(shared, (data["sources"] or {}).get(name), f"data.sources.{name}")
        if not fields.get("path"):
            raise ConfigError(
                f"adapter {name!r} has no data: set data.sources.{name}.path=FILE, or data.path=FILE for all"
            )
        sources[name] = as_config(DataConfig, fields, f"data.sources.{name}")
    return sources


def check_samples(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where ``samples`` has a prompt for what is no adapter."""
    names = adapter_names(config)
    for name in config["samples"] or {}:
        if name not in names:
            raise ConfigError(f"samples has {name!r}, which is no adapter{did_you_mean(name, names)}")


def build_module(config: Mapping[str, Any]) -> MultiAdapterModule:
    """The LightningModule of a composed configuration (plain containers)."""
    return MultiAdapterModule(
        backbone=as_config(BackboneConfig, config["backbone"], "backbone"),
        adapters=build_adapters(config),
        optim=as_config(OptimConfig, config["optim"], "optim"),
        seed=config["seed"],
    )


def build_data(config: Mapping[str, Any]) -> AdapterDataModule:
    """The data module of a composed configuration (plain containers)."""
    data = config["data"]
    settings = {key: data[key] for key in _DATA_MODULE_KEYS if key != "sources"}
    return AdapterDataModule(build_sources(config), **settings)
