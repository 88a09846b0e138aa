"""Two processes on the CPU under Lightning's DDP: the adapters of one process on the same batches, and little sent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.peft_io import load_folder
from finetuna_lightning.training.distributed import check_strategy
from tests.helpers.runs import language_model, text_file
from tests.resilience import ddp
from tests.resilience.kills import flat

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ddp")
    language_model(path / "llama")
    for name in ddp.ADAPTERS:
        text_file(path / f"{name}.txt", name, lines=12)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    """By number of processes, what each scenario came to."""
    program = [sys.executable, "-m", "tests.resilience.ddp", str(folder), "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    alone = {name: ddp.run(folder, 1, *scenario) for name, scenario in ddp.SCENARIOS.items()}
    return {1: alone, 2: torch.load(folder / "2.pt", weights_only=False)}


def largest(mine: dict[Any, Any], theirs: dict[Any, Any]) -> float:
    assert mine.keys() == theirs.keys() != set()
    return max(float(abs(torch.as_tensor(mine[key]) - torch.as_tensor(theirs[key])).max()) for key in mine)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `srun` command")
@pytest.mark.parametrize("scenario", ddp.SCENARIOS)
def test_two_processes_train_the_adapters_of_one(found: dict[int, dict[str, Any]], scenario: str) -> None:
    one, two = found[1][scenario], found[2][scenario]
    for what in ("weights", "train", "val", "best"):
        assert largest(one[what], two[what]) < 1e-6, what
    assert largest(one["norms"], two["norms"]) < 1e-5
    assert max(one["norms"].values()) > 0.01  # so that a wrong scale is seen
    assert two["rows"] == (one["rows"] + 1) // 2


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ddp.SCENARIOS)
def test_only_adapters_travel(found: dict[int, dict[str, Any]], scenario: str) -> None:
    """At the start their weights, once; in a step their gradients. The rest are a few sums and names."""
    two = found[2][scenario]
    assert two["bytes"].pop("_broadcast_coalesced") == two["adapter bytes"]
    assert two["reducer"]["total_parameter_size_bytes"] == two["adapter bytes"]
    assert sum(two["bytes"].values()) < two["backbone bytes"] / 2


@pytest.mark.slow
def test_processes_with_different_backbones_are_refused(found: dict[int, dict[str, Any]]) -> None:
    assert found[1]["joint"]["refused"] == ""
    assert found[2]["joint"]["refused"].endswith("different backbones: fingerprints by rank are that of 0, that of 1")


@pytest.mark.slow
def test_the_first_process_writes_the_folders(found: dict[int, dict[str, Any]], folder: Path) -> None:
    for name in ddp.ADAPTERS:
        mine = flat(load_folder(folder / "2-sql-legal-chat/adapters" / name / "last"))
        theirs = flat(load_folder(folder / "1-sql-legal-chat/adapters" / name / "last"))
        assert largest(mine, theirs) < 1e-6
    assert (folder / "2-sql-legal-chat/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy("cpu"), DDPStrategy()])
def test_strategies_that_are_supported(strategy: Any) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = strategy
    check_strategy(trainer)


def test_a_strategy_that_shards_is_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ConfigError, match=r"FSDPStrategy is not supported: .* use Trainer\(strategy='ddp'\)"):
        check_strategy(trainer)
