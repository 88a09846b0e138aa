"""Each adapter's own metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchmetrics.text
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.training.metrics import AdapterMetrics, MeanLoss, Perplexity, stay_in_place

IGNORED = -100


def sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of targets, as the module hands them on."""
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two of different size: a mean of means would be wrong."""
    torch.manual_seed(0)
    found = []
    for rows, ignored in ((2, 3), (5, 0)):
        logits, labels = torch.randn(rows, 4, 7), torch.randint(7, (rows, 4))
        labels[0, :ignored] = IGNORED
        found.append((logits, labels))
    return found


def test_perplexity_is_that_of_torchmetrics() -> None:
    mine, theirs = Perplexity(), torchmetrics.text.Perplexity(ignore_index=IGNORED)
    for logits, labels in batches():
        mine.update(*sums(logits, labels))
        theirs.update(logits, labels)
    assert float(mine.compute()) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_a_language_model_has_the_loss_per_token_and_its_exponential() -> None:
    metrics = AdapterMetrics("causal-lm", 2)
    logits = torch.cat([logits.flatten(0, 1) for logits, _ in batches()])
    labels = torch.cat([labels.flatten() for _, labels in batches()])
    for batch in batches():
        metrics.update(*sums(*batch))
    values = metrics.compute()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    assert set(values) == {"loss", "perplexity"}
    assert torch.allclose(values["loss"], loss)
    assert torch.allclose(values["perplexity"], loss.exp())


def test_a_classifier_has_accuracy_and_macro_f1() -> None:
    metrics = AdapterMetrics("sequence-classification", 3)
    labels = torch.tensor([0, 0, 0, 1, 2])
    answers = torch.tensor([0, 0, 1, 1, 0])
    logits = 5.0 * F.one_hot(answers, 3)
    for part in (slice(0, 3), slice(3, 5)):
        metrics.update(*sums(logits[part], labels[part]), logits[part], labels[part])
    values = metrics.compute()
    assert set(values) == {"loss", "accuracy", "f1"}
    assert float(values["accuracy"]) == pytest.approx(3 / 5)
    assert float(values["f1"]) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)  # F1 of the classes 0, 1 and 2
    assert torch.allclose(values["loss"], F.cross_entropy(logits, labels))


def test_a_loss_of_ones_own_is_only_averaged() -> None:
    metrics = AdapterMetrics("custom", 0)
    metrics.update(torch.tensor(6.0), torch.tensor(3))
    metrics.update(torch.tensor(4.0), torch.tensor(1))
    assert {name: float(value) for name, value in metrics.compute().items()} == {"loss": pytest.approx(2.5)}


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "sequence-classification", "custom"])
def test_nothing_added_gives_nothing(task: str) -> None:
    assert AdapterMetrics(task, 3).compute() == {}


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_reset_forgets_everything(task: str) -> None:
    metrics = AdapterMetrics(task, 3)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    metrics.update(*sums(logits, labels), logits, labels)
    first = metrics.compute()
    metrics.reset()
    assert metrics.compute() == {}
    metrics.update(*sums(logits, labels), logits, labels)
    assert metrics.compute() == first


def test_metrics_add_no_bytes_to_the_module_and_nothing_to_its_checkpoint() -> None:
    for task in ("causal-lm", "sequence-classification"):
        metrics = AdapterMetrics(task, 3)
        assert [*metrics.parameters(), *metrics.buffers()] == []
        assert metrics.state_dict() == {}


def test_no_graph_is_kept() -> None:
    metrics = AdapterMetrics("causal-lm", 2)
    metrics.update(torch.tensor(6.0, requires_grad=True) * 1, torch.tensor(3))
    assert not any(value.requires_grad for value in metrics.compute().values())


def test_many_tokens_are_summed_without_loss() -> None:
    """In float32 a sum of 2 ** 24 and more no longer grows by 1."""
    loss = MeanLoss()
    loss.update(torch.tensor(2.0**24), torch.tensor(2**24))
    for _ in range(8):
        loss.update(torch.tensor(1.0), torch.tensor(1))
    assert (float(loss.total), float(loss.count)) == (2.0**24 + 8, 2.0**24 + 8)


def test_nan_shows() -> None:
    metrics = AdapterMetrics("causal-lm", 2)
    metrics.update(torch.tensor(1.0), torch.tensor(1))
    metrics.update(torch.tensor(math.nan), torch.tensor(1))
    assert all(bool(value.isnan()) for value in metrics.compute().values())


def test_what_is_logged_is_moved_only_when_it_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric

    moved: list[Any] = []
    move = _ResultMetric.to
    monkeypatch.setattr(_ResultMetric, "to", lambda self, *args, **kwargs: moved.append(args) or move(self, *args))
    results = _ResultCollection(training=True)

    def log(value: float) -> None:
        results.log("training_step", "loss", torch.tensor(value), on_step=True, on_epoch=False)
        stay_in_place(results.values())

    for value in (1.0, 2.0, 3.0):
        log(value)
        assert results["training_step.loss"].value == value
    assert len(moved) == 1
    metric = results["training_step.loss"]
    assert metric.to(torch.device("meta")) is metric
    assert len(moved) == 2 and metric.value.device.type == "meta"
