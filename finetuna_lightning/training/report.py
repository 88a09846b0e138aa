"""What a run shows at its end: every adapter on every data set, the bytes, sample continuations; as tables, JSON, PNG.

A *matrix* is ``{row: {data set: value}}`` with the bare backbone (``"backbone"``) first and then one row an adapter.
*Memory* is ``AdapterMemoryMonitor.report()``. A *history* is ``{adapter: [(step, loss), ...]}``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.files import replacing_file
from finetuna_lightning.training.batches import collate
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.plots import (
    BACKBONE,
    History,
    Matrix,
    adapter_colors,
    best_row,
    data_sets_of,
    draw_curves,
    draw_matrix,
    draw_memory,
)
from finetuna_lightning.training.tokenizing import Example, pad_token_id

_LOGITS_BYTES = 256 * 2**20  # of one joint evaluation pass, at the most


def bank_of(module: LightningModule, who: str) -> AdapterBank:
    """``module.adapters``, or an error that names ``who`` asked for it."""
    bank = getattr(module, "adapters", None)
    if not isinstance(bank, AdapterBank):
        raise ConfigError(
            f"{who} needs a module whose .adapters is an AdapterBank (MultiAdapterModule), not {type(module).__name__}"
        )
    return bank


# ---- every adapter on every data set --------------------------------------------------------------------------------


def metric_of(module: MultiAdapterModule) -> str:
    """What ``evaluate_on_every_set`` measures: ``perplexity``, ``accuracy``, or ``loss`` where the loss is a user's."""
    return {"sequence-classification": "accuracy", "custom": "loss"}.get(module.task, "perplexity")


