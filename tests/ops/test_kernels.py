"""The Triton kernels, in Triton's interpreter on the CPU; tests/gpu has them on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, whose interpreter runs the kernels on the CPU")
def test_the_kernels_under_the_interpreter_agree_with_float64() -> None:
    """In a process of its own: what Triton decorates is interpreted or compiled as the environment says at import."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-m", "tests.helpers.kernels"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr
