"""``finetuna-estimate``: the configuration of ``finetuna-train``, nothing loaded, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from finetuna_lightning import estimate
from finetuna_lightning.configs import AdapterConfig
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.estimate import Device, arguments, changed, changes, device_of, parse_bytes
from finetuna_lightning.memory_estimate import Sequences
from tests.helpers.runs import language_model

Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setenv("COLUMNS", "200")
    for module in ("module", "data"):
        loader = "load_backbone" if module == "module" else "read_documents"
        monkeypatch.setattr(f"finetuna_lightning.training.{module}.{loader}", lambda *_, **__: pytest.fail("loaded"))

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["finetuna-estimate", *words])
        try:
            estimate.main()
        except SystemExit as error:
            return int(error.code or 0)
        finally:
            HydraConfig.instance().cfg = None
        return 0

    return run


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama") / "m"
    return f"backbone.name_or_path={language_model(folder, num_hidden_layers=3, hidden_size=64, intermediate_size=96)}"


def test_the_quickstart(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("experiment=quickstart", "trainer.accelerator=cpu") == 0
    out = capsys.readouterr().out
    parts = ["backbone, int8", "english: weights", "optimizer state", "activations kept for the backward pass"]
    for said in ("3 adapters, 3,072 tokens a step, cpu", *parts, "working memory", "peak (", "its memory is unknown"):
        assert said in out
    assert list(Path().iterdir()) == []


def test_what_fits(main: Main, backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The data is not read: it need not be there."""
    assert main(backbone, "data.path=gone.txt", "device_memory=1GiB") == 0
    out = capsys.readouterr().out
    assert "1 adapter, 128 tokens a step, cuda" in out
    assert "with the GPU's own context fits" in out and "would fit" in out
    assert "what would help" not in out


