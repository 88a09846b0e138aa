"""W1 to W5 of the design, several in one process over one random backbone, beside peers in the order A B A B.

    python -m benchmarks.gpu w1 w2 w3 w4 w5 --steps 8 --peers
    python -m benchmarks.gpu w1 w2 --peers int8+liger,bf16 --rounds 1 --compute 16bit
    python -m benchmarks.gpu w1 roofline --compute int8      # see benchmarks.roofline
    python -m benchmarks.gpu w1 w2 w3 w4 w5 --tiny           # a small shape, on this machine's CPU

First, on a cut of two layers, each workload is checked (the roofline as W1, W5 at its first number of adapters above
one): an adapter in company against the same one alone, and against plain torch over the dequantised weights. A workload
that fails gets no ratio. ``--budget`` starts no new run after so many seconds; what ran is shown."""

from __future__ import annotations

import argparse
import ast
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from benchmarks import equality, peers, roofline
from benchmarks.common import LLAMA_3_8B, TINY, SharedBackbone, default_device, machine, show
from benchmarks.ours import COLUMNS, Figures, Settings, gib, run
from benchmarks.workloads import Workload, growing, workload

KEYS = ("w1", "w2", "w3", "w4", "w5", "roofline")
OURS = "ours"


def parser_of(description: str | None = __doc__) -> argparse.ArgumentParser:
    """The options, without the workloads' names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--tokens", type=int, default=None, help="of a sequence of W1 and W2; default: 1024")
    parser.add_argument("--adapters", type=int, default=None, help="of W1 and W3, other than 8 and 64")
    parser.add_argument("--layers", type=int, default=None, help="other than the shape's 32")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--compute", default="auto", help="as EightBitPrecision's: auto, int8, 16bit, fp8")
    parser.add_argument("--optim", default="adamw8bit")
    more = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--precision", help="another argument of EightBitPrecision, several times", **more)
    parser.add_argument("--module", help="another argument of MultiAdapterModule, several times", **more)
    parser.add_argument("--fresh", action="store_true", help="a new backbone for each run instead of a shared one")
    parser.add_argument("--padded", action="store_true", help="rows with pads instead of one packed row")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in every workload")
    parser.add_argument("--tiny", action="store_true", help="2 layers of 64 features, sequences of 32 tokens")
    parser.add_argument("--rounds", type=int, default=None, help="A B A B: 2; default: 2 with peers, else 1")
    parser.add_argument("--peers", nargs="?", const="all", default="", help=f"all, or of {','.join(peers.PEERS)}")
    parser.add_argument("--peer-steps", type=int, default=6, help="timed steps of a peer")
    parser.add_argument("--peer-recompute", action="store_true", help="peers also with recomputed activations")
    parser.add_argument("--counts", default="1,8,32,64", help="W5: numbers of adapters")
    parser.add_argument("--kernels", type=int, default=20, help="roofline: how many to list")
    parser.add_argument("--no-check", action="store_true", help="no equality check, and so no ratios")
    parser.add_argument("--budget", type=float, default=math.inf, help="start no new run after so many seconds")
    return parser


@dataclass
class Bench:
    """One process: its options, its backbone, and what has been measured.

    ``found``: by workload, by who ran it (with the mode), the figures of each round. ``equal``: by workload.
    """

    given: argparse.Namespace
    began: float = field(default_factory=time.perf_counter)
    found: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    equal: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.given
        self.device = default_device()
        self.shape: dict[str, Any] = TINY if given.tiny else LLAMA_3_8B
        self.tokens = given.tokens or (32 if given.tiny else 1024)
        self.shared = SharedBackbone(self.shape, given.scheme, self.device, given.layers)
        self.settings = Settings(
            given.steps, given.warmup, given.compute, given.scheme, given.optim, not given.padded, given.recompute,
            arguments_of(given.precision), arguments_of(given.module), given.fresh,
        )  # fmt: skip

    def late(self) -> bool:
        """Whether the budget is spent."""
        return time.perf_counter() - self.began > self.given.budget

    def note(self, key: str, who: str, figures: Figures) -> None:
        """Keep the figures of a run, and print them: a process that is stopped has shown what it had."""
        self.found.setdefault(key, {}).setdefault(who, []).append(figures)
        cells = ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, figures.cells(), strict=True) if cell)
        print(f"[{time.perf_counter() - self.began:5.0f} s] {key} {who}: {cells}", flush=True)

    # ---- runs ----

    def check(self, works: list[Workload]) -> None:
        """The equality checks."""
        cut = SharedBackbone(self.shape, self.given.scheme, self.device, layers=2)
        for work in works:
            result = equality.check(cut, work, self.settings)
            equality.table(result)
            self.equal[work.key] = result.passed
        cut.free()

    def ours(self, work: Workload) -> None:
        """One round of ours: W2 without and with recomputed activations."""
        modes = {False, True} if work.key == "w2" else {self.given.recompute}
        for recompute in sorted(modes):
            if not self.late():
                given = replace(self.settings, recompute=recompute)
                self.note(work.key, label(OURS, recompute), run(self.shared, work, given))

    def peer(self, name: str, works: list[Workload]) -> None:
        """One round of a peer over all workloads that it runs."""
        modes = [False, True] if self.given.peer_recompute else [self.given.recompute]
        jobs = [(work.key, work.peer, recompute) for work in works if work.peer for recompute in modes]
        if jobs and not self.late():
            for key, recompute, figures in peers.run(name, self.shape, self.given.layers, self.device, jobs,
                                                     self.given.warmup, self.given.peer_steps):  # fmt: skip
                self.note(key, label(name, recompute), figures)

    def series(self) -> None:
        """W5: at each number of adapters, and with one more."""
        counts, tokens = self.grown()
        given = replace(self.settings, steps=2, warmup=2)
        rows = []
        for count in counts:
            if not self.late():
                pair = [run(self.shared, growing(n, tokens), given) for n in (count, count + 1)]
                rows.append(marginal_row(count, *pair))
                print(f"[{time.perf_counter() - self.began:5.0f} s] w5 {' | '.join(rows[-1])}", flush=True)
        columns = ["adapters", "backbone GiB", "peak GiB", "one more, MiB", "counted", "weights", "gradients", "state",
                   "above counted", "asked for"]  # fmt: skip
        show(f"W5: {tokens:,} tokens a step whatever the adapters, {self.described()}", columns, rows)
        if not self.equal.get("w5", False):
            print("no result: " + self.why("w5"))

    def grown(self) -> tuple[list[int], int]:
        """W5's numbers of adapters, and its tokens a step."""
        counts = [int(count) for count in self.given.counts.split(",")]
        return counts, 16 * (max(counts) + 1)

    def why(self, key: str) -> str:
        """Why figures of ``key`` are no result."""
        return "not checked" if key not in self.equal else "THE EQUALITY CHECK FAILED"

    # ---- tables ----

    def described(self) -> str:
        """The settings that a table's figures share."""
        given = self.given
        return (
            f"{given.scheme} storage, compute {given.compute}, {self.shared.layers} layers, "
            f"{'padded' if given.padded else 'packed'}, {', '.join((given.optim, *given.precision, *given.module))}"
        )

    def table(self, work: Workload) -> None:
        """What ran of ``work``, the rounds side by side, and how many times a peer's rate ours is."""
        rows, refused = [], not self.equal.get(work.key, False)
        found = self.found.get(work.key, {})
        for who, rounds in found.items():
            for number, figures in enumerate(rounds, 1):
                ratio = self.ratio(found, who, rounds, refused) if number == len(rounds) else ""
                rows.append([who if number == 1 else "", *figures.cells(), ratio])
        show(f"{work.key.upper()}: {work.title}, {self.described()}", ["", *COLUMNS, "ours / it"], rows)
        if refused and len(found) > 1:
            print("no ratio: " + self.why(work.key))
        if work.peer and any(OURS not in who for who in found):
            print(
                f"peers train one adapter, {work.peer[0]} x {work.peer[1]:,} tokens a step: one adapter after another "
                f"runs at that rate; {self.given.peer_steps} timed steps each, not a whole run of every adapter"
            )

    def ratio(self, found: dict[str, list[Figures]], who: str, rounds: list[Figures], refused: bool) -> str:
        """Ours over a peer's rate, means over the rounds."""
        own = found.get(OURS + (" recompute" if who.endswith(" recompute") else ""), [])
        if who.startswith(OURS) or not own or any(f.failed for f in (*own, *rounds)):
            return ""
        return "refused" if refused else f"{fmean(f.rate for f in own) / fmean(f.rate for f in rounds):.2f}x"

    def eight_against_one(self) -> None:
        """Point 9: the same tokens a step, by eight adapters and by one."""
        if self.given.adapters not in (None, 8):
            return
        one, eight = (self.found.get(key, {}).get(OURS, []) for key in ("w2", "w1"))
        if one and eight and not any(f.failed for f in (*one, *eight)):
            slower = fmean(f.seconds for f in eight) / fmean(f.seconds for f in one) - 1
            print(f"from one adapter (W2) to eight (W1) at the same tokens a step: {slower:+.1%} time (at most +5%)")


