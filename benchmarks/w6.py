"""W6: on a CPU, LoRA r=16 alpha=32 on all seven projections with AdamW, 4 adapters x 2 sequences x 128 tokens a step:
all in one pass here; with peft, on the same weights, one adapter after another.

    python -m benchmarks.w6 [--shape 100m|quickstart] [--rounds 3] [--steps 5] [--threads 2] [--only NAME ...]

Checked before anything is timed: each adapter alone has the losses that it has in company, after its first optimizer
step too (B is zero before), and all contestants start from the same loss. Then every contestant takes ``--steps`` steps
a round, in the order A B A B, and its median step counts. peft runs in a bare loop of its own, ours through
``Trainer.fit``; a step of peft's is 2 x 128 tokens of one adapter, so its tokens/s are those of four adapters in four
such steps.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import peft
import torch
import transformers
from torch import Tensor

import finetuna_lightning as ft
from benchmarks.common import PROJECTIONS, joint_batches, loader_of, show

ROWS, TOKENS = 2, 128
NAMES = [f"adapter{index}" for index in range(4)]
LEARNING_RATE = 1e-3
QUICKSTART = "tests/data/quickstart_bf16"
LLAMA_100M = dict(
    vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=12, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
# (compute, dtype) of ours; storage is int8 in all of them
OURS = {
    "ours, int8 compute, fp32": ("int8", "float32"),
    "ours, int8 compute, bf16": ("int8", "bfloat16"),
    "ours, bf16": ("16bit", "bfloat16"),
    "ours, fp32": ("16bit", "float32"),
}
PEERS = ("peft, fp32", "peft, bf16", "peft + bitsandbytes int8, fp32", "peft + bitsandbytes int8, bf16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}  # of a loss in company against alone, relative; bf16 has 8 bits
START_TOLERANCE = 0.01  # of any contestant's first loss against peft's in fp32: 8 bits, not another model
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SKIPPED = 2  # steps of a round before those that count


def batches(steps: int, vocabulary: int) -> list[dict[str, Any]]:
    """A joint batch for each step, of random tokens: no row has pads."""
    return joint_batches([{name: [TOKENS] * ROWS for name in NAMES}] * steps, vocabulary, packed=False)


class Losses(pl.Callback):
    """Every adapter's training losses."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in batch["adapters"]:
            self.values.setdefault(name, []).append(float(trainer.callback_metrics[f"train/{name}/loss"]))


