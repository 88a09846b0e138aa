"""From a composed configuration to objects: defaults merged, names derived, mistakes found before any loading."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest

from finetuna_lightning.build import (
    adapter_names,
    build_adapters,
    build_data,
    build_module,
    build_sources,
    check_samples,
)
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig, OptimConfig
from finetuna_lightning.errors import ConfigError


def config(**changes: Any) -> dict[str, Any]:
    """A composed configuration; ``data`` is merged, the other keys replaced."""
    data = asdict(DataConfig("files/some text.txt"))
    data |= {"batch_size": 4, "eval_batch_size": 8, "max_tokens": 99, "packing": False, "sources": None}
    whole = {
        "backbone": asdict(BackboneConfig("somewhere", scheme="fp8")),
        "adapter": asdict(AdapterConfig(rank=3, lr=0.5)),
        "adapters": None,
        "optim": asdict(OptimConfig("adamw8bit")),
        "data": data | changes.pop("data", {}),
        "samples": None,
        "seed": 7,
    }
    return deepcopy(whole | changes)


TWO = {"sql": {"path": "sql.txt"}, "legal": {"path": "legal.txt", "batch_size": 2, "kind": "text"}}


@pytest.mark.parametrize("nothing", [None, {}])
def test_one_file_names_its_adapter(nothing: Any) -> None:
    def name(path: str) -> list[str]:
        return adapter_names(config(adapters=nothing, data={"sources": nothing, "path": path}))

    assert name("files/some text.txt") == ["some_text"]
    assert name("a.b.jsonl") == ["a_b"]
    assert name("quickstart:english") == ["english"]
    assert name("/data/---.txt") == ["adapter"]


def test_adapters_name_themselves_else_their_sources_do() -> None:
    assert adapter_names(config(adapters={"b": None, "a": {}})) == ["b", "a"]
    assert adapter_names(config(data={"sources": TWO})) == ["sql", "legal"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": None}}, "no data: set data.path=FILE"),
        ({"adapters": {"a.b": {}}}, "adapter name 'a.b' is not allowed.*'a_b' would work"),
        ({"adapters": {"../x": {}}}, "'../x' is not allowed.*'x' would work"),
        ({"adapters": {"forward": {}}}, "'forward' is not allowed.*'forward_adapter' would work"),
        ({"adapters": {"": {}}}, "'' is not allowed"),
        ({"adapters": {1: {}}}, "1 is not allowed.*'1' would work"),
        ({"adapters": {"a": {}, "A": {}}}, "'A' is a duplicate of 'a'"),
        ({"adapters": {"sql": {}}, "data": {"sources": {"sqll": {}}}}, "has 'sqll', which is no adapter.*mean 'sql'"),
        ({"data": {"path": "quickstart:forward"}}, "'forward' is not allowed"),
    ],
)
def test_names_are_checked_first(changes: dict[str, Any], message: str) -> None:
    for build in (adapter_names, build_adapters, build_sources, build_module, build_data):
        with pytest.raises(ConfigError, match=message):
            build(config(**changes))


def test_an_adapter_has_what_all_have_and_its_own_changes() -> None:
    found = build_adapters(config(adapters={"a": {"rank": 5, "lr": 0.1}, "b": None, "c": {}}))
    assert found["a"] == AdapterConfig(rank=5, lr=0.1)
    assert found["b"] == found["c"] == AdapterConfig(rank=3, lr=0.5)


def test_a_source_has_what_all_have_and_its_own_changes() -> None:
    found = build_sources(config(data={"sources": TWO, "max_length": 9}))
    assert found["sql"] == DataConfig("sql.txt", max_length=9)
    assert found["legal"] == DataConfig("legal.txt", max_length=9, batch_size=2, kind="text")
    shared = build_sources(config(adapters={"a": {}, "b": {}}, data={"sources": {"b": {"path": "own.txt"}}}))
    assert (shared["a"].path, shared["b"].path) == ("files/some text.txt", "own.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"x": {"rnk": 2}}}, "adapters.x has no field 'rnk'; did you mean 'rank'"),
        ({"adapters": {"x": 2}}, "adapters.x must be a mapping of settings, not 2"),
        ({"adapters": {"x": {"rank": 0}}}, "rank must be an integer >= 1, not 0"),
        ({"adapters": {"x": {"rank": 2.5}}}, "rank must be an integer >= 1, not 2.5"),
        ({"adapters": {"x": {"target_modules": [], "plain_modules": []}}}, "nothing would be trained"),
    ],
)
def test_a_wrong_adapter_says_where(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module(config(**changes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": {"x": {"pth": "a"}}}, "data.sources.x has no field 'pth'; did you mean 'path'"),
        ({"sources": {"x": "a.txt"}}, "data.sources.x must be a mapping of settings, not 'a.txt'"),
        ({"sources": {"x": {}}, "path": None}, "adapter 'x' has no data: set data.sources.x.path=FILE"),
        ({"kind": "txt"}, "data.kind must be one of .*did you mean 'text'"),
        ({"batch_size": 0}, "data.batch_size must be an integer >= 1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be an integer >= 1"),
        ({"max_tokens": 0}, "data.max_tokens must be an integer >= 1"),
        ({"packing": "yes"}, "data.packing must be true, false or null, not 'yes'"),
        (
            {"sources": {"x": {"path": "a.txt", "max_tokens": 9, "batch_size": 2}}},
            "has data.batch_size or data.max_tokens",
        ),
    ],
)
def test_wrong_data_says_where(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_data(config(data=data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": asdict(BackboneConfig()) | {"scheme": "int7"}}, "backbone.scheme must be one of .*mean 'int8'"),
        ({"backbone": asdict(BackboneConfig()) | {"schem": "int8"}}, "backbone has no field 'schem'.*mean 'scheme'"),
        (
            {"backbone": asdict(BackboneConfig()) | {"name_or_path": None}},
            "name_or_path must be a hub name or a folder",
        ),
        ({"optim": {"name": "adamw", "bets": [0, 0]}}, "optim has no field 'bets'.*mean 'betas'"),
        ({"seed": "x"}, "seed must be an integer >= 0, not 'x'"),
    ],
)
def test_a_wrong_backbone_optimizer_or_seed_says_so(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module(config(**changes))


def test_the_module_has_every_part_of_the_configuration() -> None:
    module = build_module(config(adapters={"a": {}, "b": {"seed": 1}}))
    assert module.backbone_config == BackboneConfig("somewhere", scheme="fp8")
    assert list(module.adapter_configs) == ["a", "b"]
    assert module.optim_config == OptimConfig("adamw8bit")
    assert (module.seed, module.adapter_configs["b"].seed) == (7, 1)
    assert module.backbone is None  # nothing is loaded


def test_the_data_module_has_the_batch_sizes() -> None:
    data = build_data(config(data={"sources": TWO}))
    assert (data.batch_size, data.eval_batch_size, data.max_tokens, data.packing) == (4, 8, 99, False)
    assert {name: source.batch_size for name, source in data.sources.items()} == {"sql": None, "legal": 2}


def test_samples_are_for_adapters() -> None:
    check_samples(config())
    check_samples(config(adapters={"sql": {}}, samples={"sql": "SELECT"}))
    with pytest.raises(ConfigError, match="samples has 'sqll', which is no adapter; did you mean 'sql'"):
        check_samples(config(adapters={"sql": {}}, samples={"sqll": "SELECT"}))
