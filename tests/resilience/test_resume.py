"""A run that goes on from any state of it ends as if it had never stopped: every bit of weights, optimizer and losses.

``python -m tests.resilience.tally`` counts 20 random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.resilience.runs import HOOKS, SaveAt, faults, reference, resumed

pytestmark = pytest.mark.filterwarnings("ignore:There is a wandb run already")

CASES: dict[str, dict[str, Any]] = {
    "by steps": {},
    "by epochs": dict(max_steps=-1, max_epochs=2, check_val_every_n_epoch=1, val_check_interval=None),
    "by epochs, three batches a step": dict(
        max_steps=-1, max_epochs=2, check_val_every_n_epoch=1, val_check_interval=0.5, accumulate_grad_batches=3
    ),
    "by steps, validated by epochs": dict(check_val_every_n_epoch=1, val_check_interval=None),
}
# An epoch has 16 batches. 2: in an accumulation; 14: a validation in the middle; 15: an epoch's last; 16: the next
BATCHES = (2, 14, 15, 16)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact_wherever_the_state_was_saved(tmp_path: Path, case: str) -> None:
    saver = SaveAt(tmp_path / "states", lambda hook, batch: batch in BATCHES)
    whole = reference(tmp_path, saver, **CASES[case])
    assert {hook for hook, *_ in saver.saved} == set(HOOKS)
    wrong = {}
    for hook, batch, path in saver.saved:
        found = faults(hook, batch, whole, resumed(tmp_path, path, **CASES[case]))
        if found:
            wrong[hook, batch] = found[:3]
    assert not wrong
