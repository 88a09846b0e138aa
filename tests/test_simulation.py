"""The ledger: what is counted, when it is freed, and where a step's phases begin."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuna_lightning.errors import BackboneError
from finetuna_lightning.simulation import (
    FIRST_BACKWARD,
    FORWARD,
    HEAD,
    LAST_BACKWARD,
    STEP,
    Ledger,
    Phase,
    StepBytes,
    fake_mode,
    like_layers,
    simulate,
    to_fake_,
)

CPU = torch.device("cpu")


class Net(nn.Module):
    """Layers that double the width within, and a head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(layers))
        self.head = nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def everything(paths: Sequence[str]) -> bool:
    return True


def test_every_storage_counts_once_until_it_is_freed() -> None:
    with fake_mode():
        weight = torch.empty(10, 10)
        with Ledger() as ledger:
            ledger.enter(FORWARD)
            view = weight.t()  # it stood before
            x = torch.empty(5, 10)
            y = x.view(10, 5)[:3] + 1  # a view, and three rows of five
            ledger.enter(HEAD)
            assert ledger.phases[FORWARD].total == ledger.phases[HEAD].total == 4 * (50 + 15)
            del x
            ledger.enter(STEP)
            assert ledger.phases[STEP].total == 4 * 15
            x = y @ torch.empty(5, 1000)
            assert ledger.phases[STEP].total == 4 * (15 + 5000 + 3000)
    assert view.shape == (10, 10) and x.shape == (3, 1000)


def test_a_gpu_s_allocator_rounds_up() -> None:
    with fake_mode(), Ledger(512) as ledger:
        ledger.enter(FORWARD)
        kept = torch.empty(1), torch.empty(129)
        ledger.enter(HEAD)
    assert ledger.phases[HEAD].total == 512 + 1024 and len(kept) == 2


def test_the_phases_of_a_step() -> None:
    """By hand: a layer keeps its input and the tangent, and the second's input is the first's sum."""
    rows, net = 4, Net(2).to("meta")
    with fake_mode():
        to_fake_(net, CPU)
        x, own = torch.empty(rows, 8), {"a": list(net.parameters())}
        found = simulate(lambda: net(x).sum(), own, net.layers)
        accumulated = simulate(lambda: net(x).sum(), own, net.layers, accumulating=["a"])
    weights = 4 * sum(p.numel() for p in net.parameters())
    layer, hidden = 4 * rows * 16, 4 * rows * 8
    # of the layers' inputs, x itself stood before; the sum that the head reads; the loss
    assert found.kept == 2 * layer + 2 * hidden + 4
    assert found.phases[FORWARD].gradients == found.phases[HEAD].gradients == 0  # those of the step before are freed
    assert accumulated.phases[FORWARD].gradients == accumulated.phases[HEAD].gradients == weights
    assert found.phases[FIRST_BACKWARD].gradients > found.phases[LAST_BACKWARD].gradients
    assert found.phases[FIRST_BACKWARD].kept < found.phases[LAST_BACKWARD].kept
    assert found.phases[STEP] == Phase(weights, 0, 0)
    assert found.peak[1].total == max(phase.total for phase in found.phases.values())


def test_phases_lie_on_a_line() -> None:
    few = StepBytes(10, {FORWARD: Phase(1, 2, 3)})
    more = StepBytes(14, {FORWARD: Phase(2, 2, 7)})
    assert few.moved(more, 3) == StepBytes(22, {FORWARD: Phase(4, 2, 15)})
    assert few.moved(more, -1).kept == 6


def test_a_forward_pass_that_asks_for_values_is_refused() -> None:
    net = Net(1)
    with fake_mode():
        to_fake_(net, CPU)
        x = torch.empty(2, 8)
        with pytest.raises(BackboneError, match="tensors that have shapes alone"):
            simulate(lambda: net(x).sum() if bool(x.sum() > 0) else x.sum(), {"a": list(net.parameters())}, None)
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


def test_like_layers() -> None:
    net = Net(5)
    assert like_layers(net, everything) == ("layers", net.layers)
    assert like_layers(net, lambda paths: "layers.4" not in paths) is None
    assert like_layers(Net(3), everything) is None  # no more than are tried
    net.layers[1] = nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 8))
    assert like_layers(net, everything) is None


def test_what_is_shared_or_trained_stays_so() -> None:
    net = Net(1)
    net.head.weight.requires_grad_(False)
    net.twin = net.head
    with fake_mode():
        to_fake_(net, CPU)
    assert net.twin.weight is net.head.weight  # type: ignore[union-attr]
    assert [p.requires_grad for p in net.head.parameters()] == [False, True]
    assert net.head.weight.untyped_storage().nbytes() == 3200
