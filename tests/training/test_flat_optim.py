"""Flat optimizers: bitsandbytes' bits, from one kernel for many tensors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from finetuna_lightning.configs import AdapterConfig, OptimConfig
from finetuna_lightning.training import flat_optim
from finetuna_lightning.training.flat_optim import FLAT, FlatStep, flat_optimizer
from finetuna_lightning.training.optim import AdapterOptimizers, build_optimizer, optimizer_bytes
from tests.helpers.flat import SETTINGS, SIZES, Ops, assert_same, give, pair, weights

STEPS = 20


@pytest.mark.parametrize("chunk", [flat_optim.CHUNK, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FLAT)
def test_every_bit_is_bitsandbytes(kind: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and state, also where tensors do without a gradient now and then, and in chunks that cut tensors."""
    monkeypatch.setattr(flat_optim, "CHUNK", chunk)
    (mine, own), (theirs, peer) = pair(kind, "cpu", dtype)
    for step in range(STEPS):
        for parameters, optimizer in ((mine, own), (theirs, peer)):
            give(parameters, step, absent=(5, None, 3, 0)[step % 4])
            optimizer.step()
    assert_same(mine, own, theirs, peer)
    assert {own.state[p]["step"] for p in mine} == {STEPS, 3 * STEPS // 4}


def test_many_tensors_take_one_kernel_for_each_width_of_state() -> None:
    parameters = weights("cpu", sizes=[(64, 64), (9,)] * 40)
    optimizer = flat_optimizer("adamw8bit", parameters, **SETTINGS)
    give(parameters, 0)
    with Ops() as ops:
        optimizer.step()
    for width in ("8bit_blockwise", "32bit"):
        assert ops.names.count(f"bitsandbytes::optimizer_update_{width}") == 1


def test_state_is_bitsandbytes_by_parameter_and_the_shelf_s_in_memory() -> None:
    (mine, own), _ = pair("adamw8bit", "cpu")
    give(mine, 0)
    own.step()
    storages = {value.untyped_storage().data_ptr() for p in mine for value in own.state[p].values() if is_tensor(value)}
    assert len(storages) == 5  # codes and their scales, two maps of codes, and the state in 32 bits
    assert [own.state[p]["state1"].shape for p in mine] == [p.shape for p in mine]
    own.param_groups[0]["name"] = "x"
    eight = [-(-p.numel() // 256) for p in mine if p.numel() >= 4096]
    small = [-(-p.numel() // 4) for p in mine if p.numel() < 4096]
    assert optimizer_bytes(own) == {"x": sum(eight) * 2 * (256 + 4) + sum(small) * 2 * 4 * 4 + 2 * 4 * 256}


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def test_weights_may_be_replaced_between_steps_and_turned() -> None:
    """As ``Module.to`` does: they are where the parameter says."""
    (mine, own), (theirs, peer) = pair("adamw8bit", "cpu")
    for step in range(4):
        for parameters, optimizer in ((mine, own), (theirs, peer)):
            for parameter in parameters:
                if parameter.dim() == 2:
                    parameter.data = parameter.data.t().contiguous().t() if step % 2 else parameter.data.clone()
            give(parameters, step)
            optimizer.step()
    assert_same(mine, own, theirs, peer)


def test_a_group_may_come_later() -> None:
    (mine, own), (theirs, peer) = pair("adamw8bit", "cpu")
    for step in range(3):
        for parameters, optimizer in ((mine, own), (theirs, peer)):
            if step == 1:
                late = weights("cpu", sizes=[(65, 64), 9])
                parameters.extend(late)
                optimizer.add_param_group({"params": late, "lr": 0.3})
            give(parameters, step)
            optimizer.step()
    assert_same(mine, own, theirs, peer)


@pytest.mark.parametrize("sizes", [SIZES, [(64, 64)]])
def test_nothing_that_was_gathered_stays(sizes: list[Any]) -> None:
    """Nor is a gradient or a weight taken for its own copy, where there is only one."""
    parameters = weights("cpu", sizes=sizes)
    optimizer = flat_optimizer("adamw8bit", parameters, **SETTINGS)
    before = [p.data_ptr() for p in parameters]
    give(parameters, 0)
    gradients = [p.grad for p in parameters]
    copies = [p.grad.clone() for p in parameters if p.grad is not None]
    optimizer.coefficient = torch.tensor(0.5)
    optimizer.step()
    assert [p.data_ptr() for p in parameters] == before
    assert all(a is p.grad and torch.equal(a, b) for p, a, b in zip(parameters, gradients, copies, strict=True))


# ---- clipped and skipped ---------------------------------------------------------------------------------------------


def company(kind: str = "adamw8bit", **fields: Any) -> tuple[dict[str, list[nn.Parameter]], AdapterOptimizers]:
    """Two adapters over the same weights."""
    owned = {name: weights("cpu") for name in ("x", "y")}
    config = AdapterConfig(optimizer=kind, lr=1e-2, weight_decay=0.1, schedule="constant", **fields)
    return owned, build_optimizer(owned, dict.fromkeys(owned, config), OptimConfig())


def advance(
    owned: dict[str, list[nn.Parameter]], optimizer: AdapterOptimizers, step: int, fault: str | None = None
) -> None:
    """A step of both; ``fault`` is x's."""
    for name, parameters in owned.items():
        give(parameters, step)
        loss = torch.tensor(math.nan if (name, fault) == ("x", "loss") else 1.0)
        optimizer.note(name, loss.isfinite())
    if fault in ("nan", "inf"):
        gradient = owned["x"][2].grad
        assert gradient is not None
        gradient[7] = float(fault)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_clipped_step_is_bitsandbytes_after_clip_grad_norm(kind: str, limit: float | None) -> None:
    owned, optimizer = company(kind, max_grad_norm=limit)
    theirs = weights("cpu")
    peer = getattr(bitsandbytes.optim, FLAT[kind])(theirs, **SETTINGS)
    for step in range(5):
        advance(owned, optimizer, step)
        give(theirs, step)
        if limit is not None:
            nn.utils.clip_grad_norm_(theirs, limit)
        peer.step()
    assert_same(owned["x"], optimizer.optimizers["x"], theirs, peer)


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("fault", ["nan", "inf", "loss"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_bad_step_is_none_to_the_bit(kind: str, fault: str, limit: float | None) -> None:
    """In the first step and later; the count follows a step late."""
    (owned, optimizer), (whole, twin) = company(kind, max_grad_norm=limit), company(kind, max_grad_norm=limit)
    bad = [0, 3, 4]
    for step in range(7):
        advance(owned, optimizer, step, fault if step in bad else None)
        if step not in bad:
            advance({"x": whole["x"]}, twin, step)
    optimizer.settle()
    assert_same(owned["x"], optimizer.optimizers["x"], whole["x"], twin.optimizers["x"])
    turn = optimizer.turns["x"]
    assert (turn.steps, turn.skipped, turn.in_a_row) == (4, 3, 0)
    clean, alone = company(kind, max_grad_norm=limit)
    for step in range(7):
        advance({"y": clean["y"]}, alone, step)
    assert_same(owned["y"], optimizer.optimizers["y"], clean["y"], alone.optimizers["y"])


def test_a_bad_step_before_a_checkpoint_is_not_in_it() -> None:
    owned, optimizer = company()
    advance(owned, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict()["adapters"]["x"])
    advance(owned, optimizer, 1, "nan")
    after = optimizer.state_dict()["adapters"]["x"]
    assert (after["steps"], after["skipped"]) == (1, 1)
    assert {key: state["step"] for key, state in after["state"].items()} == {
        key: state["step"] for key, state in before["state"].items()
    }


def test_a_verdict_does_not_reach_what_is_loaded_after_it() -> None:
    owned, optimizer = company()
    advance(owned, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    advance(owned, optimizer, 1, "nan")
    optimizer.load_state_dict(saved)
    optimizer.settle()
    assert (optimizer.turns["x"].steps, optimizer.turns["x"].skipped) == (1, 0)
    assert {state["step"] for state in optimizer.optimizers["x"].state.values()} == {1}


def test_the_host_asks_for_nothing_in_a_step() -> None:
    owned, optimizer = company()
    advance(owned, optimizer, 0)
    optimizer.settle()
    with Ops() as ops:
        advance(owned, optimizer, 1, "nan")
    assert "aten::_local_scalar_dense" not in ops.names and "aten::nonzero" not in ops.names
    assert ops.names.count("bitsandbytes::optimizer_update_8bit_blockwise") == 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize(("first_flat", "then_flat"), [(True, True), (True, False), (False, True)])
def test_checkpoints_are_bitsandbytes_own(kind: str, first_flat: bool, then_flat: bool, tmp_path: Path) -> None:
    """From a file, either way between the two, and on, bit for bit."""
    _, (theirs, peer) = pair(kind, "cpu")
    first, then = ((pair(kind, "cpu")[0 if flat else 1]) for flat in (first_flat, then_flat))
    for step in range(6):
        give(theirs, step)
        peer.step()
        parameters, optimizer = first if step < 3 else then
        if step == 3:
            torch.save(first[1].state_dict(), tmp_path / "state.pt")
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for mine, other in zip(parameters, first[0], strict=True):
                mine.data.copy_(other.data)
        give(parameters, step)
        optimizer.step()
    assert type(then[1]).__name__ == type(first[1]).__name__ == FLAT[kind]
    assert isinstance(then[1], FlatStep) is then_flat
    assert_same(then[0], then[1], theirs, peer)


def test_a_checkpoint_takes_the_room_of_its_tensors(tmp_path: Path) -> None:
    (mine, own), (theirs, peer) = pair("adamw8bit", "cpu")
    for parameters, optimizer in ((mine, own), (theirs, peer)):
        give(parameters, 0)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / type(optimizer).__module__)
    flat, plain = sorted(path.stat().st_size for path in tmp_path.iterdir())
    assert abs(flat - plain) < 2 * 4 * 256 * len(SIZES)
