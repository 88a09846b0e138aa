"""Rows of several adapters in one pass are each adapter alone: outputs, gradients, nesting, threads, recomputation."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.errors import RouteError
from finetuna_lightning.nn import routing
from finetuna_lightning.nn.gradients import Gradients
from finetuna_lightning.nn.lora import LoRALinear
from finetuna_lightning.nn.quantized import QuantizedLinear, quantize_
from finetuna_lightning.nn.routing import (
    Route,
    RoutedLinear,
    RoutedPlain,
    active_route,
    checkpoint_contexts,
    is_routed,
    routed,
)
from tests.helpers.models import excite


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        return x + (y if scale is None else y * scale)


class Pair(nn.Module):
    """A module that answers with a tuple, as an attention layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, None, dict[str, Tensor]]:
        return self.inner(x), None, {"mean": x.mean(-1)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.position = nn.Embedding(16, 12)
        self.one, self.two, self.pair = Block(), Block(), Pair()
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None, :]
        x = self.embed(ids) + self.position(places)
        x = self.two(self.one(x), x.new_full((len(ids), 1, 1), 0.5))
        y, nothing, more = self.pair(x)
        assert nothing is None
        return self.head(x + y + more["mean"][..., None])  # type: ignore[no-any-return]


IDS = torch.randint(30, (6, 4), generator=torch.Generator().manual_seed(5))


def net(scheme: str | None = "int8") -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    for module in list(model.modules()):
        if scheme and isinstance(module, nn.Linear | nn.Embedding):
            quantize_(module, scheme)
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "low": dict(rank=2, alpha=3.0, targets=["up", "embed"]),
    "high": dict(rank=5, alpha=16.0, targets=["all-linear"], bias=True, dropout=0.3),
    "top": dict(rank=3, targets=["down", "position"], plain=["head"], dropout=0.6),
    "block": dict(rank=1, targets=["inner"], plain=["two"]),
    "whole": dict(targets=[], plain=["one.up", "pair", "embed"]),
}


def bank_of(
    *names: str, scheme: str | None = "int8", settings: dict[str, dict[str, Any]] = SETTINGS
) -> tuple[Net, AdapterBank]:
    model = net(scheme)
    bank = AdapterBank(model)
    for name in names or settings:
        excite(bank.add(name, seed=sum(name.encode()), **settings[name]), seed=len(name))
    return model, bank


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


ORDERS = [
    ["low", "high", "top", "block", "whole", "low"],
    ["high", "low", "high", "high", "low", "high"],
    ["top", "top", "top", "block", "block", "block"],
    ["block", "high", "block", "top", "high", "whole"],
    ["whole", "whole", "whole", "whole", "whole", "whole"],
]


@pytest.mark.parametrize("scheme", ["int8", None])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_in_company_as_alone(order: list[str], training: bool, scheme: str | None) -> None:
    """Outputs of every row, and the gradient of every parameter of every adapter, dropout masks included."""
    model, bank = bank_of(scheme=scheme)
    target = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    with bank.route(order, training=training):
        joint = model(IDS)
    (joint * target).sum().backward()

    for name in dict.fromkeys(order):
        rows = [index for index, other in enumerate(order) if other == name]
        alone_model, alone_bank = bank_of(name, scheme=scheme)
        with alone_bank.route([name] * len(rows), training=training):
            alone = alone_model(IDS[rows])
        (alone * target[rows]).sum().backward()
        assert torch.allclose(joint[rows], alone, atol=1e-5), name
        mine, theirs = gradients(bank[name]), gradients(alone_bank[name])
        assert mine.keys() == theirs.keys() == dict(bank[name].named_parameters()).keys()
        assert all(torch.allclose(mine[key], theirs[key], atol=1e-4, rtol=1e-4) for key in mine), name
    absent = bank.keys() - set(order)
    assert not any(gradients(bank[name]) for name in absent)
    assert not gradients(model)


def test_the_base_runs_once_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = bank_of("low", "high")
    calls: list[int] = []
    inner = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: calls.append(len(x)) or inner(self, x))
    with bank.route(["low", "high", "low", "high", "low", "low"]):
        model(IDS)
    assert calls == [6] * 6