class Marks(pl.Callback):
    """When each step began, and when the last one ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(self.clock())

    def on_train_end(self, *_: Any) -> None:
        self.at.append(self.clock())


class Joint:
    """Ours: adapters side by side through ``Trainer.fit``, each fit with adapters and a backbone as new."""

    def __init__(self, source: str, compute: str, dtype: str) -> None:
        self.plugin: dict[str, Any] = dict(scheme="int8", compute=compute, dtype=dtype)
        self.dtype = dtype
        self.original: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    def fit(self, names: list[str], steps: int, callback: pl.Callback) -> None:
        """Train adapters ``names`` for ``steps``; each meets the same rows in any company."""
        adapters = {name: ft.AdapterConfig(rank=16, alpha=32, lr=LEARNING_RATE) for name in names}
        own = [NAMES.index(name) * ROWS + row for name in names for row in range(ROWS)]
        own_batches = [
            {key: value[own] if isinstance(value, Tensor) else value for key, value in batch.items()}
            | {"adapters": names, "rows": [ROWS] * len(names)}
            for batch in batches(steps, self.original.config.vocab_size)
        ]
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, logger=False, callbacks=[callback],
            plugins=[ft.EightBitPrecision(**self.plugin)], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tempfile.gettempdir(),
        )  # fmt: skip
        module = ft.MultiAdapterModule(copy.deepcopy(self.original), adapters, ft.OptimConfig("adamw"))
        trainer.fit(module, loader_of(own_batches))

    def losses(self, names: list[str]) -> dict[str, list[float]]:
        """By adapter, the losses of two steps."""
        seen = Losses()
        self.fit(names, 2, seen)
        return seen.values

    def round(self, steps: int, clock: Callable[[], float]) -> list[float]:
        """Seconds of ``steps`` joint steps."""
        marks = Marks(clock)
        self.fit(NAMES, SKIPPED + steps, marks)
        return [stop - start for start, stop in pairwise(marks.at[SKIPPED:])]

    def check(self) -> list[str]:
        """What is not as it is alone, in words."""
        joint, limit, found = self.losses(NAMES), TOLERANCE[self.dtype], []
        for name in NAMES:
            for step, (here, alone) in enumerate(zip(joint[name], self.losses([name])[name], strict=True)):
                if not abs(here / alone - 1) <= limit:
                    found.append(f"{name}, step {step}: {here:.6f} in company, {alone:.6f} alone")
        return found


class OneAfterAnother:
    """peft: four adapters over one base, trained one after another, in a loop with nothing else in it."""

    def __init__(self, source: str, dtype: str, eight_bit: bool) -> None:
        settings = dict(quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)) if eight_bit else {}
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), device_map={"": "cpu"}, **settings
        )
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(base, config, NAMES[0])
        for name in NAMES[1:]:
            self.model.add_adapter(name, config)
        self.model.train()
        self.vocabulary = base.config.vocab_size

    def losses(self, names: list[str]) -> dict[str, list[float]]:
        """By adapter, the first loss; nothing is trained by it."""
        return {name: self.train(name, 1, step=False)[1] for name in names}

    def train(
        self, name: str, steps: int, clock: Callable[[], float] = time.perf_counter, step: bool = True
    ) -> tuple[list[float], list[float]]:
        """Seconds and losses of ``steps`` steps of one adapter."""
        self.model.set_adapter(name)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer, seconds, losses = torch.optim.AdamW(trained, lr=LEARNING_RATE), [], []
        start = NAMES.index(name) * ROWS
        for batch in batches(steps, self.vocabulary):
            ids, mask = (batch[key][start : start + ROWS] for key in ("input_ids", "attention_mask"))
            begin = clock()
            loss = self.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
            loss.backward()
            if step:
                optimizer.step()
            optimizer.zero_grad()
            seconds.append(clock() - begin)
            losses.append(float(loss))
        return seconds, losses

    def round(self, steps: int, clock: Callable[[], float]) -> list[float]:
        """Seconds of ``steps`` steps of all four adapters: of the i-th step of each, the sum."""
        each = [self.train(name, SKIPPED + steps, clock)[0][SKIPPED:] for name in NAMES]
        return [sum(together) for together in zip(*each, strict=True)]


def contestants(source: str, only: list[str]) -> tuple[dict[str, Joint | OneAfterAnother], dict[str, str]]:
    """Those asked for, and why some of them cannot run here."""
    made: dict[str, Joint | OneAfterAnother] = {}
    absent: dict[str, str] = {}
    for label in (*PEERS, *OURS):
        if only and label not in only:
            continue
        try:
            if label in OURS:
                made[label] = Joint(source, *OURS[label])
            else:
                made[label] = OneAfterAnother(source, "bfloat16" if "bf16" in label else "float32", "int8" in label)
            made[label].losses(NAMES[:1])
        except Exception as error:
            made.pop(label, None)
            absent[label] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
    return made, absent


def unequal(made: dict[str, Joint | OneAfterAnother]) -> list[str]:
    """Whatever of the equality check fails, in words."""
    found = []
    start = {label: each.losses(NAMES[:1])[NAMES[0]][0] for label, each in made.items()}
    first = next(iter(start.values()))
    for label, each in made.items():
        if not abs(start[label] / first - 1) <= START_TOLERANCE:
            found.append(f"{label}: the first loss is {start[label]:.4f}, not {first:.4f}")
        if isinstance(each, Joint):
            found += [f"{label}: {line}" for line in each.check()]
    return found


def table(seconds: dict[str, list[float]], absent: dict[str, str], equal: bool) -> list[list[str]]:
    """The rows: each contestant's median, and ours over the best of peft's where the check held."""
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    best = min((medians[label] for label in PEERS if label in medians), default=float("nan"))
    rows = []
    for label, median in medians.items():
        spread = f"{min(seconds[label]):.3f} to {max(seconds[label]):.3f}"
        ratio = f"{best / median:.2f}" if equal else "refused"
        rows.append([label, f"{median:.3f}", spread, f"{len(NAMES) * ROWS * TOKENS / median:,.0f}", ratio])
    return rows + [[label, "does not run", why, "", ""] for label, why in absent.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["100m", "quickstart"], default="100m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS], default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source = QUICKSTART
        if options.shape == "100m":
            torch.manual_seed(0)
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_100M)).save_pretrained(folder)
            source = folder
        made, absent = contestants(source, options.only)
    faults = unequal(made)
    seconds: dict[str, list[float]] = {label: [] for label in made}
    for _ in range(options.rounds):
        for label, each in made.items():
            seconds[label] += each.round(options.steps, CLOCKS[options.clock])
            print(f"{label}: {statistics.median(seconds[label]):.3f} s", file=sys.stderr, flush=True)
    show(
        f"W6: {options.shape}, {len(NAMES)} adapters x {ROWS} x {TOKENS} tokens, "
        f"{options.rounds} rounds of {options.steps} steps, {options.clock} clock",
        ["", "s for all four", "least to most", "tokens/s", "x best of peft"],
        table(seconds, absent, not faults),
    )
    print("\n".join(faults) or "equality check: joint = alone in every run of ours, all start from one loss")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
