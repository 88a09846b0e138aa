"""How a report is drawn: loss curves, the matrix as a heat map, memory bars. Without pyplot and its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

BACKBONE = "backbone"
Matrix = Mapping[str, Mapping[str, float]]
History = Mapping[str, Sequence[tuple[int, float]]]

_OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # safe for colour blindness
_GREY, _INK = "#B4B4B4", "#262626"


def data_sets_of(matrix: Matrix) -> list[str]:
    return list(next(iter(matrix.values()), {}))


def best_row(matrix: Matrix, data_set: str, metric: str) -> str | None:
    """The row with the best value on ``data_set``: the highest accuracy, the lowest of anything else."""
    sign = -1 if metric == "accuracy" else 1
    known = {
        row: sign * values[data_set] for row, values in matrix.items() if math.isfinite(values.get(data_set, math.nan))
    }
    return min(known, key=lambda row: known[row]) if known else None


def adapter_colors(count: int) -> list[Any]:
    if count <= len(_OKABE_ITO):
        return list(_OKABE_ITO[:count])
    return [colormaps["viridis"](0.95 * index / (count - 1)) for index in range(count)]


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.tick_params(labelsize=9, colors=_INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def smooth(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, without the pull of its start; values that are not finite are passed over."""
    out: list[tuple[int, float]] = []
    total = norm = 0.0
    for step, value in points:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
            out.append((step, total / norm))
    return out


def draw_curves(axes: Axes, history: History, val_history: History, colors: Mapping[str, Any]) -> None:
    for name, color in colors.items():
        points, held_out = history.get(name, ()), val_history.get(name, ())
        if points:
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.22, linewidth=0.8)
        if smoothed := smooth(points):
            axes.plot(*zip(*smoothed, strict=True), color=color, linewidth=1.9, label=name)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=color, linestyle="none", marker="o", markersize=5,
                      markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
    _style(axes, "loss" + (" (line: training, dot: validation)" if any(val_history.values()) else " in training"))
    axes.set_xlabel("optimizer step", fontsize=9, color=_INK)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, edgecolor="none", framealpha=0.85, loc="upper right", ncols=1 + len(colors) // 12)


def draw_matrix(axes: Axes, matrix: Matrix, metric: str) -> None:
    """Coloured by the change against the bare backbone: green better, brown worse, whatever the metric's direction."""
    rows, data_sets = list(matrix), data_sets_of(matrix)
    sign = 1 if metric == "accuracy" else -1
    gains = [
        [sign * _log_ratio(matrix[row], matrix.get(BACKBONE, {}), data_set) for data_set in data_sets] for row in rows
    ]
    limit = max([abs(gain) for row in gains for gain in row] or [0.0]) or 1.0
    axes.imshow(gains, cmap="BrBG", vmin=-1.25 * limit, vmax=1.25 * limit, aspect="auto")
    for column, data_set in enumerate(data_sets):
        best = best_row(matrix, data_set, metric)
        for index, row in enumerate(rows):
            value = matrix[row].get(data_set, math.nan)
            text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
            if row == data_set and gains[index][column]:
                text += f"\n({math.expm1(sign * gains[index][column]):+.0%})"
            dark = abs(gains[index][column]) > 0.75 * limit
            axes.text(column, index, text, ha="center", va="center", fontsize=10, color="white" if dark else _INK,
                      fontweight="bold" if row == best else "normal")  # fmt: skip
    arrow = "higher" if metric == "accuracy" else "lower"
    _style(axes, f"held-out {metric} ({arrow} is better)")
    axes.set_xticks(range(len(data_sets)), data_sets, rotation=0 if len(data_sets) <= 4 else 30)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("data", fontsize=9, color=_INK)
    axes.set_xticks([x - 0.5 for x in range(1, len(data_sets))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _log_ratio(values: Mapping[str, float], bare: Mapping[str, float], data_set: str) -> float:
    value, reference = values.get(data_set, math.nan), bare.get(data_set, math.nan)
    known = math.isfinite(value) and math.isfinite(reference) and value > 0 and reference > 0
    return math.log(value / reference) if known else 0.0


def draw_memory(axes: Axes, memory: Mapping[str, Any], colors: Mapping[str, Any]) -> None:
    """Two bars of what stays between steps (no activations): one backbone with all adapters, and separate copies."""
    unit, name = next(
        ((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if memory["separate"] >= u), (1, "B")
    )
    backbone, adapters = memory[BACKBONE]["bytes"] / unit, memory["adapters"]
    for y, count in ((1, 1), (0, len(adapters))):
        left = 0.0
        for index in range(count):
            axes.barh(y, backbone, left=left, height=0.5, color=_GREY, edgecolor="white", linewidth=1.2,
                      label="backbone" if y == 1 and index == 0 else None)  # fmt: skip
            left += backbone
        for adapter, parts in adapters.items():
            axes.barh(y, parts["total"] / unit, left=left, height=0.5, color=colors[adapter], edgecolor="white",
                      linewidth=0.6, label=adapter if y == 1 else None)  # fmt: skip
            left += parts["total"] / unit
        axes.annotate(f" {left:,.1f} {name}", (left, y), va="center", fontsize=10, fontweight="bold", color=_INK)
    copies = f"{len(adapters)} separate cop{'y' if len(adapters) == 1 else 'ies'}"
    _style(axes, f"memory: {memory['saving'] / max(memory['separate'], 1):.0%} less than {copies}")
    axes.set_yticks([1, 0], ["together", "\n".join(copies.rsplit(" ", 1))])
    axes.set_ylim(-0.55, 1.9)
    axes.margins(x=0.2)
    axes.set_xlabel(f"{name}: weights, gradients, optimizer state", fontsize=9, color=_INK)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper right", fontsize=9, frameon=False, ncols=min(4, 1 + len(adapters)), handlelength=1.0)