def test_no_adapter_is_the_backbone_bit_for_bit() -> None:
    model = net()
    expected = model(IDS)
    model, bank = bank_of()
    with bank.bare():
        assert torch.equal(model(IDS), expected)
    with bank.route(["low"] * 6):
        assert not torch.allclose(model(IDS), expected, atol=1e-3)


def test_each_training_pass_draws_new_masks_and_a_seed_repeats_them() -> None:
    model, bank = bank_of("high")
    outputs = []
    for _ in range(2):
        with bank.route(["high"] * 6, training=True):
            outputs.append(model(IDS))
    assert not torch.allclose(outputs[0], outputs[1])
    model, bank = bank_of("high")
    with bank.route(["high"] * 6, training=True):
        assert torch.equal(model(IDS), outputs[0])
    with bank.route(["high"] * 6):
        assert not torch.allclose(model(IDS), outputs[0])
    route = Route(("high",), (6,), {"high": 1})
    with bank.follow(route):
        first = model(IDS)
    with bank.follow(route):
        assert torch.equal(model(IDS), first)


def test_every_layer_draws_a_mask_of_its_own() -> None:
    first, second = nn.Linear(40, 40), nn.Linear(40, 40)
    second.load_state_dict(first.state_dict())
    model = nn.Sequential(first, second)
    bank = AdapterBank(model)
    bank.add("a", rank=40, alpha=40, targets=["0", "1"], dropout=0.5)
    for delta in bank["a"].deltas.values():  # type: ignore[union-attr, operator]
        with torch.no_grad():
            delta.lora_A.copy_(torch.eye(40))
            delta.lora_B.copy_(torch.eye(40))
    x = torch.ones(1, 40)
    with bank.route(["a"], training=True):
        masks = [(layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).round() for layer in model]
    assert set(masks[0].flatten().tolist()) == {0.0, 2.0} and not torch.equal(*masks)


# ---- plain modules --------------------------------------------------------------------------------------------------


def test_a_plain_module_with_adapted_ones_inside() -> None:
    """``block`` trains all of ``two``; for ``high`` the layers inside it carry deltas: sub-routes."""
    model, bank = bank_of("high", "block")
    assert is_routed(model.two) and is_routed(model.two.up)
    with bank.route(["high", "block", "block", "high", "block", "high"]):
        joint = model(IDS)
    for name, rows in (("high", [0, 3, 5]), ("block", [1, 2, 4])):
        with bank.route([name] * 3):
            assert torch.allclose(joint[rows], model(IDS[rows]), atol=1e-5)


def test_a_module_plain_for_one_and_adapted_by_another() -> None:
    settings = {"lora": dict(rank=2, targets=["head"]), "full": dict(targets=[], plain=["head"])}
    model, bank = bank_of("lora", "full", settings=settings)
    with bank.route(["lora", "full", "lora", "full", "full", "lora"]):
        joint = model(IDS)
    for name, rows in (("lora", [0, 2, 5]), ("full", [1, 3, 4])):
        with bank.route([name] * 3):
            assert torch.allclose(joint[rows], model(IDS[rows]), atol=1e-5)
    with bank.bare():
        assert not torch.allclose(joint, model(IDS), atol=1e-3)


def test_a_plain_module_met_with_one_row_for_the_whole_batch() -> None:
    """As GPT-2's position ids, [1, tokens]."""
    settings = {
        "place": dict(targets=[], plain=["position"]),
        "lora": dict(rank=2, targets=["position"]),
        "other": dict(rank=2, targets=["up"]),
    }
    model, bank = bank_of("place", "lora", "other", settings=settings)
    order = ["place", "other", "lora", "place", "lora", "other"]
    with bank.route(order):
        joint = model(IDS)
    for index, name in enumerate(order):
        with bank.route([name]):
            assert torch.allclose(joint[index : index + 1], model(IDS[index : index + 1]), atol=1e-5)


