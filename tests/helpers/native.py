"""With the CPU's own kernels, and as on a machine that has none."""

from __future__ import annotations

import pytest

from finetuna_lightning.ops import native

WAYS = ["own kernels", "plain torch"]


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the rest of a test go one of the ``WAYS``; it is skipped where there is no compiler."""
    if way == "plain torch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the CPU's own kernels need g++")
