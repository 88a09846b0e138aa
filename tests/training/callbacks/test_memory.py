"""The bytes that the monitor reports are those that there are."""

from __future__ import annotations

import csv
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor, SavedForBackward, peak_bytes, shares
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit, tiny_module

ADAPTERS: dict[str, dict[str, Any]] = {"small": {"rank": 2}, "large": {"rank": 8, "plain_modules": ["lm_head"]}}


@pytest.fixture
def module(tmp_path: Path) -> MultiAdapterModule:
    return tiny_module(tmp_path, ADAPTERS)


def hooks_left() -> bool:
    """Whether autograd still hands saved tensors to some hook."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]


def test_weights_gradients_and_adamw_state_are_exact(module: MultiAdapterModule) -> None:
    monitor = AdapterMemoryMonitor(every_n_steps=2, table=False)
    tiny_fit(module, tiny_batches(list(ADAPTERS), 3), monitor)
    report = monitor.report()
    assert list(report["adapters"]) == list(ADAPTERS)
    for adapter in module.adapters.adapters():
        weights = sum(p.numel() * p.element_size() for p in adapter.parameters())
        step_counters = 4 * len(list(adapter.parameters()))
        parts = report["adapters"][adapter.name]
        assert parts["weights"] == parts["gradients"] == weights
        assert parts["optimizer"] == 2 * weights + step_counters
        assert parts["total"] == 4 * weights + step_counters
    backbone, totals = module.adapters.backbone_nbytes, sum(p["total"] for p in report["adapters"].values())
    assert report["backbone"] == {"bytes": backbone}
    assert report["together"] == backbone + totals
    assert report["separate"] == 2 * backbone + totals
    assert report["saving"] == backbone
    assert all(type(size) is int for parts in report["adapters"].values() for size in parts.values())


def test_an_adapter_that_is_not_in_the_batch_has_no_gradients_and_no_activations(module: MultiAdapterModule) -> None:
    monitor = AdapterMemoryMonitor(table=False)
    tiny_fit(module, tiny_batches(["large"], 1), monitor)
    absent = monitor.report()["adapters"]["small"]
    assert absent["weights"] > 0
    assert absent["gradients"] == absent["optimizer"] == absent["activations"] == 0


def test_activations_grow_with_the_tokens_and_are_shared_by_them(module: MultiAdapterModule) -> None:
    measured = []
    for length in (8, 16, 32):
        monitor = AdapterMemoryMonitor(table=False)
        tiny_fit(module, tiny_batches(list(ADAPTERS), 1, rows=[1, 3], length=length), monitor)
        parts = monitor.report()["adapters"]
        assert parts["large"]["activations"] == pytest.approx(3 * parts["small"]["activations"], abs=3)
        measured.append(parts["large"]["activations"] + parts["small"]["activations"])
    assert measured[0] > 0
    assert measured[2] - measured[1] == pytest.approx(2 * (measured[1] - measured[0]), rel=0.2)


def test_the_largest_measurement_is_reported_and_a_new_fit_starts_anew(module: MultiAdapterModule) -> None:
    monitor = AdapterMemoryMonitor(every_n_steps=1, table=False)
    measured = []
    for lengths in ((32, 4), (4, 4)):
        batches = [batch for length in lengths for batch in tiny_batches(list(ADAPTERS), 1, length=length)]
        tiny_fit(module, Batches(batches), monitor)
        measured.append(monitor.report()["adapters"]["small"]["activations"])
    assert measured[0] > 4 * measured[1]


def test_the_backbone_is_no_activation(module: MultiAdapterModule) -> None:
    """One token's activations are fewer bytes than the backbone, whose codes every layer saves for its backward."""
    monitor = AdapterMemoryMonitor(table=False)
    tiny_fit(module, tiny_batches(["small"], 1, rows=1, length=2), monitor)
    assert 0 < monitor.report()["adapters"]["small"]["activations"] < module.adapters.backbone_nbytes


def test_every_storage_is_counted_once_and_parameters_never() -> None:
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)
    saved = SavedForBackward(layer)
    saved.start()
    y = layer(x)  # saves x, and the weight
    z = y * y.view(8, 4)  # saves y twice
    w = (z[:2].exp()).sum()  # saves the exponential, 2 x 4
    saved.stop()
    assert saved.total == x.nbytes + y.nbytes + 2 * 4 * 4
    w.backward()
    assert x.grad is not None


def test_a_measured_graph_is_freed_without_the_garbage_collector() -> None:
    """A hook that keeps a node's own output would make a cycle of it."""
    saved = SavedForBackward(nn.Linear(1, 1))
    x = torch.randn(4, requires_grad=True)
    gone: list[bool] = []
    gc.disable()
    try:
        saved.start()
        y = x.exp()
        saved.stop()
        weakref.finalize(y, lambda: gone.append(True))
        del y
        assert gone == [True]
    finally:
        gc.enable()