def test_arguments_by_keyword_follow_their_rows() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x=x, scale=torch.arange(1.0, len(x) + 1)[:, None])  # type: ignore[no-any-return]

    model = Caller()
    bank = AdapterBank(model)
    excite(bank.add("a", targets=[], plain=["block"]))
    bank.add("b", rank=2, targets=["up"])
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    with bank.route(["b", "a", "a", "b"]):
        joint = model(x)
    with bank.bare():
        bare = model(x)
    with bank.route(["a"] * 4):
        alone = model(x)
    assert torch.allclose(joint[[1, 2]], alone[[1, 2]], atol=1e-6) and torch.allclose(
        joint[[0, 3]], bare[[0, 3]], atol=1e-6
    )


@pytest.mark.parametrize("scheme", ["int8", None])
@pytest.mark.parametrize("plain", ["embed", "one", "pair", "head"])
def test_a_private_copy_is_called_in_the_activations_type(plain: str, scheme: str | None) -> None:
    """Its weights are float32; what it gives must not lift its neighbours' rows, or its own, out of 16 bits."""
    model = net(scheme).bfloat16()
    bank = AdapterBank(model)
    excite(bank.add("a", targets=[], plain=[plain]))
    bank.add("b", rank=2, targets=["up"])
    types: list[torch.dtype] = []
    for module in (model.embed, model.one, model.head):
        module.register_forward_hook(lambda module, inputs, out: types.append(out.dtype))
    for order in (["a"] * 6, ["a", "b", "a", "b", "b", "b"]):
        types.clear()
        with bank.route(order):
            y = model(IDS)
        assert types == [torch.bfloat16] * 3
    y.sum().backward()
    grads = gradients(bank["a"])
    assert grads and all(grad.dtype == torch.float32 for grad in grads.values())


