"""Training in a child process that is killed or told to stop at random moments, and what must hold after each.

The child is forked after the imports, so a start takes a part of a second. Every step of an uninterrupted run is known
bit for bit, so what a kill leaves can be compared with it: every folder must be some step's adapter, whole."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from finetuna_lightning.peft_io import load_folder
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.trainer_state import TrainerCheckpoint
from finetuna_lightning.training.checkpoint_io import newest_checkpoint, read_checkpoint
from tests.resilience.runs import ADAPTERS, data_of, differences, module_of, state_of, trainer_of

LIMIT = 120.0  # seconds for one child
WHERE = {
    "": "before training",
    "A": "while an adapter's folder is written",
    "B": "while the trainer's state is written",
    "V": "in a validation",
}


class Reporter(Callback):
    """Says on a pipe: ``T`` training begins, ``D 3`` optimizer step 3 is done, ``V`` validation begins."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def say(self, text: str) -> None:
        os.write(self.pipe, f"{text}\n".encode())

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.say(f"T {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.say(f"D {trainer.global_step}")

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.say("V")


class Telling(TrainerCheckpoint):
    """Says ``B`` when it begins to write and ``S 3`` when the state of step 3 is written."""

    reporter: Reporter

    def _save(self, trainer: Trainer) -> None:
        self.reporter.say("B")
        super()._save(trainer)
        self.reporter.say(f"S {trainer.global_step}")


class TellingAdapters(AdapterCheckpoint):
    """Says ``A`` when it begins to write an adapter's folder, and ``a`` at its end."""

    reporter: Reporter

    def _save(self, *args: Any) -> bool:
        self.reporter.say("A")
        written = super()._save(*args)
        self.reporter.say("a")
        return written


class Steps(Callback):
    """Every adapter's folder contents after each optimizer step."""

    def __init__(self) -> None:
        self.tensors: dict[int, dict[str, dict[str, torch.Tensor]]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._note(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, pl_module: Any) -> None:
        self.tensors[trainer.global_step] = {
            adapter.name: {key: value.clone() for key, value in flat(adapter.folder()).items()}
            for adapter in pl_module.adapters.adapters()
        }


def flat(folder: Any) -> dict[str, torch.Tensor]:
    """All tensors of an adapter's folder by name."""
    deltas = {f"{path}.{part}": t for path, parts in folder.deltas.items() for part, t in parts.items()}
    return dict(folder.plain) | deltas


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Run ``work(pipe)`` in a child; its process id and the end of the pipe to read."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            work(write)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


@dataclass
class Child:
    """A running child and what it has said."""

    pid: int
    pipe: int
    said: list[str] = field(default_factory=list)
    code: int | None = None
    rest: str = ""

    def listen(self, seconds: float) -> None:
        """Read what comes in ``seconds``, or until the child has closed its end."""
        end = time.monotonic() + seconds
        while self.code is None and (left := end - time.monotonic()) > 0:
            if select.select([self.pipe], [], [], left)[0] and not self._read():
                self._reap()

    def until(self, letter: str) -> None:
        """Read until a message that begins with ``letter``, or the end."""
        end = time.monotonic() + LIMIT
        while self.code is None and not any(line.startswith(letter) for line in self.said):
            if time.monotonic() > end:
                raise TimeoutError(f"the child says nothing: {self.said[-3:]}")
            self.listen(0.01)

    def until_next(self, letters: str) -> None:
        """Read until a new message that begins with one of ``letters``, or the end."""
        heard, end = len(self.said), time.monotonic() + LIMIT
        while self.code is None and not any(line[0] in letters for line in self.said[heard:]):
            if time.monotonic() > end:
                raise TimeoutError(f"the child says nothing: {self.said[-3:]}")
            self.listen(0.001)

    def signal(self, number: int) -> None:
        """Send a signal, if the child is still there."""
        if self.code is None:
            os.kill(self.pid, number)

    def ended(self) -> int:
        """Wait for the end; the exit code, or minus the signal."""
        end = time.monotonic() + LIMIT
        while self.code is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"the child does not end: {self.said[-3:]}")
            self.listen(0.5)
        return self.code

    def newest(self, letter: str) -> int:
        """The number in the newest message that begins with ``letter``; -1 without any."""
        return max((int(line.split()[1]) for line in self.said if line.startswith(f"{letter} ")), default=-1)

    def _read(self) -> bool:
        data = os.read(self.pipe, 65536).decode()
        *lines, self.rest = (self.rest + data).split("\n")
        self.said += lines
        return bool(data)

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        os.close(self.pipe)


def train(folder: Path, run: Path, pipe: int) -> None:
    """What the child does: go on with ``run``, saving after every step, and leave its end in ``run/end.pt``."""
    torch.set_num_threads(1)
    reporter, adapters, keep = Reporter(pipe), TellingAdapters(every_n_steps=1), Telling(every_n_steps=1)
    adapters.reporter = keep.reporter = reporter
    trainer = trainer_of(run, reporter, adapters, keep)
    trainer.fit(module_of(folder), datamodule=data_of(folder), ckpt_path="last")
    torch.save(state_of(trainer), run / "end.pt")


def start(folder: Path, run: Path) -> Child:
    """A child that goes on with ``run``."""
    return Child(*forked(lambda pipe: train(folder, run, pipe)))


@dataclass
class Truth:
    """The uninterrupted run: its end, each step's adapters, the seconds that its training took."""

    end: dict[str, Any]
    steps: dict[int, dict[str, dict[str, torch.Tensor]]]
    seconds: float


def truth(folder: Path) -> Truth:
    """Run once without an interruption, in a child (a process that has trained is not forked)."""

    def work(pipe: int) -> None:
        torch.set_num_threads(1)
        steps = Steps()
        trainer = trainer_of(folder / "truth", steps)
        trainer.fit(module_of(folder), datamodule=data_of(folder))
        torch.save({"end": state_of(trainer), "steps": steps.tensors}, folder / "truth.pt")

    module_of(folder), data_of(folder)  # the files
    if Child(*forked(work)).ended():
        raise RuntimeError("the uninterrupted run failed")
    child = start(folder, folder / "timed")
    child.until("T")
    began = time.monotonic()
    if child.ended():
        raise RuntimeError("the run that saves after every step failed")
    saved: dict[str, Any] = torch.load(folder / "truth.pt", weights_only=False)
    return Truth(saved["end"], saved["steps"], time.monotonic() - began)


def faults_on_disk(run: Path, known: Truth, saved: int) -> list[str]:
    """What is wrong with what a killed child left, which had said that step ``saved`` was written."""
    found = []
    newest = newest_checkpoint(run / "checkpoints")
    if newest is None:
        return [f"no trainer state, though step {saved} was written"] if saved >= 0 else []
    for path in (run / "checkpoints").glob("*.ckpt"):
        read_checkpoint(path)  # raises for one that is half written
    state = read_checkpoint(newest)
    if state["global_step"] < saved:
        found.append(f"step {saved} was written, but the newest state is of step {state['global_step']}")
    for name in ADAPTERS:
        for kind in ("last", "best"):
            path = run / "adapters" / name / kind
            if not path.exists() and kind == "best":
                continue
            tensors = flat(load_folder(path))  # raises for one that is not whole
            at = [step for step, each in known.steps.items() if not differences(tensors, each[name])]
            if not at:
                found.append(f"{name}/{kind} is no step's adapter")
            elif kind == "last" and max(at) < state["global_step"]:
                found.append(f"{name}/last is of step {max(at)}, older than the trainer's {state['global_step']}")
    return found


def kill_often(folder: Path, kills: int, seed: int = 0, known: Truth | None = None) -> tuple[Counter[str], list[str]]:
    """Kill with -9 at ``kills`` random moments; where they fell, and every fault."""
    known = known or truth(folder)
    draw, tally, faults = random.Random(seed), Counter[str](), []
    run, number, saved = folder / "killed-0", 0, -1
    while tally["kills"] < kills:
        child = start(folder, run)
        if draw.random() < 0.9:
            child.until("T")
        child.listen(draw.uniform(0, 0.6 * known.seconds))
        if draw.random() < 0.5:  # most of the time no file is open: wait for one, half of the times
            child.until_next("AB")
            time.sleep(draw.uniform(0, 0.008))
        child.signal(signal.SIGKILL)
        if child.ended() == -signal.SIGKILL:
            tally["kills"] += 1
            newest = child.said[-1][0] if child.said else ""
            tally[WHERE.get(newest, "in or between steps")] += 1
            saved = max(saved, child.newest("S"))
            faults += [f"kill {tally['kills']}: {fault}" for fault in faults_on_disk(run, known, saved)]
            continue
        faults += finished(child, run, known)
        tally["runs finished, bit for bit as if never killed"] += 1
        number, saved = number + 1, -1
        shutil.rmtree(run)
        run = folder / f"killed-{number}"
    child = start(folder, run)
    child.ended()
    faults += finished(child, run, known)
    tally["runs finished, bit for bit as if never killed"] += 1
    return tally, faults


def finished(child: Child, run: Path, known: Truth) -> list[str]:
    """What is wrong with a run that came to its end over all its interruptions."""
    if child.code != 0:
        return [f"the run ended with {child.code}"]
    if not (run / "end.pt").exists():
        return ["the run left no end"]
    return differences(torch.load(run / "end.pt", weights_only=False), known.end, "end")


def stop_often(folder: Path, stops: int, seed: int = 0, known: Truth | None = None) -> tuple[Counter[str], list[str]]:
    """Send SIGTERM at ``stops`` random moments of training, to every other child twice; steps lost, and every fault."""
    known = known or truth(folder)
    draw, tally, faults = random.Random(seed), Counter[str](), []
    run, number = folder / "stopped-0", 0
    while tally["SIGTERMs"] < stops:
        child = start(folder, run)
        child.until("T")
        child.listen(draw.uniform(0, 0.6 * known.seconds))
        child.signal(signal.SIGTERM)
        if tally["SIGTERMs"] % 2:
            child.listen(draw.uniform(0, 0.02))
            child.signal(signal.SIGTERM)
        code = child.ended()
        if code:
            tally["SIGTERMs"] += 1
            tally[f"exit code {code}"] += 1
            done = max(child.newest("D"), child.newest("T"))
            state = read_checkpoint(run / "checkpoints/last.ckpt")
            lost = done - state["global_step"]
            tally[f"steps lost: {lost}"] += 1
            if code not in (143, -signal.SIGTERM) or lost > 1:
                faults.append(f"stop {tally['SIGTERMs']}: exit code {code}, {lost} steps lost")
            faults += [f"stop {tally['SIGTERMs']}: {f}" for f in faults_on_disk(run, known, state["global_step"])]
            continue
        faults += finished(child, run, known)
        tally["runs finished, bit for bit as if never stopped"] += 1
        number += 1
        shutil.rmtree(run)
        run = folder / f"stopped-{number}"
    child = start(folder, run)
    child.ended()
    faults += finished(child, run, known)
    tally["runs finished, bit for bit as if never stopped"] += 1
    return tally, faults
