"""Folders and files replaced at once: an error, or a kill at any moment, leaves the old one or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetuna_lightning import files
from finetuna_lightning.files import keep_as, replacing_file, replacing_folder


def content(folder: Path) -> dict[str, str]:
    return {str(item.relative_to(folder)): item.read_text() for item in folder.rglob("*") if item.is_file()}


def write(folder: Path, text: str) -> None:
    with replacing_folder(folder) as beside:
        (beside / "config.json").write_text(text)
        (beside / "deep").mkdir()
        (beside / "deep" / "weights").write_text(text * 2)


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "x")
    assert content(tmp_path / "a") == {"b/config.json": "x", "b/deep/weights": "xx"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda left, right: False)
    write(tmp_path / "a", "old")
    (tmp_path / "a" / "left-over").write_text("gone tomorrow")
    write(tmp_path / "a", "new")
    assert content(tmp_path) == {"a/config.json": "new", "a/deep/weights": "newnew"}
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("there", [True, False])
def test_what_a_writer_killed_between_two_renames_set_aside_comes_back(tmp_path: Path, there: bool) -> None:
    """On systems that cannot exchange two paths in one step."""
    write(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / f".a.{dead_process()}.old")
    if there:
        write(tmp_path / "b", "new")
        (tmp_path / "b").rename(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "a"):
        raise ZeroDivisionError
    assert content(tmp_path)["a/config.json"] == ("new" if there else "old")
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_kept_under_another_name(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    last, previous = tmp_path / "last", tmp_path / "previous"
    last.write_text("2")
    previous.write_text("1")
    if not links:

        def refused(*_: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refused)
    keep_as(last, previous)
    assert previous.read_text() == "2"
    assert last.exists() == links
    with replacing_file(last) as beside:
        beside.write_text("3")
    assert (last.read_text(), previous.read_text()) == ("3", "2")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["last", "previous"]


def test_inside_the_block_the_old_one_still_stands(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with replacing_folder(tmp_path / "a") as beside:
        assert beside.parent == tmp_path and beside != tmp_path / "a" and not list(beside.iterdir())
        assert content(tmp_path / "a")["config.json"] == "old"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_the_block_the_old_one_stands(
    tmp_path: Path, error: type[BaseException], there: bool
) -> None:
    if there:
        write(tmp_path / "a", "old")
    before = content(tmp_path)
    with pytest.raises(error), replacing_folder(tmp_path / "a") as beside:
        (beside / "config.json").write_text("half")
        raise error
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == there


def test_after_an_error_in_the_second_rename_the_old_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two folders cannot be exchanged in one step."""
    write(tmp_path / "a", "old")
    before, rename = content(tmp_path), os.rename
    monkeypatch.setattr(files, "_exchange", lambda left, right: False)

    def failing(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".tmp"):
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        write(tmp_path / "a", "new")
    assert content(tmp_path) == before


def test_what_a_killed_process_left_does_not_get_in(tmp_path: Path) -> None:
    stale = tmp_path / f".a.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "rubbish").write_text("x")
    write(tmp_path / "a", "new")
    assert content(tmp_path) == {"a/config.json": "new", "a/deep/weights": "newnew"}


def test_files_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, exchange, replace, rename = files._sync, files._exchange, os.replace, os.rename
    monkeypatch.setattr(files, "_sync", lambda path: events.append(f"sync {path.name}") or sync(path))
    monkeypatch.setattr(files, "_exchange", lambda *a: events.append("rename") or exchange(*a))
    monkeypatch.setattr(os, "replace", lambda *a: events.append("rename") or replace(*a))
    monkeypatch.setattr(os, "rename", lambda *a: events.append("rename") or rename(*a))
    for _ in range(2):
        events.clear()
        write(tmp_path / "a", "x")
        at = events.index("rename")
        assert {"sync config.json", "sync weights", "sync deep"} <= set(events[:at])
        assert f"sync {tmp_path.name}" in events[at:]
    events.clear()
    with replacing_file(tmp_path / "f") as beside:
        beside.write_text("x")
    assert events == [f"sync {beside.name}", "rename", f"sync {tmp_path.name}"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "f"
    for text in ("old", "new"):
        with replacing_file(target) as beside:
            beside.write_text(text)
            assert text == "old" or target.read_text() == "old"
        assert target.read_text() == text
    assert [item.name for item in target.parent.iterdir()] == ["f"]


def test_after_an_error_the_old_file_stands(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(ValueError), replacing_file(tmp_path / "f") as beside:
        beside.write_text("half")
        raise ValueError
    with pytest.raises(FileNotFoundError), replacing_file(tmp_path / "f"):
        pass  # nothing was written
    assert content(tmp_path) == {"f": "old"}


WRITER = """
import itertools, sys
sys.path.insert(0, {root!r})
from finetuna_lightning.files import replacing_file, replacing_folder
print("ready", flush=True)
for turn in itertools.count():
    text = f"{{turn}}," * 5000
    with replacing_folder({folder!r}) as beside:
        for part in range(3):
            (beside / f"part{{part}}").write_text(text)
    with replacing_file({file!r}) as beside:
        beside.write_text(text)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="two folders are exchanged in one step on Linux only")
def test_a_killed_process_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    script = WRITER.format(root=str(Path(files.__file__).parents[1]), folder=str(folder), file=str(file))
    draw = random.Random(0)
    turns = []
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 20
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGKILL)
        texts = [(folder / f"part{part}").read_text() for part in range(3)]
        assert len(list(folder.iterdir())) == 3 and len(set(texts)) == 1
        for text in (texts[0], file.read_text()):
            turn = text.split(",", 1)[0]
            assert text == f"{turn}," * 5000
            turns.append(int(turn))
    assert max(turns) > 1  # they were killed in the middle of the work


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, mine = tmp_path / f".x.{gone.pid}.tmp", tmp_path / f".x.{os.getppid()}.tmp"
    dead.mkdir()
    mine.mkdir()
    with replacing_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("new")
    assert not dead.exists() and mine.exists()


def test_files_are_readable_by_all_that_the_umask_allows(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with replacing_folder(tmp_path / "x") as folder:
            (folder / "file").touch(mode=0o600)
    finally:
        os.umask(mask)
    assert (tmp_path / "x" / "file").stat().st_mode & 0o777 == 0o644