def test_activations_decide_the_type_of_a_private_copy_and_not_the_storage() -> None:
    layer = nn.Sequential(quantize_(nn.Linear(8, 8), "int8"))
    bank = AdapterBank(layer)
    bank.add("a", targets=[], plain=["0"])
    x = torch.randn(2, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with bank.bare():
        assert layer(x).dtype == torch.bfloat16
    with bank.route(["a", "a"]):
        assert layer(x).dtype == torch.bfloat16


# ---- routes ---------------------------------------------------------------------------------------------------------


def test_routes_of_rows() -> None:
    route = Route.of_rows(["a", "a", "b", "a"])
    assert route.names == ("a", "b", "a") and route.rows == (2, 1, 1) and route.total == 4
    assert list(route.segments(4)) == [("a", 0, 2), ("b", 2, 3), ("a", 3, 4)]
    assert list(route.segments(12)) == [("a", 0, 6), ("b", 6, 9), ("a", 9, 12)]
    assert list(Route(("a", "b", "c"), (1, 0, 2)).segments(3)) == [("a", 0, 1), ("c", 1, 3)]


@pytest.mark.parametrize(
    ("names", "rows"), [((), ()), (("a",), (0,)), (("a",), (-1,)), (("a", "b"), (1,)), (("a",), (1, 2))]
)
def test_a_route_of_nothing_is_refused(names: tuple[str, ...], rows: tuple[int, ...]) -> None:
    with pytest.raises(RouteError, match="one positive row count per adapter"):
        Route(names, rows)


def test_without_a_route_nothing_is_guessed() -> None:
    model, bank = bank_of("low")
    with pytest.raises(RouteError, match=r"bank\.route"):
        model(IDS)
    with bank.route(["low"] * 6):
        expected = model(IDS)
    with pytest.raises(RouteError):
        model(IDS)
    bank.sole = "low"  # as in a stand-alone fine-tuned model
    assert torch.equal(model(IDS), expected)
    for route in (bank.bare(), bank.route(["low"] * 6)):
        with pytest.raises(RouteError, match="takes no route"), route:
            pass


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_a_route_for_another_number_of_rows_is_an_error(rows: int) -> None:
    for name in ("low", "whole"):
        model, bank = bank_of(name)
        with bank.route([name] * rows), pytest.raises(RouteError, match=f"{rows} rows, but a layer met 6"):
            model(IDS)


def test_rows_that_were_multiplied_follow_their_adapter() -> None:
    """[rows * tokens, features], and beams."""
    model, bank = bank_of("low", "high")
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    with bank.route(["low", "high"]):
        joint = model.one(x)
    with bank.route(["low"]):
        low = model.one(x[:3])
    with bank.route(["high"]):
        high = model.one(x[3:])
    assert torch.allclose(joint, torch.cat([low, high]), atol=1e-6)


def test_the_innermost_route_counts_and_each_ends_with_its_block() -> None:
    model, bank = bank_of("low", "high")

    def outputs() -> Tensor:
        return model(IDS)  # type: ignore[no-any-return]

    with bank.route(["low"] * 6):
        low = outputs()
        with bank.route(["high"] * 6):
            high = outputs()
            with bank.bare():
                bare = outputs()
            assert torch.equal(outputs(), high)
        assert torch.equal(outputs(), low)
        with pytest.raises(KeyError), bank.route(["high"] * 6):
            raise KeyError
        assert torch.equal(outputs(), low)
    assert not torch.equal(low, high) and not torch.equal(low, bare)


def test_a_route_is_for_its_own_bank() -> None:
    model, bank = bank_of("low")
    other_model, other_bank = bank_of("low")
    with bank.route(["low"] * 6), pytest.raises(RouteError):
        other_model(IDS)
    with bank.route(["low"] * 6), other_bank.bare():
        changed, bare = model(IDS), other_model(IDS)
    assert not torch.equal(changed, bare)


def test_two_threads_with_two_routes() -> None:
    model, bank = bank_of("low", "high")
    expected = {}
    for name in ("low", "high"):
        with bank.route([name] * 6):
            expected[name] = model(IDS)
    start, faults = threading.Barrier(2), []

    def work(name: str) -> None:
        with bank.route([name] * 6):
            start.wait()
            for _ in range(20):
                if not torch.equal(model(IDS), expected[name]):
                    faults.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_a_new_thread_has_no_route() -> None:
    model, bank = bank_of("low")
    seen: list[BaseException] = []

    def work() -> None:
        try:
            model(IDS)
        except RouteError as error:
            seen.append(error)

    with bank.route(["low"] * 6):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(seen) == 1


# ---- recomputation --------------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module, contexts: Any = checkpoint_contexts) -> None:
        super().__init__()
        self.inner, self.contexts = inner, contexts

    def forward(self, *args: Tensor) -> Tensor:
        return checkpoint(self.inner, *args, use_reentrant=False, context_fn=self.contexts)  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_thread", [False, True])
def test_recomputation_follows_the_route_of_the_forward(in_thread: bool) -> None:
    """The backward runs after the route's block has ended, or under another one, or in a thread without any."""
    order = ["low", "high", "top", "block", "whole", "high"]
    results = []
    for recompute in (False, True):
        model, bank = bank_of()
        model.train()
        if recompute:
            model.one, model.two = Recomputed(model.one), Recomputed(model.two)  # type: ignore[assignment]
        with bank.route(order, training=True):
            loss = model(IDS).square().sum()
        with bank.route(["low"]):
            if in_thread:
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            else:
                loss.backward()
        results.append(gradients(bank))
    assert results[0].keys() == results[1].keys() == dict(bank.named_parameters()).keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_recomputation_leaves_no_route_behind() -> None:
    model, bank = bank_of("low")
    model.one = Recomputed(model.one)  # type: ignore[assignment]
    with bank.route(["low"] * 6):
        loss = model(IDS).sum()
    loss.backward()
    with pytest.raises(RouteError):
        model(IDS)


def test_recomputation_under_the_bare_backbone() -> None:
    model, bank = bank_of("low")
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with bank.bare():
        loss = Recomputed(model.one)(x).sum()
    loss.backward()
    assert x.grad is not None and not gradients(bank)


def test_recomputation_without_the_contexts_says_what_to_do() -> None:
    from torch.utils.checkpoint import noop_context_fn

    model, bank = bank_of("low")
    x = torch.randn(6, 12).requires_grad_()
    with bank.route(["low"] * 6):
        loss = Recomputed(model.one, noop_context_fn)(x).sum()
    with pytest.raises(RouteError, match="checkpoint_contexts"):
        loss.backward()


# ---- packed rows ----------------------------------------------------------------------------------------------------

PACKED = ["low", "high", "block", "top", "whole", "high"]  # segments of one sequence and more, of one token and more
COUNTS, TOKENS = [1, 2, 1, 3, 1, 1], [4, 3, 1, 6, 1, 2, 2, 1, 5]


def packed_route(bank: AdapterBank, training: bool) -> Any:
    return bank.follow(Route(tuple(PACKED), tuple(COUNTS), lengths=tuple(TOKENS)), training=training)


def tokens_of(name: str) -> tuple[list[int], tuple[int, ...]]:
    """The places in the row, and the lengths, of one adapter's sequences."""
    owners = [other for other, count in zip(PACKED, COUNTS, strict=True) for _ in range(count)]
    starts = [sum(TOKENS[:index]) for index in range(len(TOKENS))]
    own = [index for index, other in enumerate(owners) if other == name]
    return [at for i in own for at in range(starts[i], starts[i] + TOKENS[i])], tuple(TOKENS[i] for i in own)


class Layers(nn.Module):
    """``Net`` without its own positions: they are given, as a packed row's are."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, places: Tensor, flat: bool) -> Tensor:
        net = self.inner
        x = net.embed(ids) + net.position(places)
        x = net.two(net.one(x), x.new_full((1, ids.shape[1], 1), 0.5))
        x = x[0] if flat else x  # as a mixture of experts has it
        y, nothing, more = net.pair(x)
        assert nothing is None
        return net.head(x + y + more["mean"][..., None]).reshape(1, ids.shape[1], -1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["int8", None])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_packed_in_company_as_alone(flat: bool, training: bool, scheme: str | None) -> None:
    """Tokens [1, T, features] and [T, features]; ids and positions [1, T]; deltas and private copies of all kinds."""
    total = sum(TOKENS)
    ids = torch.randint(30, (1, total), generator=torch.Generator().manual_seed(5))
    places = torch.cat([torch.arange(length) for length in TOKENS])[None]
    target = torch.randn(1, total, 5, generator=torch.Generator().manual_seed(1))
    model, bank = bank_of(scheme=scheme)
    with packed_route(bank, training):
        joint = Layers(model)(ids, places, flat)
    (joint * target).sum().backward()
    for name in dict.fromkeys(PACKED):
        at, lengths = tokens_of(name)
        alone_model, alone_bank = bank_of(name, scheme=scheme)
        with alone_bank.follow(Route((name,), (len(lengths),), lengths=lengths), training=training):
            alone = Layers(alone_model)(ids[:, at], places[:, at], flat)
        (alone * target[:, at]).sum().backward()
        assert torch.allclose(joint[:, at], alone, atol=1e-5), name
        mine, theirs = gradients(bank[name]), gradients(alone_bank[name])
        assert mine.keys() == theirs.keys() == dict(bank[name].named_parameters()).keys()
        assert all(torch.allclose(mine[key], theirs[key], atol=1e-4, rtol=1e-4) for key in mine), name


def test_packed_tokens_have_the_masks_that_padded_rows_have() -> None:
    model, bank = bank_of("high")
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
    lengths = (4, 7, 1)
    with bank.follow(Route(("high",), (3,), {"high": 5})):
        padded = model.one.up(x)
    row = torch.cat([x[index, :length] for index, length in enumerate(lengths)])
    for packed in (row[None], row):
        with bank.follow(Route(("high",), (3,), {"high": 5}, lengths)):
            found = model.one.up(packed).reshape(-1, 20).split(lengths)
        for index, length in enumerate(lengths):
            assert torch.allclose(found[index], padded[index, :length], atol=1e-5)


def test_an_adapters_masks_count_its_own_sequences_alone() -> None:
    """In two segments, beside others, in another order of company."""
    model, bank = bank_of("high", "low")
    x = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0))
    seeds = {"high": 5, "low": 6}
    with bank.follow(Route(("high", "low", "high"), (1, 1, 1), seeds, (3, 4, 5))):
        joint = model.one.up(x)
    with bank.follow(Route(("high",), (2,), seeds, (3, 5))):
        alone = model.one.up(torch.cat([x[:, :3], x[:, 7:]], 1))
    assert torch.allclose(torch.cat([joint[:, :3], joint[:, 7:]], 1), alone, atol=1e-5)


def test_packed_routes() -> None:
    route = Route(("a", "b", "a"), (2, 0, 1), lengths=(3, 1, 4))
    assert route.sizes == (4, 0, 4) and route.total == 8
    assert list(route.segments(8)) == [("a", 0, 4), ("a", 4, 8)]
    assert list(route.segments(16)) == [("a", 0, 8), ("a", 8, 16)]
    assert [route.axis(shape) for shape in ((1, 8), (1, 8, 2), (8,), (8, 2))] == [1, 1, 0, 0]
    assert Route(("a",), (1,)).axis((1, 8)) == 0
    assert route.only(["a"]) == Route(("a", "a"), (2, 1), lengths=(3, 1, 4))
    assert Route(("a", "b"), (1, 2), {"b": 1}, (1, 2, 3)).only(["b"]) == Route(("b",), (2,), {"b": 1}, (2, 3))
    with pytest.raises(RouteError, match="8 packed tokens, but a layer met 6"):
        list(route.segments(6))
    for rows, lengths in (((2,), (3,)), ((1,), (3, 4)), ((2,), (3, 0))):
        with pytest.raises(RouteError, match="needs as many lengths of at least 1"):
            Route(("a",), rows, lengths=lengths)


def test_parts_of_one_token_each_go_back_to_their_places() -> None:
    model, bank = bank_of("whole", "low")
    x = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(0))
    with bank.follow(Route(("low", "whole"), (1, 1), lengths=(1, 1))):
        joint, _, more = model.pair(x)
    assert joint.shape == (1, 2, 12) and more["mean"].shape == (1, 2)
    for index, name in enumerate(("low", "whole")):
        with bank.follow(Route((name,), (1,), lengths=(1,))):
            assert torch.allclose(joint[:, [index]], model.pair(x[:, [index]])[0], atol=1e-6)


def test_a_packed_module_may_answer_with_a_flat_table_too() -> None:
    """As a mixture of experts does, with its router's scores [tokens, experts]."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner(x.reshape(-1, 12))

    model = nn.Sequential(Mixture())
    bank = AdapterBank(model)
    excite(bank.add("a", targets=[], plain=["0"]))
    bank.add("b", rank=2, targets=["inner"])
    x = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(0))
    with bank.follow(Route(("b", "a", "b"), (1, 1, 1), lengths=(4, 1, 4))):
        row, flat = model(x)
    assert row.shape == (1, 9, 12) and flat.shape == (9, 12) and torch.allclose(row[0], flat, atol=1e-6)


