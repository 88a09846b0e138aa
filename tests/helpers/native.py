"""With the CPU's own kernels, and as on a machine that has none."""

from __future__ import annotations

import os

import pytest

from finetuna_lightning.ops import native

WAYS = ["own kernels", "plain torch"]


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the rest of a test go one of the ``WAYS``."""
    if way == "plain torch":
        monkeypatch.setattr(native, "available", lambda: False)
    else:
        need()


def need() -> None:
    """Skip a test of the kernels where there is no compiler; where there is one, they have to be there."""
    if os.environ.get("FINETUNA_CPU_KERNELS", "") == "0":
        pytest.skip("FINETUNA_CPU_KERNELS=0")
    try:
        native._compiler()
    except native._Unavailable as obstacle:
        pytest.skip(f"the CPU's own kernels need g++: {obstacle}")
    assert native.available()
