"""Settings are checked where they are written: one line that names the field, what was given and what would work."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from finetuna_lightning.configs import (
    BLOCK_SIZES,
    SCHEMES,
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    OptimConfig,
    as_config,
    check_adapter_name,
    check_adapter_names,
)
from finetuna_lightning.errors import ConfigError, did_you_mean, one_of

CONFIGS = {"adapter": AdapterConfig, "backbone": BackboneConfig, "data": DataConfig, "optim": OptimConfig}
NAN, INF = float("nan"), float("inf")

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("adapter", {"rank": 0}, "adapter.rank must be an integer >= 1, not 0"),
    ("adapter", {"rank": -4}, "adapter.rank must be an integer >= 1, not -4"),
    ("adapter", {"rank": 2.5}, "adapter.rank must be an integer >= 1, not 2.5"),
    ("adapter", {"rank": True}, "adapter.rank must be an integer >= 1, not True"),
    ("adapter", {"rank": "8"}, "adapter.rank must be an integer >= 1, not '8'"),
    ("adapter", {"rank": None}, "adapter.rank must be an integer >= 1, not None"),
    ("adapter", {"alpha": -1}, "adapter.alpha must be a number >= 0, not -1"),
    ("adapter", {"alpha": NAN}, "adapter.alpha must be a number >= 0, not nan"),
    ("adapter", {"alpha": INF}, "adapter.alpha must be a number >= 0, not inf"),
    ("adapter", {"dropout": 1.0}, "adapter.dropout must be a number >= 0 and < 1, not 1.0"),
    ("adapter", {"dropout": -0.1}, "adapter.dropout must be a number >= 0 and < 1, not -0.1"),
    ("adapter", {"lr": "1e-4"}, "adapter.lr must be a number >= 0, not '1e-4'"),
    ("adapter", {"lr": INF}, "adapter.lr must be a number >= 0, not inf"),
    ("adapter", {"weight_decay": -1}, "adapter.weight_decay"),
    ("adapter", {"warmup_steps": 1.5}, "adapter.warmup_steps must be an integer >= 0"),
    (
        "adapter",
        {"schedule": "cosin"},
        "adapter.schedule must be one of constant, linear, cosine, not 'cosin'; did you mean 'cosine'?",
    ),
    ("adapter", {"max_steps": 0}, "adapter.max_steps must be an integer >= 1"),
    ("adapter", {"max_grad_norm": -1.0}, "adapter.max_grad_norm"),
    ("adapter", {"seed": -1}, "adapter.seed"),
    ("adapter", {"target_modules": [3]}, "adapter.target_modules must be a list of module names"),
    ("adapter", {"target_modules": [""]}, "adapter.target_modules must be a list of module names"),
    ("adapter", {"target_modules": None}, "adapter.target_modules must be a list of module names"),
    ("adapter", {"plain_modules": 3}, "adapter.plain_modules must be a list of module names"),
    ("adapter", {"target_modules": []}, "are both empty: nothing would be trained"),
    ("backbone", {"name_or_path": ""}, "backbone.name_or_path must be a hub name or a folder, not ''"),
    ("backbone", {"name_or_path": None}, "backbone.name_or_path"),
    (
        "backbone",
        {"scheme": "int4"},
        "backbone.scheme must be one of int8, int8-blockwise, fp8, none, not 'int4'; did you mean 'int8'?",
    ),
    ("backbone", {"scheme": "int8_blockwise"}, "did you mean 'int8-blockwise'?"),
    (
        "backbone",
        {"block_size": 100},
        "backbone.block_size must be one of (64, 128, 256, 512, 1024, 2048, 4096), not 100",
    ),
    ("backbone", {"task": "causal"}, "backbone.task must be one of causal-lm"),
    ("backbone", {"dtype": "fp16"}, "backbone.dtype must be one of auto, float32, bfloat16, float16"),
    ("backbone", {"num_labels": 0}, "backbone.num_labels"),
    ("backbone", {"skip_modules": [None]}, "backbone.skip_modules"),
    ("data", {"path": ""}, "data.path must name a .txt, .jsonl or .parquet file, not ''"),
    ("data", {"path": None}, "data.path must name"),
    ("data", {"path": "x", "kind": "csv"}, "data.kind must be one of auto"),
    ("data", {"path": "x", "val_fraction": 1.0}, "data.val_fraction must be a number >= 0 and < 1"),
    ("data", {"path": "x", "val_fraction": 0.6, "test_fraction": 0.4}, "together leave nothing to train on"),
    ("data", {"path": "x", "max_length": 1}, "data.max_length must be an integer >= 2"),
    ("data", {"path": "x", "batch_size": 0}, "data.batch_size must be an integer >= 1"),
    ("data", {"path": "x", "limit": 0}, "data.limit must be an integer >= 1"),
    (
        "optim",
        {"name": "adam"},
        "sgd, adafactor, not 'adam'; did you mean 'adamw'?",
    ),
    ("optim", {"betas": [0.9]}, "optim.betas must be two numbers, not [0.9]"),
    ("optim", {"betas": 0.9}, "optim.betas must be two numbers, not 0.9"),
    ("optim", {"betas": [0.9, 1.0]}, "optim.betas must be a number >= 0 and < 1, not 1.0"),
    ("optim", {"eps": -1e-8}, "optim.eps"),
    ("optim", {"betas": []}, "optim.betas must be two numbers, not []"),
    ("optim", {"momentum": 1.0}, "optim.momentum must be a number >= 0 and < 1"),
    ("adapter", {"accumulate": 0}, "adapter.accumulate must be an integer >= 1, not 0"),
    ("adapter", {"max_bad_steps": 0}, "adapter.max_bad_steps must be an integer >= 1"),
    ("adapter", {"optimizer": "lion8bits"}, "adapter.optimizer must be one of"),
    ("adapter", {"betas": [0.9]}, "adapter.betas must be two numbers"),
    ("adapter", {"eps": -1.0}, "adapter.eps must be a number >= 0"),
    ("adapter", {"momentum": -0.1}, "adapter.momentum must be a number >= 0"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG)
def test_a_wrong_value_is_one_line(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        CONFIGS[kind](**fields)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("adapter", {}),
        (
            "adapter",
            {"rank": 1, "alpha": 0, "dropout": 0.999, "lr": 0, "seed": 0, "max_steps": 1, "max_grad_norm": None},
        ),
        ("adapter", {"target_modules": [], "plain_modules": ["lm_head"]}),
        *(("backbone", {"scheme": scheme, "block_size": size}) for scheme in SCHEMES for size in BLOCK_SIZES),
        ("data", {"path": "x", "val_fraction": 0, "test_fraction": 0.9, "max_length": 2}),
        ("optim", {"betas": [0, 0.5], "name": "paged_adamw8bit"}),
    ],
)
def test_a_right_value_is_kept(kind: str, fields: dict[str, Any]) -> None:
    config = CONFIGS[kind](**fields)
    assert {key: getattr(config, key) for key in fields} == fields


def test_a_single_name_stands_for_a_list() -> None:
    assert AdapterConfig(target_modules="q_proj").target_modules == ["q_proj"]  # type: ignore[arg-type]
    assert BackboneConfig(skip_modules=("a", "b")).skip_modules == ["a", "b"]  # type: ignore[arg-type]


def test_no_default_is_shared() -> None:
    first = AdapterConfig()
    first.target_modules.append("x")
    first.plain_modules.append("x")
    assert AdapterConfig().target_modules == ["all-linear"] and AdapterConfig().plain_modules == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_type_is_one_that_omegaconf_and_jsonargparse_take(kind: str) -> None:
    from omegaconf import OmegaConf

    plain = {str, int, float, bool, type(None)}
    for hint in get_type_hints(CONFIGS[kind]).values():
        parts = {hint} if hint in plain else set(get_args(hint))
        assert parts <= plain and (hint in plain or get_origin(hint) is list or type(None) in parts)
    values = {"path": "x"} if kind == "data" else {}
    config = CONFIGS[kind](**values)
    assert as_config(CONFIGS[kind], OmegaConf.to_container(OmegaConf.structured(config))) == config
    assert as_config(CONFIGS[kind], dataclasses.asdict(config)) == config


def test_a_mapping_becomes_a_config() -> None:
    config = AdapterConfig(rank=3)
    assert as_config(AdapterConfig, config) is config
    assert as_config(AdapterConfig, {"rank": 3}) == config
    with pytest.raises(
        ConfigError, match=r"adapters\.sql has no field 'rnk'; did you mean 'rank'\? \(fields: rank, alpha"
    ):
        as_config(AdapterConfig, {"rnk": 3}, "adapters.sql")
    with pytest.raises(ConfigError, match="AdapterConfig must be a AdapterConfig or a mapping of its fields, not 3"):
        as_config(AdapterConfig, 3)
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        as_config(AdapterConfig, {"rank": 0})


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a b", "-a", "_a", "a/b", ".", "a\n", 3, None])
def test_names_that_cannot_be(name: Any) -> None:
    with pytest.raises(ConfigError, match="a letter or digit first"):
        check_adapter_name(name)


@pytest.mark.parametrize(
    ("name", "hint"), [("a.b", "'a_b' would work"), ("../x", "'x' would work"), ("my sql", "'my_sql' would work")]
)
def test_a_name_that_would_work_is_told(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        check_adapter_name(name)


def test_reserved_names() -> None:
    for name in ("forward", "keys", "add", "names", "adopt"):
        with pytest.raises(ConfigError, match=f"'{name}_adapter' would work"):
            check_adapter_name(name)
        check_adapter_name(f"{name}_adapter")


def test_names_differ_by_more_than_case() -> None:
    assert check_adapter_names(["a", "b"]) == ["a", "b"]
    for names in (["a", "a"], ["a", "b", "A"]):
        with pytest.raises(ConfigError, match="is a duplicate of 'a': names must differ"):
            check_adapter_names(names)


def test_hints() -> None:
    assert did_you_mean("q_porj", ["k_proj", "q_proj"]) == "; did you mean 'q_proj'?"
    assert did_you_mean("xyz", ["k_proj"]) == "" and did_you_mean("a", []) == ""
    assert one_of("x", 3, ["a", "b"]) == "x must be one of a, b, not 3"


def test_nothing_but_the_standard_library_is_loaded() -> None:
    libraries = ("torch", "transformers", "lightning")
    code = f"import sys, finetuna_lightning.configs; print([m for m in {libraries} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=__file__.rsplit("/", 2)[0]
    )
    assert out.stdout.strip() == "[]"
