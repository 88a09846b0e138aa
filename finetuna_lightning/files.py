"""Writing files and folders so that a process killed at any moment leaves the old state or the new one, whole; and the
folder of what can be made again."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def cache_folder() -> Path | None:
    """Where kernels are kept that were compiled on this machine: ``FINETUNA_CACHE``, or the user's own cache."""
    own, everyone = os.environ.get("FINETUNA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = own or os.path.join(everyone or os.path.expanduser("~/.cache"), "finetuna_lightning")
    return None if folder.startswith("~") else Path(folder).absolute()  # a user without a home keeps nothing


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step (Linux's renameat2); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
    return bool(result == 0)


def _beside(target: Path) -> Path:
    """A path beside ``target`` for this process to write; what killed processes left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.*"):
        pid, kind = left.name.split(".")[-2:]
        if kind not in ("tmp", "old") or not pid.isdigit() or int(pid) == os.getpid() or _alive(int(pid)):
            continue
        if kind == "old" and not target.exists():
            os.rename(left, target)  # its writer died between the two renames of a system that cannot exchange
        else:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return target.parent / f".{target.name}.{os.getpid()}.tmp"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to fill; at the end of the block it takes ``path``'s place at once. On an error nothing changes.

    Example:
        with replacing_folder("adapters/sql") as folder:
            (folder / "adapter_config.json").write_text(text)
    """
    target = Path(path)
    beside = _beside(target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        readable = 0o666 & ~_umask()  # safetensors writes files that only their owner reads
        for item in (*beside.rglob("*"), beside):
            if item.is_file():
                item.chmod(readable)
            _sync(item)
        if target.exists() and not _exchange(beside, target):
            old = target.parent / f".{target.name}.{os.getpid()}.old"
            os.rename(target, old)
            try:
                os.rename(beside, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        elif beside.exists() and not target.exists():
            os.rename(beside, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write; at the end of the block it takes ``path``'s place at once. On an error nothing changes."""
    target = Path(path)
    beside = _beside(target)
    try:
        yield beside
        _sync(beside)
        os.replace(beside, target)
        _sync(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def keep_as(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """Have the file ``path`` under the name ``other`` too, in ``other``'s place: at every moment ``path``, or where the
    file system knows no hard links ``other``, is there."""
    target = Path(other)
    beside = _beside(target)
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        os.replace(path, target)
    else:
        os.replace(beside, target)
    _sync(target.parent)
