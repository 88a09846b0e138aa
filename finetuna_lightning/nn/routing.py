"""Which rows, or packed tokens, of a batch belong to which adapter, and the layers that act on it.

A layer that some adapter changes is *routed* in place: its class gains a forward that asks the bank, for each segment
of the batch, for that adapter's delta or private copy. The base computation runs once over all rows.

Along the *axis* of a batch its segments follow one another: the leading dimension of rows; of a packed batch, which is
one row, the dimension of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from finetuna_lightning.errors import RouteError
from finetuna_lightning.nn import joint
from finetuna_lightning.nn.dropout import places
from finetuna_lightning.nn.gradients import Gradients
from finetuna_lightning.nn.lora import Delta, LoRALinear
from finetuna_lightning.nn.packing import PackedMask, packed_pass
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, mixed
from finetuna_lightning.ops.library import has_joint_kernels
from finetuna_lightning.ops.tiling import Tiling, tiling
from finetuna_lightning.seeds import stream_seed


@dataclass(frozen=True)
class Route:
    """The adapters of a batch, in order: the first ``rows[0]`` sequences belong to ``names[0]``, and so on.

    Of padded rows, a sequence is one leading index of the batch. Layers deeper in see [rows, tokens, features], [rows *
    tokens, features] or, after beam search expanded it, [rows * beams, ...]: each row then stands for as many
    consecutive vectors. Of a packed batch, the sequences stand one after another in one row, and layers see [1, tokens,
    features] or [tokens, features]. A name may come more than once.

    Args:
        names, rows: the segments.
        seeds: by adapter, the seed of this forward's dropout masks; an adapter without one has dropout off.
        lengths: of a packed batch, the tokens of each sequence.
        numbers: by adapter, which of its sequences of this step these are; absent, all of them. (Of several processes,
            each has some.)
        gradients: where the backward pass may put those of deltas, past autograd. They go by autograd still where a
            parameter is hooked or frozen, and on the CPU.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    seeds: dict[str, int] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    numbers: dict[str, list[int]] = field(default_factory=dict)
    gradients: Gradients | None = None
    _places: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.rows) or any(count < 0 for count in self.rows) or sum(self.rows) == 0:
            raise RouteError(f"a route needs one positive row count per adapter, not {self.names} with {self.rows}")
        if self.lengths is not None and (len(self.lengths) != sum(self.rows) or min(self.lengths) < 1):
            raise RouteError(
                f"a packed route of {sum(self.rows)} sequences needs as many lengths of at least 1, not {self.lengths}"
            )

    @classmethod
    def of_rows(cls, names: Sequence[str]) -> Route:
        """The route of a batch whose i-th row belongs to ``names[i]``."""
        runs: list[tuple[str, int]] = []
        for name in names:
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1] + 1)
            else:
                runs.append((name, 1))
        return cls(tuple(name for name, _ in runs), tuple(count for _, count in runs))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of each segment, the rows; packed, the tokens."""
        if self.lengths is None:
            return self.rows
        return tuple(sum(lengths) for lengths in self._lengths_by_segment())

    @cached_property
    def total(self) -> int:
        """Rows in all; packed, tokens in all."""
        return sum(self.sizes)

    def axis(self, shape: Sequence[int]) -> int:
        """The dimension, of a tensor whose dimensions but the features' are ``shape``, along which segments follow one
        another."""
        return 1 if self.lengths is not None and len(shape) > 1 and shape[0] == 1 else 0

    def segments(self, count: int) -> Iterator[tuple[str, int, int]]:
        """(name, start, stop) along an axis of ``count`` entries.

        Raises:
            RouteError: when ``count`` is no multiple of the rows, or of the packed tokens.
        """
        each, rest = divmod(count, self.total)
        if rest:
            what = "rows" if self.lengths is None else "packed tokens"
            raise RouteError(
                f"the route has {self.total} {what}, but a layer met {count}, which is no multiple: the batch must be "
                f"the "
                "leading dimension of what the backbone computes"
            )
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            if size:
                yield name, start, start + size * each
                start += size * each

    def only(self, names: Sequence[str]) -> Route:
        """The route of the segments of ``names`` alone."""
        own = [index for index, name in enumerate(self.names) if name in names]
        lengths = None
        if self.lengths is not None:
            by_segment = self._lengths_by_segment()
            lengths = tuple(length for index in own for length in by_segment[index])
        names, rows = tuple(self.names[index] for index in own), tuple(self.rows[index] for index in own)
        return Route(names, rows, self.seeds, lengths, self.numbers)

    def places(self, name: str, vectors: int, device: torch.device) -> Tensor:
        """The places (see ``nn.dropout``) of an adapter's ``vectors`` vectors among its own sequences."""
        key = (name, vectors, device)
        if key not in self._places:
            own = self.only([name])
            lengths = [vectors // own.total] * own.total if own.lengths is None else own.lengths
            each = 1 if own.lengths is None else vectors // own.total
            numbers = torch.tensor(self.numbers[name]) if name in self.numbers else None
            at = places(torch.tensor(lengths), each, numbers, sum(lengths) * each)
            self._places[key] = at.to(device, non_blocking=True)
        return self._places[key]

    def _lengths_by_segment(self) -> list[tuple[int, ...]]:
        assert self.lengths is not None
        stops = [sum(self.rows[: index + 1]) for index in range(len(self.rows))]
        return [self.lengths[stop - rows : stop] for rows, stop in zip(self.rows, stops, strict=True)]


class DeltaSource(Protocol):
    """What a routed layer needs of the bank.

    ``sole`` names the one adapter of a stand-alone fine-tuned model: all rows are its own, whatever route is in force.
    ``grad_wanted``: whether that model was last called with gradients on.
    """

    sole: str | None
    grad_wanted: bool

    def delta(self, name: str, path: str) -> Delta | None: ...

    def deltas(self, name: str) -> Iterable[nn.Module]: ...

    def plain_copy(self, name: str, path: str) -> nn.Module | None: ...


_ACTIVE: ContextVar[tuple[tuple[int, Route | None], ...]] = ContextVar("finetuna_routes", default=())


@contextmanager
def routed(bank: DeltaSource, route: Route | None) -> Iterator[None]:
    """Within, the layers of ``bank``'s backbone follow ``route``; None is the bare backbone. Kept per thread and task.

    Raises:
        RouteError: for the bank of a stand-alone fine-tuned model, which is always its own adapter's.
    """
    if bank.sole is not None:
        raise RouteError(
            "a stand-alone fine-tuned model takes no route: call it as it is, or its base for the bare model"
        )
    if route is not None:
        route._kept.clear()
    token = _ACTIVE.set((*_ACTIVE.get(), (id(bank), route)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_route(bank: DeltaSource) -> Route | None:
    """The route in force for ``bank``: the innermost ``routed``.

    Raises:
        RouteError: when there is none.
    """
    for key, route in reversed(_ACTIVE.get()):
        if key == id(bank):
            return route
    raise RouteError(
        "the backbone was called without a route: use `with bank.route([...])`, or `with bank.bare()` for the backbone "
        "alone; under a hand-made torch.utils.checkpoint pass context_fn=finetuna_lightning.checkpoint_contexts"
    )


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation in the backward pass, whichever
    thread it runs in, follows the routes that were in force in the forward pass."""
    routes = _ACTIVE.get()

    @contextmanager
    def again() -> Iterator[None]:
        token = _ACTIVE.set(routes)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    return nullcontext(), again()


def _plus_delta(delta: Delta, x: Tensor, y: Tensor, route: Route, name: str, path: str) -> Tensor:
    if isinstance(delta, LoRALinear):
        seed = route.seeds.get(name)
        if seed is None or delta.dropout == 0:
            added: Tensor = delta(x)
        else:
            at = route.places(name, x.numel() // x.shape[-1], x.device)
            added = delta(x, stream_seed(seed, path), at)
    else:
        added = delta(x, y.dtype)
    return y + added.to(y.dtype)


def _plus_own(delta: Delta, x: Tensor, y: Tensor) -> Tensor:
    """y plus a stand-alone model's delta of x; its dropout is ``nn.Dropout``'s, drawn from torch's own stream."""
    if isinstance(delta, LoRALinear):
        return y + delta(F.dropout(x, delta.dropout, delta.training)).to(y.dtype)  # type: ignore[no-any-return]
    return y + delta(x, y.dtype).to(y.dtype)  # type: ignore[no-any-return]


def _check_gradients(bank: DeltaSource, own: nn.Module) -> None:
    """Raise within a reentrant checkpoint none of whose inputs requires grad: its backward pass would never run."""
    if torch.is_grad_enabled() or not (own.training and bank.grad_wanted):
        return
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    inputs = frame.f_locals.get("args", ()) if frame is not None else ()
    if frame is not None and not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        raise RouteError(
            "reentrant gradient checkpointing would train nothing here: no input of the checkpointed part requires "
            "grad. Set use_reentrant=False, or call model.enable_input_require_grads(), or adapt the embedding too"
        )


class _Routed(nn.Module):
    """Shared by the routed classes: a reference to the bank that registers nothing, and the layer's path."""

    _finetuna_bank: DeltaSource
    _finetuna_path: str

    def _add_deltas(self, x: Tensor, y: Tensor, shape: Sequence[int]) -> Tensor:
        """y plus, segment by segment, each adapter's delta of x, whose dimensions but the features' are ``shape``."""
        bank, path = self._finetuna_bank, self._finetuna_path
        if bank.sole is not None:
            own = bank.delta(bank.sole, path)
            if own is None:
                return y
            _check_gradients(bank, own)
            return _plus_own(own, x, y)
        route = active_route(bank)
        if route is None:
            return y
        if _for_all_rows(x, route):
            shape = (route.total, *shape[1:])
            x, y = x.expand(route.total, *x.shape[1:]), y.expand(route.total, *y.shape[1:])
        axis = route.axis(shape)
        segments = list(route.segments(shape[axis]))
        deltas = {name: bank.delta(name, path) for name, _, _ in segments}
        if all(delta is None for delta in deltas.values()):
            return y
        sizes = [stop - start for _, start, stop in segments]
        # split, whose backward is one concatenation; a slice's is a full pass for each segment
        xs, out = x.split(sizes, axis), list(y.split(sizes, axis))
        for name, delta in deltas.items():
            if delta is None:
                continue
            # an adapter's sequences stand together, wherever they lie, so that its dropout masks are those of it alone
            mine = [index for index, (other, _, _) in enumerate(segments) if other == name]
            part = _plus_delta(delta, _joined(xs, mine, axis), _joined(out, mine, axis), route, name, path)
            for index, piece in zip(mine, part.split([sizes[index] for index in mine], axis), strict=True):
                out[index] = piece
        return _joined(out, range(len(out)), axis)


def joint_parts(
    layers: Sequence[nn.Module], x: Tensor
) -> tuple[Tiling, Sequence[Any], list[QuantizedWeight], list[Tensor | None]] | None:
    """What ``nn.joint`` needs to compute ``layers``, which share the rows of x [..., features]: whose rows they are,
    the deltas, weights and biases. None where they have to be called one by one: a layer that is not quantised, trained
    in full or hooked, a delta with dropout in force or a bias, a device without the kernels, or torch.compile, which
    has kernels of its own and would take the tables made here for constants."""
    if torch.compiler.is_compiling() or (x.device.type != "cpu" and not has_joint_kernels(x.device)):
        return None
    known = [layer for layer in layers if isinstance(layer, QuantizedLinear) and not is_observed(layer)]
    weights = [layer.quantized for layer in known]
    biases: list[Tensor | None] = [layer.bias for layer in known]
    if len(known) != len(layers) or not joint.takes(x, weights, biases):
        return None
    vectors = x.numel() // x.shape[-1]
    bank = next((layer._finetuna_bank for layer in layers if isinstance(layer, _Routed)), None)
    if any(isinstance(layer, RoutedPlain) for layer in layers):
        return None
    route = None if bank is None or bank.sole is not None else active_route(bank)
    if bank is None or (bank.sole is None and route is None):
        return tiling([("", 0, vectors)], x.device), [[None] for _ in layers], weights, biases
    if route is None:
        spans = [(str(bank.sole), 0, vectors)]
    else:
        axis = route.axis(x.shape[:-1])
        each = vectors // x.shape[axis]
        spans = [(name, start * each, stop * each) for name, start, stop in route.segments(x.shape[axis])]
    cut = tiling(spans, x.device)
    kept = None if route is None or x.device.type == "cpu" else _kept(bank, route)
    key = (ref(layers[0]), len(layers), cut.names)  # the layer itself has the bank, which then nobody could let go of
    if kept is not None and key in kept:
        return cut, _for_pass(kept[key], route), weights, biases
    deltas = joint.Kept([])
    lasting = kept is not None
    for layer in layers:
        path = layer._finetuna_path if isinstance(layer, _Routed) else None
        own = [None if path is None else bank.delta(name, path) for name in cut.names]
        for name, delta in zip(cut.names, own, strict=True):
            if delta is not None and not (isinstance(delta, LoRALinear) and joint.takes_delta(delta)):
                return None
            dropping = delta is not None and delta.dropout > 0
            lasting = lasting and not dropping
            if dropping and (delta.training if route is None else route.seeds.get(name) is not None):  # type: ignore[union-attr]
                return None
            if delta is not None and route is None:
                _check_gradients(bank, delta)
        deltas.append(joint.Kept(own))
    if kept is not None and lasting:
        kept[key] = deltas
    return cut, _for_pass(deltas, route), weights, biases


def _for_pass(deltas: joint.Kept, route: Route | None) -> joint.Kept:
    """``deltas``, told where the gradients of the pass that ``route`` is for go."""
    gradients = None if route is None else route._kept.get("gradients")
    for part in (deltas, *deltas):
        part.gradients = gradients
    return deltas


_COMPANIES = 16
_KEPT: WeakKeyDictionary[Any, dict[tuple[str, ...], tuple[list[Any], dict[Any, joint.Kept]]]] = WeakKeyDictionary()


def _kept(bank: DeltaSource, route: Route) -> dict[Any, joint.Kept]:
    """The deltas of groups of layers that earlier passes of the same adapters found, while all their parameters stay
    where they are: that is looked at once a pass, since asking each delta at each layer takes longer than a GPU."""
    if not route._kept:
        deltas = [*chain.from_iterable(map(bank.deltas, route.names))]  # in C, as far as there is a way
        slots = [*chain.from_iterable(map(dict.values, map(attrgetter("_parameters"), deltas)))]
        parameters = [p for p in slots if p is not None]
        settings = [(own["alpha"], own.get("dropout")) for own in map(vars, deltas)]
        stamp = [*settings, *map(id, slots), *map(Tensor.data_ptr, parameters)]
        route._kept["gradients"] = None if _watched(parameters) else route.gradients
        companies = _KEPT.setdefault(bank, {})
        if route.names not in companies or companies[route.names][0] != stamp:
            if len(companies) >= _COMPANIES:
                companies.clear()
            companies[route.names] = (stamp, {})
        route._kept["deltas"] = companies[route.names][1]
    found: dict[Any, joint.Kept] = route._kept["deltas"]
    return found


def forget(bank: DeltaSource) -> None:
    """Let go what earlier passes found: it would keep an adapter that has left."""
    _KEPT.pop(bank, None)


def _watched(parameters: Sequence[Any]) -> bool:
    """Whether only autograd does right by some parameter: it is frozen, or somebody hooked its gradient."""
    trained, *hooks = map(attrgetter, ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks"))
    return not all(map(trained, parameters)) or any(any(map(kind, parameters)) for kind in hooks)


def is_observed(layer: nn.Module) -> bool:
    """Whether somebody hooked the layer, or gave it a forward of its own: it has to be called then."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__


class RoutedLinear(_Routed):
    """A linear layer to whose output the route's adapters add their deltas."""

    def forward(self, input: Tensor) -> Tensor:
        parts = joint_parts([self], input)
        if parts is not None:
            cut, (deltas,), (quantized,), (bias,) = parts
            return joint.linear(input, quantized, bias, deltas, cut)
        return self._add_deltas(input, super().forward(input), input.shape[:-1])


class RoutedEmbedding(_Routed, nn.Embedding):
    """An embedding to whose rows the route's adapters add their deltas, beneath a subclass's scale or offset."""

    def forward(self, input: Tensor) -> Tensor:
        return self._add_deltas(input, super().forward(input), input.shape)


class RoutedPlain(_Routed):
    """A module of which some adapters train a private copy: their rows go through it, all others through the base."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bank, path = self._finetuna_bank, self._finetuna_path
        if bank.sole is not None:
            own = bank.plain_copy(bank.sole, path)
            if own is None:
                return super().forward(*args, **kwargs)
            _check_gradients(bank, own)
            given = next((value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), None)
            like = next(self.parameters(), torch.empty(0)) if given is None else given
            return _call_copy(own, _activations_type(self, like), like.device, args, kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        route = active_route(bank)
        if route is None:
            return super().forward(*args, **kwargs)
        arguments = (args, kwargs)
        shape: Sequence[int] = first.shape[:-1] if first.is_floating_point() else first.shape
        if _for_all_rows(first, route):
            arguments = _each_row(arguments, lambda t, _: t.expand(route.total, *t.shape[1:]), 1, 0)
            shape = (route.total, *shape[1:])
        axis = route.axis(shape)
        count = shape[axis]
        groups: dict[int, tuple[nn.Module | None, list[tuple[str, int, int]]]] = {}
        for name, start, stop in route.segments(count):
            copy = bank.plain_copy(name, path)
            groups.setdefault(id(copy), (copy, []))[1].append((name, start, stop))
        outputs, places = [], []
        for copy, segments in groups.values():
            spans = [(start, stop) for _, start, stop in segments]
            cut_args, cut_kwargs = _each_row(arguments, partial(_take, spans=spans), count, axis)
            part = route.only([name for name, _, _ in segments])
            with routed(bank, part), _packed_as(part):  # the modules inside see these sequences alone
                if copy is None:
                    outputs.append(super().forward(*cut_args, **cut_kwargs))
                else:
                    dtype = _activations_type(self, first)
                    outputs.append(_call_copy(copy, dtype, first.device, cut_args, cut_kwargs))
            places.append(spans)
        return tree_map(lambda *leaves: _put_back(leaves, places, axis), *outputs)


Span = tuple[int, int]


def _packed_as(route: Route) -> AbstractContextManager[None]:
    return nullcontext() if route.lengths is None else packed_pass(route.lengths)


def _for_all_rows(x: Tensor, route: Route) -> bool:
    """Whether ``x`` is one row of indices for the whole batch, as GPT-2's position ids."""
    return route.lengths is None and x.shape[0] == 1 and route.total > 1 and not x.is_floating_point()


def _each_row(arguments: Any, change: Callable[[Any, int], Any], count: int, axis: int) -> Any:
    """The arguments with ``change(it, axis)`` applied to the mask of a packed row and to every tensor that has
    ``count`` entries along ``axis`` (for 1: in its one row) or, failing that, along its leading dimension."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, PackedMask):
            return change(leaf, axis)
        if not isinstance(leaf, Tensor):
            return leaf
        if axis == 1 and leaf.shape[:2] == (1, count):
            return change(leaf, 1)
        return change(leaf, 0) if leaf.dim() and leaf.shape[0] == count else leaf

    return tree_map(changed, arguments)


def _joined(pieces: Sequence[Tensor], chosen: Sequence[int], axis: int) -> Tensor:
    """The chosen pieces, one after another."""
    return pieces[chosen[0]] if len(chosen) == 1 else torch.cat([pieces[index] for index in chosen], axis)


def _take(whole: Any, axis: int, *, spans: Sequence[Span]) -> Any:
    """What lies in ``spans`` of a tensor, or of a packed row's mask, one after another."""
    if isinstance(whole, PackedMask):
        return whole.take(spans)
    pieces = [whole.narrow(axis, start, stop - start) for start, stop in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def _put_back(parts: Sequence[Any], places: Sequence[Sequence[Span]], axis: int) -> Any:
    """The entries of all parts, each in its own place: what ``_take`` undoes. Of parts that are no tensors, the
    first."""
    if len(parts) == 1 or not isinstance(parts[0], Tensor):
        return parts[0]
    totals = [sum(stop - start for start, stop in spans) for spans in places]
    if axis == 1 and any(part.shape[:2] != (1, total) for part, total in zip(parts, totals, strict=True)):
        axis = 0
    pieces: dict[int, Tensor] = {}
    for part, spans, total in zip(parts, places, totals, strict=True):
        each = part.shape[axis] // total
        cut = part.split([(stop - start) * each for start, stop in spans], axis)
        pieces |= {start: piece for (start, _), piece in zip(spans, cut, strict=True)}
    return torch.cat([pieces[start] for start in sorted(pieces)], axis)


def _activations_type(module: nn.Module, first: Tensor) -> torch.dtype:
    """What ``module``, whose first argument is ``first``, computes in."""
    if first.is_floating_point():
        return first.dtype
    stored = [part.dtype for part in module.modules() if isinstance(part, QuantizedWeight)]
    return [*stored, *(p.dtype for p in module.parameters()), torch.float32][0]


def _call_copy(copy: nn.Module, dtype: torch.dtype, device: torch.device, args: Any, kwargs: Any) -> Any:
    """Call a private copy, whose weights are float32, in the activations' 16-bit type."""
    if dtype not in (torch.float16, torch.bfloat16):
        return copy(*args, **kwargs)
    with torch.autocast(device.type, dtype=dtype):
        out = copy(*args, **kwargs)
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, out)


def route_(module: nn.Module, bank: DeltaSource, path: str, *, deltas: bool, plain: bool) -> nn.Module:
    """Make ``module`` follow ``bank``'s routes, in place; ``unroute_`` undoes it.

    Args:
        module: the layer.
        bank: held by reference only: nothing of it becomes a child of the layer.
        path: the layer's name in the backbone, under which the bank keeps what belongs to it.
        deltas: some adapter has a delta on this layer, which is linear or an embedding.
        plain: some adapter trains a private copy of this module.
    """
    cls = own = type(module)
    if deltas:
        cls = _routed_embedding(cls) if isinstance(module, nn.Embedding) else _in_front(RoutedLinear, cls)
    if plain:
        cls = _in_front(RoutedPlain, cls)
    module.__dict__.update(_finetuna_class=own, _finetuna_bank=bank, _finetuna_path=path)
    module.__class__ = cls
    return module


def unroute_(module: nn.Module) -> nn.Module:
    """Give a routed module its own class back."""
    module.__class__ = module.__dict__.pop("_finetuna_class")
    del module.__dict__["_finetuna_bank"], module.__dict__["_finetuna_path"]
    return module


def is_routed(module: nn.Module) -> bool:
    """Whether ``module`` follows some bank's routes."""
    return isinstance(module, _Routed)


_IN_FRONT: dict[tuple[type, type], type] = {}


def _in_front(kind: type, cls: type) -> type:
    if (kind, cls) not in _IN_FRONT:
        _IN_FRONT[kind, cls] = type(f"{kind.__name__}[{cls.__name__}]", (kind, cls), {"__module__": cls.__module__})
    return _IN_FRONT[kind, cls]


def _routed_embedding(cls: type) -> type:
    """Between a subclass's own forward and the lookup, which is torch's or the 8-bit one."""
    if issubclass(cls, QuantizedEmbedding):
        lookup = _in_front(RoutedEmbedding, QuantizedEmbedding)
        own = next((base for base in cls.__mro__[1:] if base not in QuantizedEmbedding.__mro__), None)
        return lookup if own is None else mixed(own, lookup)
    return mixed(cls, RoutedEmbedding)
