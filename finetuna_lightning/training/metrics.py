"""One set of torchmetrics for each adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class MeanLoss(Metric):
    """The mean loss per target, from sums that the loss has already computed. A NaN shows as NaN.

    torchmetrics' ``MeanMetric`` looks for NaN on the host at every update, or, told not to, ignores the weights.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add a loss summed over ``count`` targets."""
        self.total += total.detach().double()
        self.count += count.double()

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


class Perplexity(MeanLoss):
    """``exp`` of the mean negative log-likelihood per token.

    torchmetrics' own takes [batch, tokens, vocabulary] logits and normalises them once more.
    """

    def compute(self) -> Tensor:
        return torch.exp(self.total / self.count).float()


def stay_in_place(logged: Iterable[Any]) -> None:
    """Have what Lightning keeps of each logged value moved only when it is elsewhere. ``LightningModule.log`` moves it
    at every call, to where it is, by a walk over all attributes of a torchmetrics object: half of what logging takes,
    which for 64 adapters is more than a tenth of a GPU's step."""
    for metric in logged:
        if "to" not in metric.__dict__ and isinstance(getattr(metric, "value", None), Tensor):
            metric.to = _mover(metric, metric.to)


def _mover(metric: Any, move: Callable[..., Any]) -> Callable[..., Any]:
    def to(*args: Any, **kwargs: Any) -> Any:
        there = len(args) == 1 and not kwargs and metric.value.device == args[0]
        return metric if there else move(*args, **kwargs)

    return to


class AdapterMetrics(nn.Module):
    """The metrics of one adapter: loss, and perplexity for language models or accuracy and F1 for classifiers."""

    def __init__(self, task: str, num_labels: int) -> None:
        super().__init__()
        self.loss = MeanLoss()
        extra: dict[str, Metric] = {}
        if task in ("causal-lm", "seq2seq-lm"):
            extra = {"perplexity": Perplexity()}
        elif task == "sequence-classification":
            extra = {
                "accuracy": MulticlassAccuracy(num_labels, average="micro"),
                "f1": MulticlassF1Score(num_labels, average="macro"),
            }
        self.extra = nn.ModuleDict(extra)

    def update(self, total: Tensor, count: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Add a loss summed over ``count`` targets; for classifiers also logits [rows, labels] and labels [rows]."""
        self.loss.update(total, count)
        for metric in self.extra.values():
            if isinstance(metric, Perplexity):
                metric.update(total, count)
            else:
                metric.update(logits.detach(), labels)  # type: ignore[operator, union-attr]

    @property
    def has_data(self) -> bool:
        """Whether anything was added, in this process."""
        return bool(self.loss.update_called)

    def compute(self, elsewhere: bool = False) -> dict[str, Tensor]:
        """Values by name, over all processes; empty when nothing was added, here or (as ``elsewhere`` says) there."""
        if not self.has_data and not elsewhere:
            return {}
        with warnings.catch_warnings():  # what was added may all be elsewhere
            warnings.filterwarnings("ignore", message=r"The ``compute`` method of metric .* was called before")
            return {"loss": self.loss.compute()} | {name: metric.compute() for name, metric in self.extra.items()}  # type: ignore[operator]

    def reset(self) -> None:
        """Forget everything."""
        self.loss.reset()
        for metric in self.extra.values():
            metric.reset()  # type: ignore[operator]
