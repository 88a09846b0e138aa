"""Reading and writing the trainer's state: whole or not at all.

Lightning writes a checkpoint straight to its place, so a process killed meanwhile leaves a file that nothing can load;
and torch reads a file with flipped bytes without a word. Here a file is written beside, synced and renamed, and every
byte is checked against the archive's own checksums before it is used.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from finetuna_lightning.errors import CheckpointError
from finetuna_lightning.files import replacing_file

SUFFIX = ".ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's ``CheckpointIO`` for local files that survive a kill at any moment; remote paths go Lightning's way.

    ``MultiAdapterModule`` puts it in the place of Lightning's own, so every ``ModelCheckpoint`` and
    ``trainer.save_checkpoint`` writes through it. A plugin that a user chose stays.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, sync, rename. On an error the old file stands."""
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing_file(path) as beside:
            torch.save(checkpoint, beside)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """``read_checkpoint``; ``weights_only=None`` is True."""
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location, weights_only is not False)


def install(strategy: Strategy) -> None:
    """Have ``strategy`` read and write through ``SafeCheckpointIO``, unless a plugin was chosen."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = SafeCheckpointIO()


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The checkpoint in ``path``, after its checksums were compared.

    Raises:
        CheckpointError: for a file that is missing, half written, damaged, or that holds more than tensors and plain
            values; it names the newest good checkpoint beside it.
    """
    path = Path(path)
    fault = _fault(path)
    if fault:
        other = newest_checkpoint(path.parent, ignoring=[path])
        near = f"the newest good one beside it is {other}" if other else "there is no good one beside it"
        raise CheckpointError(f"checkpoint {path} {fault}; {near}")
    try:
        found: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"checkpoint {path} is whole but cannot be read as tensors and plain values: {why}"
        ) from error
    return found


def newest_checkpoint(folder: str | Path, ignoring: list[Path] | None = None) -> Path | None:
    """The checkpoint in ``folder`` that was written last among those that can be resumed from; None without any."""
    found = [path for path in Path(folder).glob(f"*{SUFFIX}") if path not in (ignoring or [])]
    for path in sorted(found, key=_written, reverse=True):
        if _fault(path) is None and _can_resume(path):
            return path
    return None


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a checkpoint whose every byte is as it was written."""
    return _fault(path) is None


def _written(path: Path) -> tuple[int, str]:
    """When, for sorting; a file that is renamed meanwhile comes last."""
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def _fault(path: Path) -> str | None:
    """What is wrong with a file, as the end of a sentence; None for one that is whole."""
    if not path.is_file():
        return "does not exist"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged directory raises many kinds
        return f"is damaged or half written ({error})"
    return None if broken is None else f"is damaged (checksum of {broken!r})"


def _can_resume(path: Path) -> bool:
    """Whether a whole file holds what a fit needs, and not weights alone."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(state, dict) and "loops" in state and "optimizer_states" in state


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