def arguments_of(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` as keyword arguments; a value that is no Python literal is a string."""
    found: dict[str, Any] = {}
    for key, _, text in (pair.partition("=") for pair in pairs):
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def label(who: str, recompute: bool) -> str:
    """The row's name."""
    return f"{who} recompute" if recompute else who


def marginal_row(count: int, at: Figures, after: Figures) -> list[str]:
    """W5: what the adapter after ``count`` cost, beside what its tensors take."""
    if at.failed or after.failed:
        return [str(count), at.failed or after.failed, *[""] * 8]
    one = {kind: (after.own[kind] - at.own[kind]) for kind in at.own}
    counted, measured = sum(one.values()), after.steady - at.steady
    shown = [f"{one[kind] / 2**20:.1f}" for kind in ("weights", "gradients", "state")]
    if not at.steady:
        return [str(count), gib(at.backbone), "-", "-", f"{counted / 2**20:.1f}", *shown, "-", "-"]
    asked = after.asked - at.asked
    return [str(count), gib(at.backbone), gib(at.steady), f"{measured / 2**20:.1f}", f"{counted / 2**20:.1f}", *shown,
            f"{measured / counted - 1:+.1%}", f"{asked / counted - 1:+.1%}"]  # fmt: skip


def execute(keys: list[str], given: argparse.Namespace) -> Bench:
    """Check, run and show the workloads ``keys``."""
    bench = Bench(given)
    works = [workload(key, bench.tokens, given.adapters) for key in keys if key not in ("w5", "roofline")]
    names = peers.chosen(given.peers)
    print(f"{' '.join(keys)}: {machine()}", flush=True)
    if not given.no_check:
        checked = list(works)
        if "roofline" in keys and "w1" not in keys:
            checked.append(workload("w1", bench.tokens, given.adapters))
        if "w5" in keys:
            counts, tokens = bench.grown()
            checked.append(growing(next((n for n in counts if n > 1), counts[0] + 1), tokens))
        bench.check(checked)
    for _ in range(given.rounds or (2 if names else 1)):
        for work in works:
            bench.ours(work)
        if names:
            bench.shared.free()
        for name in names:
            bench.peer(name, works)
    for work in works:
        bench.table(work)
    bench.eight_against_one()
    if "w5" in keys:
        bench.series()
    if "roofline" in keys and not bench.late():
        work = workload("w1", bench.tokens, given.adapters)
        roofline.roofline(bench.shared, work, bench.settings, given.kernels, given.tiny)
    return bench


def main(keys: list[str] | None = None, arguments: list[str] | None = None, description: str | None = __doc__) -> Bench:
    """Run ``keys``, or those that the arguments name."""
    parser = parser_of(description)
    if keys is None:
        parser.add_argument("workloads", nargs="+", choices=KEYS)
    given = parser.parse_args(arguments)
    if not given.tiny and default_device().type == "cpu":
        parser.error("no CUDA device for a backbone of 8 billion weights; --tiny runs a small shape on this CPU")
    with quiet():
        return execute(keys or given.workloads, given)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing but what a benchmark prints."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    main()