# ---- classes --------------------------------------------------------------------------------------------------------


def test_removal_restores_the_classes() -> None:
    model = net()
    before = {path: (type(module), set(module.__dict__)) for path, module in model.named_modules()}
    names = [name for name, _ in model.named_buffers()]
    bank = AdapterBank(model)
    for name in ("block", "high", "top"):
        bank.add(name, **SETTINGS[name])
    assert isinstance(model.one.up, RoutedLinear) and is_routed(model.two) and not is_routed(model.one)
    assert [name for name, _ in model.named_buffers()] == names  # nothing of the bank is registered in the backbone
    bank.remove("block")
    assert not is_routed(model.two) and is_routed(model.two.up)
    bank.remove("high")
    bank.remove("top")
    assert {path: (type(m), set(m.__dict__)) for path, m in model.named_modules()} == before
    model(IDS)


def test_layers_that_no_adapter_changes_stay_as_they_are() -> None:
    model, _ = bank_of("low")
    assert is_routed(model.one.up) and is_routed(model.embed)
    assert not any(map(is_routed, (model, model.one, model.one.down, model.head, model.pair.inner, model.position)))


def test_a_layer_that_no_adapter_of_the_route_changes_is_the_bare_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = bank_of("low", "top", "high")
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    with bank.bare():
        expected = model.pair.inner(x)
    monkeypatch.setattr(routing, "_put_back", lambda *args: pytest.fail("rows were cut and put together for nothing"))
    with bank.route(["low", "top", "low", "top", "low", "top"]):
        assert is_routed(model.pair.inner) and torch.equal(model.pair.inner(x), expected)