def test_what_does_not_fit_and_what_would_help(main: Main, backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    wide = "d: {rank: 64, target_modules: [q_proj]}"  # the others' tensors are too small for state in 8 bits
    adapters = "adapters={a: {}, b: {}, c: {}, " + wide + "}"
    given = [backbone, adapters, "adapter.target_modules=[q_proj]", "trainer.accelerator=cpu", "data.path=gone.txt"]
    assert main(*given, "device_memory=2500KB") == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    for said in ("backbone.gradient_checkpointing=true", "optim=adamw8bit", "data.batch_size=2", "data.max_length=16",
                 "all of these", "1 adapter instead of 4"):  # fmt: skip
        assert said in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "fits" in next(line for line in out.splitlines() if "all of these" in line)
    assert "KiB" in rows["optim=adamw8bit"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["backbone.name_or_pth=x"], "name_or_pth"),
        (["backbone.name_or_path=./gone"], "'./gone' does not exist"),
        (["adapter.target_modules=[q_porj]"], "did you mean 'q_proj'"),
        (["adapter.rank=0"], "adapter.rank"),
        (["data.max_length=100000"], "data.max_length to"),
        (["device_memory=lots"], "device_memory must be a number of bytes"),
        (["+trainer.plugins.0.compute=16bits"], "EightBitPrecision.compute must be one of auto, 16bit, int8, fp8"),
        (["adapter.momentum=0.5"], "adamw does not take it"),
    ],
)
def test_a_mistake_is_one_line(main: Main, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main("data.path=some.txt", *words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("finetuna-estimate: error: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


# ---- from the configuration ------------------------------------------------------------------------------------------


def given(*overrides: str, name: str = "estimate") -> dict[str, Any]:
    with initialize_config_module("finetuna_lightning.conf", version_base="1.3"):
        config = compose(name, [*overrides, "output_dir=."])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def test_the_settings_are_those_of_finetuna_train_and_one_more() -> None:
    ours, theirs = given("experiment=quickstart"), given("experiment=quickstart", name="train")
    assert ours.pop("device_memory") is None
    assert ours == theirs


def test_each_adapter_s_own_sequences(backbone: str) -> None:
    budgets = "c: {path: c, max_tokens: 70}, d: {path: d, max_tokens: 9}"
    sources = f"{{a: {{path: a}}, b: {{path: b, batch_size: 2, max_length: 10}}, {budgets}}}"
    found = arguments(given(backbone, f"data.sources={sources}", "data.batch_size=3", "adapter.rank=3"), "cpu")
    assert found["sequences"] == {
        "a": Sequences(3, 32),
        "b": Sequences(2, 10),
        "c": Sequences(2, 32),
        "d": Sequences(1, 9),
    }
    assert found["adapters"]["a"] == AdapterConfig(rank=3)
    assert found["dtype"] is torch.float32 and found["packed"] is True


def test_a_budget_for_all_and_no_data(backbone: str) -> None:
    found = arguments(given(backbone, "data.max_tokens=64", "data.packing=false"), "cuda")
    assert found["sequences"] == {"adapter": Sequences(2, 32)}
    assert found["dtype"] is torch.bfloat16 and found["packed"] is False
    assert arguments(given(backbone, "backbone.dtype=float16"), "cuda")["dtype"] is torch.float16
    assert found["compute"] == "auto"
    plugin = "+trainer.plugins.0.compute=16bit"
    assert arguments(given(backbone, plugin), "cuda")["compute"] == "16bit"
    config = given(backbone)
    own, other = {"_target_": "finetuna_lightning.EightBitPrecision", "compute": "16bit"}, {"_target_": "Other"}
    for plugins, compute in (
        (None, "auto"),
        ([], "auto"),
        (other, "auto"),
        (["x", other, own], "16bit"),
        (own, "16bit"),
    ):
        config["trainer"]["plugins"] = plugins
        assert arguments(config, "cuda")["compute"] == compute


@pytest.mark.parametrize(
    ("overrides", "kind", "memory"),
    [
        (["trainer.accelerator=cpu", "device_memory=1KiB"], "cpu", 1024),
        (["trainer.accelerator=gpu"], "cuda", None),
        (["device_memory=24GB"], "cuda", 24 * 10**9),
        ([], "cpu", None),
    ],
)
def test_the_device(monkeypatch: pytest.MonkeyPatch, overrides: list[str], kind: str, memory: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(given("data.path=a", *overrides)) == Device(kind, memory)


def test_bytes() -> None:
    sizes = {
        "80GiB": 80 * 2**30,
        "24GB": 24 * 10**9,
        "1.5 MiB": 3 * 2**19,
        "7": 7,
        123: 123,
        8e10: 80 * 10**9,
        "2kb": 2000,
    }
    assert {size: parse_bytes(size) for size in sizes} == sizes
    for wrong in ("", "-1GiB", "GiB", "3 bits", 0, True, None):
        with pytest.raises(ConfigError, match="device_memory must be"):
            parse_bytes(wrong)


def test_only_changes_that_can_help_are_tried(backbone: str) -> None:
    def tried(*overrides: str) -> list[str]:
        config = given(backbone, "data.path=a", *overrides)
        return [change[0] for change in changes(config, arguments(config, "cpu"))]

    assert tried("data.batch_size=1", "backbone.gradient_checkpointing=true", "optim=adamw8bit") == [
        "data.max_length=16"
    ]
    assert "optim=lion8bit" in tried("optim=lion8bit", "optim.name=lion")
    assert "optim=adamw8bit" not in tried("adapter.optimizer=sgd")
    assert "data.max_tokens=32" in tried("data.max_tokens=64")


def test_a_change_leaves_the_rest() -> None:
    config = given("data.path=a")
    new = changed(config, ("", "data", "batch_size", 1), ("", "optim", "name", "lion"))
    assert (new["data"]["batch_size"], new["optim"]["name"]) == (1, "lion")
    assert (config["data"]["batch_size"], config["optim"]["name"]) == (4, "adamw")
