"""The heap during a fit on the CPU: glibc is told once to keep what is freed, and its own ways again at the end."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest

from finetuna_lightning.ops import heap

SIZE = 48 << 20  # more than glibc ever keeps by itself
glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="no glibc"
)


class Told:
    """A C library that writes down what it is told."""

    def __init__(self) -> None:
        self.options: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, option: int, value: int) -> int:
        self.options[option] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    library = Told()
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    yield library


def test_the_first_keeps_and_the_last_gives_back(told: Told) -> None:
    heap.keep()
    heap.keep()
    assert told.options == {-4: 0, -1: -1}
    heap.give_back()
    assert told.options == {-4: 0, -1: -1} and not told.trimmed
    heap.give_back()
    assert told.options == {-4: 65536, -3: 32 << 20, -1: 64 << 20} and told.trimmed == 1


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.keep()
    heap.give_back()


FAULTS = f"""
import resource, torch
from finetuna_lightning.ops import heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({SIZE}, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

heap.keep()
faults()
kept = faults()
heap.give_back()
print(kept, faults())
"""


@glibc
def test_freed_memory_is_written_again_without_faults() -> None:
    """In a process of its own: what has been allocated before, and by which thread, has its say."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 100 and given_back > 1000
