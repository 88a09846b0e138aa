"""glibc's heap while a model is trained on the CPU: what a step frees stays with the process for the next step.

By itself glibc maps every block of 32 MiB and more anew, and gives the end of its heap back whenever much of it is
free. Each page is then a fault, and is zeroed, when it is next written: up to 50,000 a step of a 100M model, the same
ones in every step. Other platforms' allocators are left alone."""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h
# What glibc comes to by itself where blocks are large: once told anything, it adapts its thresholds no more.
_USUAL = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}

_lock, _keepers = threading.Lock(), 0


@cache
def _glibc() -> Any:
    """The C library, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep() -> None:
    """Give nothing back to the system until ``give_back`` was called as often as this."""
    global _keepers
    with _lock:
        _keepers += 1
        if _keepers == 1 and (library := _glibc()) is not None:
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, -1)  # never


def give_back() -> None:
    """The end of one ``keep``; with the last one, what is free goes back to the system."""
    global _keepers
    with _lock:
        _keepers -= 1
        if _keepers == 0 and (library := _glibc()) is not None:
            for option, value in _USUAL.items():
                library.mallopt(option, value)
            library.malloc_trim(0)
