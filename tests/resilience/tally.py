"""The full counts, in one table: 20 resumes, 100 kills, 20 SIGTERMs.

python -m tests.resilience.tally
python -m tests.resilience.tally --resumes 5 --kills 10 --stops 5 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")


def resume_often(folder: Path, resumes: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Resume from ``resumes`` states saved at random hooks of random batches; where, and every difference."""
    from tests.resilience.runs import SaveAt, faults, reference, resumed

    saver, tally, found = SaveAt(folder / "states"), Counter[str](), []
    whole = reference(folder, saver)
    last = max(batch for _, batch, _ in saver.saved)
    states = [state for state in saver.saved if state[1] < last]  # after the last batch there is nothing to resume
    draw = random.Random(seed)
    for _ in range(resumes):
        hooks = sorted({hook for hook, *_ in states})
        hook = draw.choice(hooks)
        state = draw.choice([state for state in states if state[0] == hook])
        states.remove(state)
        _, batch, path = state
        wrong = faults(hook, batch, whole, resumed(folder, path))
        tally["resumes"] += 1
        tally[f"saved in: {hook}"] += 1
        tally["bit-exact: weights, optimizer, losses and validations to come"] += not wrong
        found += [f"{hook} {batch}: {wrong[:3]}"] if wrong else []
    return tally, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("resumes", 20), ("kills", 100), ("stops", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import lightning
    import torch
    import transformers

    from tests.resilience.kills import kill_often, stop_often, truth

    for name in ("lightning.pytorch", "lightning.fabric", *logging.root.manager.loggerDict):
        if name.startswith("lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    bad = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        known = truth(folder)
        work = (
            ("kill -9", lambda: kill_often(folder, given.kills, given.seed, known)),
            ("SIGTERM", lambda: stop_often(folder, given.stops, given.seed, known)),
            ("resume", lambda: resume_often(folder, given.resumes, given.seed)),  # last: it trains in this process
        )
        print(
            f"torch {torch.__version__}, lightning {lightning.__version__}, {os.cpu_count()} cores, seed {given.seed}"
        )
        for what, run in work:
            began = time.monotonic()
            tally, found = run()
            print(f"\n{what} ({time.monotonic() - began:.0f} s)")
            for line, count in tally.items():
                print(f"  {count:4d}  {line}")
            print(f"  {len(found):4d}  faults", *found[:20], sep="\n        ", flush=True)
            bad |= bool(found)
    sys.exit(bad)


if __name__ == "__main__":
    main()
