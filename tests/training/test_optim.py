"""One optimizer for all adapters: its groups, schedules, clipping and bytes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetuna_lightning.configs import AdapterConfig, OptimConfig
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.optim import (
    AdapterOptimizers,
    AdapterSchedules,
    build_optimizer,
    check_optimizer,
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
    assert all(isinstance(one, kind) for one in optimizer.optimizers.values())
    assert [group["name"] for group in optimizer.param_groups] == ["sql", "legal"]
    for owner in CONFIGS:
        for a, b in zip(mine[owner], theirs[owner], strict=True):
            assert float((a - b).detach().norm()) < 0.05 * float((b - 1).detach().norm())
            assert sum(tensor.dtype == torch.uint8 for tensor in tensors(optimizer.state[a])) == 2
    assert optimizer_bytes(optimizer)["legal"] < 0.3 * optimizer_bytes(full)["legal"]


# ---- an optimizer of one's own ---------------------------------------------------------------------------------------

KINDS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "lion": bitsandbytes.optim.Lion,
    "adamw8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit,
    "lion8bit": bitsandbytes.optim.Lion8bit,
    "paged_lion8bit": bitsandbytes.optim.PagedLion8bit,
}
pages = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


def random_steps(optimizer: AdapterOptimizers, seeds: range) -> None:
    """A step for each seed, with gradients that depend on it and the adapter's name."""
    for seed in seeds:
        for name, own in optimizer.optimizers.items():
            generator = torch.Generator().manual_seed(1000 * seed + sum(name.encode()))
            for parameter in own.param_groups[0]["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        set_rates(optimizer)


def set_rates(optimizer: AdapterOptimizers) -> None:
    """As ``AdapterSchedules.step`` does."""
    for name, own in optimizer.optimizers.items():
        own.param_groups[0]["lr"] = optimizer.rate(name)


@pages
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_s_own_optimizer_is_that_class_by_itself(kind: str) -> None:
    """Bit for bit, beside one of another class, with its own settings or the class's."""
    mine = AdapterConfig(lr=0.1, optimizer=kind, max_grad_norm=None, weight_decay=0.1, schedule="constant")
    configs = {**CONFIGS, "sql": mine}
    owned = parameters(5000)
    optimizer = optimizer_of(owned, "adamw", configs)
    assert isinstance(optimizer.optimizers["sql"], KINDS[kind])
    assert type(optimizer.optimizers["legal"]) is torch.optim.AdamW
    twin = parameters(5000)["sql"]
    shared = {"betas": (0.8, 0.9), "eps": 1e-6, "fused": True} if kind == "adamw" else {}
    alone = KINDS[kind](twin, lr=0.1, weight_decay=0.1, **shared)  # type: ignore[arg-type]
    random_steps(optimizer, range(3))
    for seed in range(3):
        generator = torch.Generator().manual_seed(1000 * seed + sum(b"sql"))
        for parameter in twin:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        alone.step()
    assert all(torch.equal(a, b) for a, b in zip(owned["sql"], twin, strict=True))
    assert optimizer_bytes(optimizer)["sql"] > 0 or kind == "sgd"  # which has no state without momentum


def test_settings_fall_back_to_the_shared_ones_of_the_same_optimizer() -> None:
    configs = {
        "sql": AdapterConfig(betas=[0.1, 0.2]),
        "legal": AdapterConfig(optimizer="lion8bit"),
        "code": AdapterConfig(optimizer="sgd", momentum=0.5),
    }
    owned = {name: [nn.Parameter(torch.ones(3))] for name in configs}
    groups = {group["name"]: group for group in optimizer_of(owned, configs=configs).param_groups}
    assert (groups["sql"]["betas"], groups["sql"]["eps"]) == ((0.1, 0.2), 1e-6)
    assert groups["legal"]["betas"] == (0.9, 0.99)  # Lion's, and not the shared AdamW's
    assert groups["code"]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, r"adapter 'sql': adapter.betas is set, but sgd .*: momentum"),
        ({"optimizer": "lion", "eps": 1e-6}, r"adapter.eps is set, but lion does not take it \(its settings: betas"),
        ({"momentum": 0.9}, "adapter.momentum is set, but adamw does not take it"),
        ({"optimizer": "adafactor", "eps": 1e-3}, "none of its own"),
    ],
)
def test_a_setting_that_the_optimizer_does_not_take_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer("sql", AdapterConfig(**fields), OptimConfig())