def test_only_the_steps_that_are_due_are_measured(module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    original = SavedForBackward.start
    monkeypatch.setattr(SavedForBackward, "start", lambda self: (started.append(module.global_step), original(self))[1])
    tiny_fit(module, tiny_batches(list(ADAPTERS), 5), AdapterMemoryMonitor(every_n_steps=2, table=False))
    assert started == [0, 2, 4]


def test_an_accumulated_step_is_measured_as_one(module: MultiAdapterModule, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = AdapterMemoryMonitor(every_n_steps=1, table=False)
    tiny_fit(
        module, tiny_batches(list(ADAPTERS), 4), monitor, accumulate_grad_batches=2, logger=logger, log_every_n_steps=1
    )
    assert [row["step"] for row in logged(logger)] == ["0", "1"]
    parts = monitor.report()["adapters"]["small"]
    assert parts["gradients"] == parts["weights"]


def logged(logger: CSVLogger) -> list[dict[str, str]]:
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("memory/small/weights")]


def test_figures_are_logged_whatever_the_interval_of_other_metrics(module: MultiAdapterModule, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = AdapterMemoryMonitor(every_n_steps=2, table=False)
    tiny_fit(module, tiny_batches(list(ADAPTERS), 3), monitor, logger=logger, log_every_n_steps=3)
    rows = logged(logger)
    assert [row["step"] for row in rows] == ["0", "2"]
    report = monitor.report()
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert float(rows[-1][f"memory/large/{part}"]) == report["adapters"]["large"][part]
    assert float(rows[-1]["memory/backbone/bytes"]) == report["backbone"]["bytes"]
    assert float(rows[-1]["memory/peak/bytes"]) > report["together"]


def test_nothing_stays_registered_after_a_fit_or_a_failed_forward(module: MultiAdapterModule) -> None:
    assert not hooks_left()
    monitor = AdapterMemoryMonitor(table=False)
    tiny_fit(module, tiny_batches(list(ADAPTERS), 1), monitor)
    assert not hooks_left()
    broken = tiny_batches(list(ADAPTERS), 1)
    broken.batches[0]["input_ids"] = broken.batches[0]["input_ids"].float()
    with pytest.raises((IndexError, RuntimeError)):
        tiny_fit(module, broken, monitor)
    assert not hooks_left()


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [AdapterMemoryMonitor(every_n_steps=1, table=False)]):
        module = tiny_module(tmp_path, ADAPTERS)
        tiny_fit(module, tiny_batches(list(ADAPTERS), 3), *callbacks)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_recomputed_layers_keep_fewer_activations(tmp_path: Path) -> None:
    kept = []
    for recompute in (False, True):
        module = tiny_module(tmp_path, ADAPTERS, gradient_checkpointing=recompute)
        monitor = AdapterMemoryMonitor(table=False)
        tiny_fit(module, tiny_batches(list(ADAPTERS), 1, length=32), monitor)
        kept.append(monitor.report()["adapters"]["small"]["activations"])
    assert 0 < kept[1] < 0.6 * kept[0]


def test_the_table_is_printed_at_the_end(module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_fit(module, tiny_batches(list(ADAPTERS), 1), AdapterMemoryMonitor())
    out = capsys.readouterr().out
    for text in ("backbone, once", "small", "large", "together", "2 copies", "saved against 2 copies"):
        assert text in out


def test_a_fit_without_a_step_reports_the_weights(module: MultiAdapterModule) -> None:
    monitor = AdapterMemoryMonitor(table=False)
    tiny_fit(module, tiny_batches(list(ADAPTERS), 1), monitor, max_steps=0)
    report = monitor.report()
    assert [parts["total"] for parts in report["adapters"].values()] == [a.nbytes for a in module.adapters.adapters()]
    assert report["saving"] == module.adapters.backbone_nbytes


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"adapters": ["a", "b"], "rows": [1, 2]}, {"a": 3, "b": 7}),
        ({"adapters": ["a", "b"], "rows": [1, 1]}, {"a": 5, "b": 5}),
        ({"adapters": ["a", "b", "a"], "rows": [2, 1, 1]}, {"a": 7, "b": 3}),
        ({"adapters": ["a", "b"], "rows": [1, 2], "lengths": [7, 1, 2]}, {"a": 7, "b": 3}),
        ({"x": 1}, {"a": 5, "b": 5}),
    ],
)
def test_shares_follow_the_rows_and_lose_nothing(batch: dict[str, Any], expected: dict[str, int]) -> None:
    divided = shares(10, batch, ["a", "b"])
    assert divided == expected
    assert sum(divided.values()) == 10


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_the_peak_is_that_of_the_process() -> None:
    import psutil

    peak, what = peak_bytes(torch.device("cpu"))
    assert what == "process memory"
    assert 0.5 * psutil.Process().memory_info().rss < peak < 64 * 2**30


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_bad_interval_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="every_n_steps"):
        AdapterMemoryMonitor(every_n_steps=value)
