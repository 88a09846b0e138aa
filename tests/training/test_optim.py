"""One optimizer for all adapters: its groups, schedules, clipping and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetuna_lightning.configs import AdapterConfig, OptimConfig
from finetuna_lightning.training.optim import (
    AdapterOptimizers,
    AdapterSchedules,
    build_optimizer,
    optimizer_bytes,
    schedule_factor,
)

CONFIGS = {
    "sql": AdapterConfig(lr=0.1, weight_decay=0.5, max_grad_norm=1.0, schedule="constant", warmup_steps=1),
    "legal": AdapterConfig(lr=0.2, max_grad_norm=None, schedule="linear", max_steps=4),
}


def parameters(size: int = 4) -> dict[str, list[nn.Parameter]]:
    """Two for each adapter."""
    return {name: [nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(2, size))] for name in CONFIGS}


def optimizer_of(
    owned: Mapping[str, list[nn.Parameter]],
    name: str = "adamw",
    configs: Mapping[str, AdapterConfig] = CONFIGS,
    total_steps: float = math.inf,
) -> AdapterOptimizers:
    return build_optimizer(owned, configs, OptimConfig(name=name, betas=[0.8, 0.9], eps=1e-6), total_steps)


def give(optimizer: AdapterOptimizers, **values: float) -> None:
    """Gradients of one value everywhere, for the adapters of ``values``."""
    for name, value in values.items():
        for parameter in optimizer.optimizers[name].param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, value)


def test_each_adapter_is_a_group_with_its_own_settings() -> None:
    owned = parameters()
    owned["sql"].append(nn.Parameter(torch.ones(3), requires_grad=False))
    optimizer = optimizer_of(owned)
    assert {type(one) for one in optimizer.optimizers.values()} == {torch.optim.AdamW}
    assert [group["name"] for group in optimizer.param_groups] == ["sql", "legal"]
    for group in optimizer.param_groups:
        config = CONFIGS[group["name"]]
        assert [id(p) for p in group["params"]] == [id(p) for p in owned[group["name"]][:2]]
        assert (group["lr"], group["weight_decay"]) == (config.lr, config.weight_decay)
        assert group["max_grad_norm"] == config.max_grad_norm
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("kind", "warmup", "total", "expected"),
    [
        ("constant", 0, 4, [1, 1, 1, 1, 1]),
        ("constant", 3, 4, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, 4, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 1, 5, [0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", 0, 4, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5), 0, 0]),
        ("cosine", 2, 4, [1 / 3, 2 / 3, 1, 0.5, 0]),
        ("linear", 4, 4, [0.2, 0.4, 0.6, 0.8, 0]),  # all warm-up
        ("linear", 9, 4, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_a_schedule_warms_up_and_decays(kind: str, warmup: int, total: int, expected: list[float]) -> None:
    factor = schedule_factor(kind, warmup, total)
    assert [factor(step) for step in range(len(expected))] == pytest.approx(expected, abs=1e-12)


def test_one_scheduler_moves_every_group_along_its_own_schedule() -> None:
    optimizer = optimizer_of(parameters())
    scheduler = AdapterSchedules(optimizer)
    rates = []
    for _ in range(5):
        rates.append([group["lr"] for group in optimizer.param_groups])
        give(optimizer, sql=1.0, legal=1.0)
        optimizer.step()
        scheduler.step()
    sql, legal = zip(*rates, strict=True)
    assert sql == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])
    assert legal == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])  # its own four steps, not the trainer's hundred


def test_a_schedule_ends_with_the_trainer_where_that_is_earlier() -> None:
    configs = {"legal": AdapterConfig(lr=1.0, schedule="linear", max_steps=100)}
    optimizer = optimizer_of({"legal": parameters()["legal"]}, configs=configs, total_steps=2)
    scheduler = AdapterSchedules(optimizer)
    give(optimizer, legal=1.0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def with_gradients(**values: float) -> tuple[dict[str, list[nn.Parameter]], AdapterOptimizers]:
    """Gradients of one value everywhere, for the adapters of ``values``."""
    owned = parameters()
    optimizer = optimizer_of(owned)
    give(optimizer, **values)
    return owned, optimizer


def test_each_norm_is_clipped_by_itself() -> None:
    owned, optimizer = with_gradients(sql=2.0, legal=100.0)
    norms = optimizer.clip()
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(
        {"sql": 2 * math.sqrt(12), "legal": 100 * math.sqrt(12)}  # twelve numbers each; before clipping
    )
    grads = torch.cat([p.grad.flatten() for p in owned["sql"]])  # type: ignore[union-attr]
    assert float(grads.norm()) == pytest.approx(1.0, rel=1e-4)
    assert all(bool((p.grad == 100.0).all()) for p in owned["legal"])  # type: ignore[union-attr]


def test_a_small_norm_is_left_alone() -> None:
    owned, optimizer = with_gradients(sql=0.1)
    optimizer.clip()
    assert all(bool((p.grad == 0.1).all()) for p in owned["sql"])  # type: ignore[union-attr]


def test_nan_in_one_adapter_stays_there() -> None:
    owned, optimizer = with_gradients(sql=2.0, legal=math.nan)
    assert math.isnan(optimizer.clip()["legal"])
    assert all(bool(p.grad.isfinite().all()) for p in owned["sql"])  # type: ignore[union-attr]


def test_an_adapter_without_gradients_has_no_norm() -> None:
    _, optimizer = with_gradients(sql=2.0)
    assert list(optimizer.clip()) == ["sql"]


def stepped(name: str, size: int) -> tuple[dict[str, list[nn.Parameter]], AdapterOptimizers]:
    owned = parameters(size)
    generator = torch.Generator().manual_seed(0)
    optimizer = optimizer_of(owned, name)
    for _ in range(3):
        for parameter in (p for several in owned.values() for p in several):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return owned, optimizer


def test_bytes_of_adamw_are_exact() -> None:
    owned, optimizer = stepped("adamw", 5)
    moments = {name: sum(2 * p.nbytes for p in several) for name, several in owned.items()}
    counters = {name: 4 * len(several) for name, several in owned.items()}  # the step, a float32 for each parameter
    assert optimizer_bytes(optimizer) == {name: moments[name] + counters[name] for name in owned}


def test_there_is_no_state_before_the_first_step() -> None:
    assert optimizer_bytes(optimizer_of(parameters())) == {"sql": 0, "legal": 0}


def tensors(state: Any) -> Iterator[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw8bit", bitsandbytes.optim.AdamW8bit), ("paged_adamw8bit", bitsandbytes.optim.PagedAdamW8bit)],
)
def test_eight_bit_adamw_follows_adamw_in_a_quarter_of_the_bytes(name: str, kind: type[Optimizer]) -> None:
    size = 8192  # bitsandbytes keeps the state of parameters below 4,096 elements in 32 bits
    (mine, optimizer), (theirs, full) = stepped(name, size), stepped("adamw", size)
    assert {type(one) for one in optimizer.optimizers.values()} == {kind}
    assert [group["name"] for group in optimizer.param_groups] == ["sql", "legal"]
    for owner in CONFIGS:
        for a, b in zip(mine[owner], theirs[owner], strict=True):
            assert float((a - b).detach().norm()) < 0.05 * float((b - 1).detach().norm())
            assert sum(tensor.dtype == torch.uint8 for tensor in tensors(optimizer.state[a])) == 2
    assert optimizer_bytes(optimizer)["legal"] < 0.3 * optimizer_bytes(full)["legal"]