# ---- state by name ---------------------------------------------------------------------------------------------------


def company(*names: str, **kinds: str) -> AdapterOptimizers:
    """Adapters whose weights depend on their names alone."""
    owned, configs = {}, {}
    for name in names:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        owned[name] = [nn.Parameter(torch.randn(size, generator=generator)) for size in (5000, 7)]
        configs[name] = AdapterConfig(lr=0.1, optimizer=kinds.get(name), accumulate=2 if name == "b" else 1)
    return build_optimizer(owned, configs, OptimConfig(), total_steps=10)


def values(optimizer: AdapterOptimizers, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in optimizer.optimizers[name].param_groups[0]["params"]]


@pages
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["abc", "cba", "ac", "cab", "axbc", "b"])
def test_state_is_kept_by_name(kind: str, names: str) -> None:
    """With adapters more, fewer and in another order; b amid an accumulation; each goes on as in the run that was not
    interrupted, bit for bit, and a new one as a new one does."""
    kinds = {"a": kind}
    whole = company(*"abc", **kinds)
    random_steps(whole, range(5))
    first = company(*"abc", **kinds)
    random_steps(first, range(3))
    saved = copy.deepcopy(first.state_dict())
    second = company(*names, **kinds)
    for name in set(names) & set("abc"):
        for mine, theirs in zip(second.optimizers[name].param_groups[0]["params"], values(first, name), strict=True):
            mine.data.copy_(theirs)
    second.load_state_dict(saved)
    for seed in (3, 4):
        for name in names:  # the sum of what waits and what comes, as backward makes it
            second.note(name, torch.tensor(True))
            generator = torch.Generator().manual_seed(1000 * seed + sum(name.encode()))
            for parameter in second.optimizers[name].param_groups[0]["params"]:
                new = torch.randn(parameter.shape, generator=generator)
                waits = name == "b" and parameter.grad is not None and second.turns["b"].pending
                parameter.grad = parameter.grad * 0 + new if waits else new
        second.step()
        set_rates(second)
    for name in names:
        if name in "abc":
            assert all(torch.equal(m, t) for m, t in zip(values(second, name), values(whole, name), strict=True))
            assert second.turns[name].steps == whole.turns[name].steps
    if "x" in names:
        assert second.turns["x"].steps == 2


def test_accumulated_gradients_come_back_with_the_next_batch() -> None:
    first, second = company("b"), company("b")
    give(first, b=3.0)
    first.note("b", torch.tensor(True))
    first.step()  # one of two
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    assert second.state_dict()["adapters"]["b"]["gradients"].keys() == {0, 1}  # also before it is put back
    second.note("b", torch.tensor(True))
    assert all(bool((p.grad == 3.0).all()) for p in second.optimizers["b"].param_groups[0]["params"])
    second.zero_grad()  # it waits
    assert all(p.grad is not None for p in second.optimizers["b"].param_groups[0]["params"])
    second.step()
    assert second.turns["b"].steps == 1
    second.zero_grad()
    assert all(p.grad is None for p in second.optimizers["b"].param_groups[0]["params"])


def test_what_is_new_or_gone_or_changed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    first = company("a", "b", "c")
    random_steps(first, range(2))
    second = company("a", "c", "new", c="sgd")
    with caplog.at_level(logging.INFO):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "the checkpoint's optimizer state of adapter 'b' is passed over: it is not here",
        "adapter 'c' was trained by AdamW and is now by SGD, whose state starts afresh",
        "adapter 'new' is not in the checkpoint: its optimizer starts afresh",
    ]
    assert (second.turns["a"].steps, second.turns["c"].steps, second.turns["new"].steps) == (2, 2, 0)
    assert {name: group["lr"] for name, group in zip("acn", second.param_groups, strict=True)} == pytest.approx(
        {"a": 0.08, "c": 0.08, "n": 0.1}  # a linear schedule over ten steps
    )


def test_a_checkpoint_can_be_read_without_trusting_it(tmp_path: Path) -> None:
    optimizer = company("a", "b", a="lion8bit")
    random_steps(optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = company("b", "a", a="lion8bit")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.turns["a"].steps == 3
