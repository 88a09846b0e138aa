"""One set of torchmetrics for each adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood per token, from sums that the loss has already computed.

    torchmetrics' own takes [batch, tokens, vocabulary] logits and normalises them once more.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add a summed negative log-likelihood over ``tokens`` tokens."""
        self.nll += nll.detach().double()
        self.tokens += tokens.double()

    def compute(self) -> Tensor:
        return torch.exp(self.nll / self.tokens).float()


class AdapterMetrics(nn.Module):
    """The metrics of one adapter: loss, and perplexity for language models or accuracy and F1 for classifiers."""

    def __init__(self, task: str, num_labels: int) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="disable")  # a NaN shows as NaN, and no value is fetched from the device
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
        self.loss.update(total.detach().float() / count, weight=count)
        for metric in self.extra.values():
            if isinstance(metric, Perplexity):
                metric.update(total, count)
            else:
                metric.update(logits.detach(), labels)  # type: ignore[operator, union-attr]

    def compute(self) -> dict[str, Tensor]:
        """Values by name; empty when nothing was added."""
        if not self.loss.update_called:
            return {}
        return {"loss": self.loss.compute()} | {name: metric.compute() for name, metric in self.extra.items()}  # type: ignore[operator]

    def reset(self) -> None:
        """Forget everything."""
        self.loss.reset()
        for metric in self.extra.values():
            metric.reset()  # type: ignore[operator]