def test_one_class_serves_every_layer_of_a_kind() -> None:
    model, _ = bank_of("low", "block")
    assert type(model.one.up) is type(model.two.up) and isinstance(model.one.up, RoutedLinear)
    assert isinstance(model.two, RoutedPlain) and not isinstance(model.one.up, RoutedPlain)


def test_active_route() -> None:
    _, bank = bank_of("low")
    with pytest.raises(RouteError):
        active_route(bank)
    route = Route(("low",), (3,))
    with routed(bank, route):
        assert active_route(bank) is route
        with routed(bank, None):
            assert active_route(bank) is None


def test_what_joint_layers_look_up_is_kept_while_parameters_stay() -> None:
    names = list(SETTINGS)[:2]
    _, bank = bank_of(*names)
    route = Route.of_rows(names)

    def kept() -> dict[Any, Any]:
        with routed(bank, route):
            found = routing._kept(bank, route)
            assert routing._kept(bank, route) is found
            return found

    first = kept()
    assert kept() is first
    delta = next(d for d in bank.deltas(names[1]) if isinstance(d, LoRALinear))
    with torch.no_grad():
        next(delta.parameters()).add_(1)
    assert kept() is first
    with routed(bank, other := Route.of_rows(names[1:])):
        assert routing._kept(bank, other) is not first
    assert kept() is first  # another company in between
    for change in (
        lambda: setattr(delta, "dropout", 0.5),
        lambda: setattr(delta, "alpha", 3.0),
        lambda: setattr(delta.lora_A, "data", delta.lora_A.data.clone()),
        lambda: setattr(delta, "lora_B", nn.Parameter(delta.lora_B.data)),
        lambda: bank.remove(names[0]) and bank.add(names[0], seed=5, **SETTINGS[names[0]]),
    ):
        before = kept()
        change()
        assert kept() is not before


