"""Checkpoints written whole, read with every byte checked, and errors that name the newest good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from finetuna_lightning.errors import CheckpointError
from finetuna_lightning.training import checkpoint_io
from finetuna_lightning.training.checkpoint_io import SafeCheckpointIO, install, newest_checkpoint, read_checkpoint
from tests.helpers.tiny import tiny_batches, tiny_fit, tiny_module

STATE: dict[str, Any] = {"loops": {}, "optimizer_states": [], "weights": torch.arange(5000.0)}


def write(path: Path, age: int = 0, **more: Any) -> Path:
    """A checkpoint that was written ``age`` seconds ago."""
    SafeCheckpointIO().save_checkpoint(STATE | more, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def spoil(path: Path, how: str) -> Path:
    data = bytearray(path.read_bytes())
    if how == "half written":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    else:
        data[len(data) // 2] ^= 1  # in the tensor: torch.load alone says nothing
    path.write_bytes(data)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "deep/a.ckpt", step=3)
    read = SafeCheckpointIO().load_checkpoint(path)
    assert read["step"] == 3 and torch.equal(read["weights"], STATE["weights"])
    assert [item.name for item in path.parent.iterdir()] == ["a.ckpt"]


def test_an_error_in_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.ckpt", step=1)

    def full(state: Any, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_io.torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        SafeCheckpointIO().save_checkpoint(STATE, path)
    assert read_checkpoint(path)["step"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("how", ["half written", "empty", "one bit"])
def test_a_damaged_file_is_one_line_that_names_the_newest_good_one(tmp_path: Path, how: str) -> None:
    bad = spoil(write(tmp_path / "last.ckpt"), how)
    write(tmp_path / "old.ckpt", age=20)
    good = write(tmp_path / "previous.ckpt", age=10)
    spoil(write(tmp_path / "between.ckpt", age=5), "half written")
    with pytest.raises(CheckpointError, match=rf"last\.ckpt is damaged.*newest good one beside it is {good}") as caught:
        read_checkpoint(bad)
    assert "\n" not in str(caught.value)


def test_without_a_good_one_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; there is no good one beside it"):
        read_checkpoint(tmp_path / "gone.ckpt")


def test_the_newest_is_one_that_a_fit_can_resume_from(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    good = write(tmp_path / "a.ckpt", age=10)
    torch.save({"state_dict": {}, "loops": {}}, tmp_path / "weights.ckpt")
    assert newest_checkpoint(tmp_path) == good


class Thing:
    pass


def test_more_than_plain_values_is_not_unpickled_unasked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", thing=Thing())
    with pytest.raises(CheckpointError, match="is whole but cannot be read as tensors and plain values"):
        SafeCheckpointIO().load_checkpoint(path)
    assert isinstance(SafeCheckpointIO().load_checkpoint(path, weights_only=False)["thing"], Thing)


def test_remote_paths_and_storage_options_go_lightning_s_way(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/a.ckpt"
    SafeCheckpointIO().save_checkpoint({"a": 1}, remote)
    assert SafeCheckpointIO().load_checkpoint(remote) == {"a": 1}
    with pytest.raises(TypeError, match="storage_options"):
        SafeCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "b.ckpt", storage_options={})


def test_a_module_puts_it_in_place_and_every_checkpoint_goes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own callback, without anything said."""
    written: list[str] = []
    original = SafeCheckpointIO.save_checkpoint
    monkeypatch.setattr(
        SafeCheckpointIO,
        "save_checkpoint",
        lambda self, state, path, options=None, storage_options=None: (
            written.append(Path(path).name),
            original(self, state, path),
        ),
    )
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    tiny_fit(tiny_module(tmp_path, {"a": {"rank": 2}}), tiny_batches(["a"], 2), keep, enable_checkpointing=True)
    assert written == ["epoch=0-step=2.ckpt", "last.ckpt"]


@pytest.mark.parametrize("plugin", [AsyncCheckpointIO(), type("Own", (TorchCheckpointIO,), {})()])
def test_a_plugin_of_the_user_s_stays(plugin: Any) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[plugin])
    install(trainer.strategy)
    assert trainer.strategy.checkpoint_io is plugin


def test_lightning_s_own_is_replaced() -> None:
    strategy = SingleDeviceStrategy("cpu")
    install(strategy)
    assert type(strategy.checkpoint_io) is SafeCheckpointIO