@torch.no_grad()
def evaluate_on_every_set(
    module: MultiAdapterModule,
    datamodule: Any,
    split: str = "val",
    batch_size: int = 8,
    max_batches: int | None = None,
) -> dict[str, dict[str, float]]:
    """The bare backbone and each adapter on each adapter's held-out data: a matrix of ``metric_of(module)``.

    Each batch is read once: one pass of the backbone alone, then the same rows for several adapters in one pass, as
    many as keep the logits below 256 MiB.

    Args:
        module: evaluated where it stands; its mode is restored.
        datamodule: has ``evaluation_sets(split)``, the examples by data set.
        split: ``train``, ``val`` or ``test``.
        batch_size: sequences of one adapter at a time.
        max_batches: of each data set; None is all of it.

    Raises:
        ConfigError: for a batch size below 1.
    """
    if batch_size < 1 or (max_batches is not None and max_batches < 1):
        raise ConfigError(f"batch_size and max_batches must be at least 1, not {batch_size} and {max_batches}")
    sets = {
        name: list(examples)[: _limit(batch_size, max_batches)]
        for name, examples in datamodule.evaluation_sets(split).items()
    }
    tokenizer = getattr(datamodule, "tokenizer", None) or module.tokenizer
    pad = pad_token_id(tokenizer) if tokenizer is not None else 0
    rows = [BACKBONE, *module.adapter_names]
    matrix: dict[str, dict[str, float]] = {row: {} for row in rows}
    was_training = module.training
    module.eval()
    try:
        with _EvaluationProgress(sum(-(-len(examples) // batch_size) for examples in sets.values())) as progress:
            for data_set, examples in sets.items():
                examples.sort(key=lambda example: -len(example.input_ids))  # rows of like length: less padding
                sums = dict.fromkeys(rows, (0.0, 0))
                for start in range(0, len(examples), batch_size):
                    for row, total, count in _evaluate_batch(module, examples[start : start + batch_size], pad):
                        sums[row] = (sums[row][0] + total, sums[row][1] + count)
                    progress.advance(data_set)
                for row, (total, count) in sums.items():
                    matrix[row][data_set] = _value(metric_of(module), total, count)
    finally:
        module.train(was_training)
    return matrix


def _limit(batch_size: int, max_batches: int | None) -> int | None:
    return None if max_batches is None else batch_size * max_batches


def _value(metric: str, total: float, count: int) -> float:
    if count == 0:
        return math.nan
    mean = total / count
    if metric == "perplexity":
        return math.exp(mean) if mean < 700 else math.inf
    return mean


def _evaluate_batch(
    module: MultiAdapterModule, examples: Sequence[Example], pad: int
) -> Iterator[tuple[str, float, int]]:
    """For the backbone and each adapter: name, loss summed over the targets (or correct rows), and their number."""
    names = module.adapter_names
    device = next(iter((*module.adapters.backbone.buffers(), *module.adapters.backbone.parameters()))).device
    alone: dict[str, Any] = {**collate({BACKBONE: examples}, pad)}
    alone = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in alone.items()}
    yield from _scores(module, module(alone, bare=True), alone)
    vocabulary = module.backbone_info().vocab_size
    logits = alone["input_ids"].numel() * (vocabulary or _LOGITS_BYTES) * 4
    together = max(1, _LOGITS_BYTES // logits)
    for start in range(0, len(names), together):
        some = names[start : start + together]
        joint = {
            key: torch.cat([value] * len(some)) if isinstance(value, Tensor) else value for key, value in alone.items()
        } | {"adapters": some, "rows": [len(examples)] * len(some)}
        yield from _scores(module, module(joint), joint)


def _scores(module: MultiAdapterModule, output: Any, batch: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    for name, total, count, rows in module.losses(output, batch):
        if metric_of(module) == "accuracy":
            right = output.logits[rows].argmax(-1) == batch["labels"][rows]
            yield name, float(right.sum()), right.numel()
        else:
            yield name, float(total), int(count)


class _EvaluationProgress(AbstractContextManager["_EvaluationProgress"]):
    """A bar on a terminal; elsewhere one line a data set, as it starts."""

    def __init__(self, batches: int) -> None:
        self.console = Console()
        self.bar = Progress(console=self.console, transient=True) if self.console.is_terminal else None
        self.task = self.bar.add_task("evaluating", total=batches) if self.bar else None
        self.batches, self.done, self.data_set, self.started = batches, 0, "", time.monotonic()

    def __enter__(self) -> _EvaluationProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, data_set: str) -> None:
        self.done += 1
        if self.bar and self.task is not None:
            self.bar.update(self.task, advance=1, description=f"evaluating on {data_set}")
        elif data_set != self.data_set:
            passed = time.monotonic() - self.started
            self.console.print(
                f"evaluating on {data_set}: batch {self.done}/{self.batches}, {passed:.0f} s", highlight=False
            )
        self.data_set = data_set


# ---- tables ---------------------------------------------------------------------------------------------------------


def human_bytes(count: float) -> str:
    """``"1.5 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def perplexity_table(matrix: Matrix, metric: str = "perplexity") -> Table:
    """Rows: the backbone and each adapter. Columns: data sets, the best value of each bold with a star. On its own data
    an adapter's change against the bare backbone stands beside the value."""
    table = Table(title=f"held-out {metric}", title_style="bold", caption="* best on this data", caption_justify="left",
                  box=SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    table.add_column("")
    data_sets = data_sets_of(matrix)
    for data_set in data_sets:
        table.add_column(data_set, justify="right")
    best = {data_set: best_row(matrix, data_set, metric) for data_set in data_sets}
    for row, values in matrix.items():
        cells = [Text(row, style="dim" if row == BACKBONE else "")]
        for data_set in data_sets:
            value = values.get(data_set, math.nan)
            text = f"{value:.3f}" if metric != "perplexity" else f"{value:,.2f}"
            bare = matrix.get(BACKBONE, {}).get(data_set, math.nan)
            if row == data_set and bare:
                text = f"({value / bare - 1:+.1%})  {text}"
            first = row == best[data_set]
            cells.append(Text(text + (" *" if first else "  "), style="bold green" if first else ""))
        table.add_row(*cells, end_section=row == BACKBONE)
    return table


_PARTS = ("weights", "gradients", "optimizer")


def memory_table(memory: Mapping[str, Any]) -> Table:
    """The backbone once, a row for each adapter, the sum, and what as many separate copies would have cost."""
    table = Table(title="memory", title_style="bold", caption=_memory_caption(memory), caption_justify="left",
                  box=SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    table.add_column("", no_wrap=True)
    for column in (*_PARTS, "in all", "activations"):
        table.add_column(column, justify="right")
    blank = ["", ""]
    backbone, adapters = memory[BACKBONE]["bytes"], memory["adapters"]
    table.add_row(
        "backbone, once", human_bytes(backbone), *blank, human_bytes(backbone), "", end_section=True, style="dim"
    )
    for name, parts in adapters.items():
        cells = [human_bytes(parts[part]) for part in (*_PARTS, "total", "activations")]
        table.add_row(Text(name), *cells)
    table.add_section()
    activations = sum(parts["activations"] for parts in adapters.values())
    table.add_row("together", "", *blank, human_bytes(memory["together"]), human_bytes(activations), style="bold")
    table.add_row(_copies(len(adapters)), "", *blank, human_bytes(memory["separate"]), "")
    return table


def _memory_caption(memory: Mapping[str, Any]) -> str:
    share = memory["saving"] / memory["separate"] if memory["separate"] else 0.0
    copies = _copies(len(memory["adapters"]))
    saved = f"saved against {copies} of the backbone: {human_bytes(memory['saving'])} ({share:.0%})"
    return saved + (f"\npeak {memory['peak_of']}: {human_bytes(memory['peak'])}" if memory.get("peak") else "")


def _copies(count: int) -> str:
    return f"{count} cop{'y' if count == 1 else 'ies'}"


def training_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """What became of every adapter: ``MultiAdapterModule.adapter_report()``."""
    table = Table(title="training", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("steps", justify="right")
    table.add_column("skipped", justify="right")
    table.add_column("")
    for name, row in rows.items():
        cells = f"{row['steps']:,}", f"{row['skipped']:,}" if row["skipped"] else ""
        table.add_row(Text(name), *cells, Text(row["state"]), style="bold red" if row["skipped"] else "")
    return table


def sample_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """Continuations: each sample has ``adapter``, ``prompt`` and ``text``."""
    table = Table(title="samples", title_style="bold", show_lines=True)
    table.add_column("adapter", no_wrap=True)
    table.add_column("prompt, and what the adapter makes of it")
    for sample in samples:
        table.add_row(Text(sample["adapter"]), Text.assemble((sample["prompt"], "dim"), sample["text"]))
    return table


# ---- files ----------------------------------------------------------------------------------------------------------


def write_report(
    folder: str | Path,
    *,
    history: History,
    matrix: Matrix,
    memory: Mapping[str, Any],
    val_history: History | None = None,
    metric: str = "perplexity",
    samples: Sequence[Mapping[str, str]] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write ``report.json`` (every figure) and ``report.png`` into ``folder``; their paths, as ``json`` and ``png``.

    Args:
        metric: of ``matrix``.
        extra: more to keep in the JSON, at its top level.
    """
    folder = Path(folder)
    figures = {
        "metric": metric,
        "matrix": matrix,
        "memory": memory,
        "history": history,
        "val_history": val_history or {},
        "samples": list(samples),
        **(extra or {}),
    }
    paths = {"json": folder / "report.json", "png": folder / "report.png"}
    with replacing_file(paths["json"]) as beside:
        beside.write_text(json.dumps(_finite(figures), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot_report(paths["png"], history, matrix, memory, metric=metric, val_history=val_history)
    return paths


def _finite(value: Any) -> Any:
    """``value`` with None for NaN and infinity, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def plot_report(
    path: str | Path,
    history: History,
    matrix: Matrix,
    memory: Mapping[str, Any],
    *,
    metric: str = "perplexity",
    val_history: History | None = None,
) -> Path:
    """A PNG with the loss curves, the matrix as a heat map, and the memory against that of separate copies."""
    names = list(memory["adapters"]) or list(history)
    colors = dict(zip(names, adapter_colors(len(names)), strict=True))
    across = len(data_sets_of(matrix))
    figure = Figure(
        figsize=(11.5 + max(3.0, 1.05 * across), max(4.9, 0.55 * len(matrix))),
        dpi=130,
        layout="constrained",
        facecolor="white",
    )
    curves, heat, bars = figure.subplots(1, 3, width_ratios=[4.6, max(3.4, 1.15 * across), 4.4])
    draw_curves(curves, history, val_history or {}, colors)
    draw_matrix(heat, matrix, metric)
    draw_memory(bars, memory, colors)
    with replacing_file(path) as beside:
        figure.savefig(beside, format="png")
    return Path(path)