def test_an_adapter_that_leaves_is_let_go() -> None:
    names = list(SETTINGS)[:2]
    _, bank = bank_of(*names)
    with routed(bank, route := Route.of_rows(names)):
        kept = routing._kept(bank, route)
        kept["layers"] = routing.joint.Kept([*bank.deltas(names[0]), *bank.deltas(names[1])])
    del kept, route
    left, stays = (weakref.ref(next(iter(bank.deltas(name)))) for name in names)
    bank.remove(names[0])
    gc.collect()
    assert left() is None and stays() is not None


def test_gradients_may_go_past_autograd_only_where_nobody_watches() -> None:
    names = list(SETTINGS)[:2]
    _, bank = bank_of(*names)

    def direct(gradients: Gradients | None) -> bool:
        route = replace(Route.of_rows(names), gradients=gradients)
        with bank.follow(route, training=True):
            found = active_route(bank)
            assert found is not None and found.gradients is gradients
            routing._kept(bank, found)
            assert found._kept["gradients"] in (None, gradients)
            return found._kept["gradients"] is not None

    own = Gradients()

    assert direct(own) and not direct(None)
    parameter = next(iter(bank.deltas(names[1]))).lora_A
    for hook in (parameter.register_hook, parameter.register_post_accumulate_grad_hook):
        handle = hook(lambda _: None)
        assert not direct(own)
        handle.remove()
    assert direct(own)
    parameter.requires_grad_(False)
    assert not direct(own)
