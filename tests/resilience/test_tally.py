"""A handful of kills and SIGTERMs; ``python -m tests.resilience.tally`` makes the full counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kills_and_stops_lose_nothing() -> None:
    """In a process of its own: one that has trained is not to be forked."""
    few = ["--kills", "4", "--stops", "2", "--resumes", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.resilience.tally", *few]
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert {"4 kills", "2 SIGTERMs", "1 resumes"} < set(lines)
    assert lines.count("0 faults") == 3
