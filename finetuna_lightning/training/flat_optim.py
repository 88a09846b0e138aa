"""bitsandbytes' optimizers, one adapter at a time instead of one tensor at a time.

bitsandbytes steps every tensor by itself and waits for the GPU after each: for 8 adapters of 448 tensors that is 3,584
kernels and as many waits. Here the tensors of an adapter that are stepped alike go through one kernel, bitsandbytes'
own. Their state lies side by side for good, each tensor's from a multiple of 256 elements on, which is bitsandbytes'
block, so that no block has elements of two tensors and every weight gets the bits that it gets there. Gradients and
weights are put side by side for the step only: what was gathered is freed again, so that weights stay where modules,
checkpoints and exports have them, and the room for it is shared by all adapters.

For AdamW in 8 bits on a GPU with Triton there is a kernel of our own (``ops.kernels.adam``), which finds weights and
gradients where they are and gathers nothing. Its state is bitsandbytes' too; its sums may round otherwise.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

from finetuna_lightning.ops.library import has_triton
from finetuna_lightning.training.norms import addresses, sent

FLAT = {"adamw8bit": "AdamW8bit", "lion": "Lion", "lion8bit": "Lion8bit"}
"""The kinds that there are, and the class of bitsandbytes that each is. (Paged state stays with its tensor.)"""

BLOCK = 256
"""Elements that share one scale: bitsandbytes' own, fixed in its kernels."""

MOMENTS = {"state1", "state2"}

CHUNK = 1 << 22
"""Elements in one kernel, a multiple of the block. What is gathered at a time takes about 14 bytes an element."""


FUSED = True
"""Whether AdamW in 8 bits has its own kernel where that runs."""


def flat_optimizer(kind: str, params: Iterable[Any], **settings: Any) -> FlatStep:
    """The optimizer of bitsandbytes of this ``kind`` (a key of ``FLAT``), stepping flat."""
    made: FlatStep = _class(FLAT[kind])(params, **settings)
    return made


@functools.cache
def _class(name: str) -> Any:
    """Named like its base, since their checkpoints are the same."""
    import bitsandbytes.optim  # slow to import

    return type(name, (FlatStep, getattr(bitsandbytes.optim, name)), {"__module__": __name__})


@dataclass
class Chunk:
    """What one kernel steps: elements ``start`` to ``stop`` of a shelf.

    Args:
        parts: of tensors, in turn: the tensor's index in the shelf, the part's first element and the one after its
            last. Index None is padding.
        whole: the range of indices, where the parts are whole tensors and nothing else.
    """

    start: int
    stop: int
    parts: list[tuple[int | None, int, int]]
    whole: slice | None

    def of(self, tensors: Sequence[Any], padding: Tensor) -> list[Tensor]:
        """Its parts of ``tensors``, one for each parameter of the shelf."""
        if self.whole is not None:
            return list(tensors[self.whole])
        return [
            padding[: last - first] if index is None else tensors[index].view(-1)[first:last]
            for index, first, last in self.parts
        ]


@dataclass
class Shelf:
    """The state of parameters of one kind (group, device, type, bits), side by side.

    Args:
        group: its index.
        parameters: in their order.
        states: bitsandbytes' of each.
        starts: where the state of each begins and, last, where the shelf ends.
        moments: [1 or 2, elements], uint8 codes or float32.
        absmax: [1 or 2, blocks], the scales of 8-bit codes.
        maps: what the codes of each row stand for.
    """

    group: int
    parameters: list[nn.Parameter]
    states: list[dict[str, Any]]
    starts: list[int]
    moments: Tensor
    absmax: Tensor | None
    maps: list[Tensor]
    padding: Tensor
    fused: FusedShelf | None = None
    _cut: dict[tuple[int, int], list[Chunk]] = field(default_factory=dict)

    def chunks(self, first: int, last: int) -> list[Chunk]:
        """The parameters from ``first`` up to ``last``, in chunks of at most ``CHUNK`` elements."""
        if (first, last) not in self._cut:
            self._cut[first, last] = list(self._chunks(first, last))
        return self._cut[first, last]

    @property
    def layout(self) -> Layout:
        """Of the whole, where it is the kernel's."""
        assert self.fused is not None
        return self.fused.layout(0, len(self.parameters))

    def _chunks(self, first: int, last: int) -> Iterator[Chunk]:
        for start in range(self.starts[first], self.starts[last], CHUNK):
            stop = min(start + CHUNK, self.starts[last])
            parts: list[tuple[int | None, int, int]] = []
            whole = True
            for index in range(first, last):
                begin, size = self.starts[index], self.parameters[index].numel()
                a, b = max(start, begin), min(stop, begin + size)
                if a < b:
                    parts.append((index, a - begin, b - begin))
                    whole &= b - a == size
                c, d = max(start, begin + size), min(stop, self.starts[index + 1])
                if c < d:
                    parts.append((None, 0, d - c))
                    whole = False
            indices = [index for index, _, _ in parts if index is not None]
            yield Chunk(start, stop, parts, slice(indices[0], indices[-1] + 1) if whole else None)


@dataclass(frozen=True, eq=False)
class Layout:
    """The sizes of some tensors and where the state of each starts; the kernel's programs for them, on the device.
    There is one for all adapters that are alike."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    programs: Tensor
    tensors: Tensor


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], starts: tuple[int, ...], device: torch.device) -> Layout:
    from finetuna_lightning.ops.kernels import adam

    programs = adam.programs(sizes, adam.ROWS).to(device)
    return Layout(sizes, starts, programs, torch.tensor([sizes, starts]).to(device))


@functools.lru_cache(maxsize=8)
def _kernel_maps(first: bytes, second: bytes, device: torch.device) -> tuple[Any, Any]:
    """The kernel's form of the maps whose float32 bytes these are."""
    from finetuna_lightning.ops.kernels import adam

    own = (torch.frombuffer(bytearray(each), dtype=torch.float32).to(device) for each in (first, second))
    return adam.nearest_map(next(own)), adam.nearest_map(next(own))


class FusedShelf:
    """What the kernel for whole shelves needs besides them."""

    def __init__(self, starts: Sequence[int], sizes: Sequence[int], maps: Sequence[Tensor]) -> None:
        self.starts, self.sizes, self.device = tuple(starts), tuple(sizes), maps[0].device
        first, second = (each.float().cpu().numpy() for each in maps)
        self.maps = _kernel_maps(first.tobytes(), second.tobytes(), self.device)
        self.zero = int((first == 0).nonzero()[0][0])
        self._layouts: dict[tuple[int, int], Layout] = {}

    def layout(self, first: int, last: int) -> Layout:
        """Of the parameters from ``first`` up to ``last``."""
        if (first, last) not in self._layouts:
            self._layouts[first, last] = _layout(self.sizes[first:last], self.starts[first:last], self.device)
        return self._layouts[first, last]


@dataclass
class Run:
    """Neighbours on a shelf that have gradients and the same number of steps behind them.

    Args:
        gradients: contiguous; count: which step comes.
        standing: as ``FlatStep`` has it; there are no ``gradients`` then.
    """

    shelf: Shelf
    first: int
    last: int
    gradients: list[Tensor]
    count: int
    standing: Tensor | None = None

    def addresses(self) -> Tensor:
        """Of weights and gradients: int64 [2, parameters], on the host."""
        if self.standing is not None:
            return self.standing
        return addresses([*self.shelf.parameters[self.first : self.last], *self.gradients]).view(2, -1)


class FlatStep(Optimizer):
    """The step of a bitsandbytes optimizer that it is mixed into. State and checkpoints are bitsandbytes' own, by
    parameter; the tensors of the state are parts of larger ones.

    ``found_inf``, ``coefficient`` and ``standing`` are for the next step alone, and nothing waits for any of them.

    Attributes:
        found_inf: on the device, 1.0 where the step is to leave weights and state as they are, to the bit, else 0.0;
            so torch's fused optimizers have it. The step's count moves in any case, and ``take_back`` moves it back.
        coefficient: on the device, what the gradients are multiplied by.
        standing: where the parameters of ``lone_shelf`` stand, and their gradients, which are in none's ``grad``: int64
            [2, parameters], on the host.
    """

    found_inf: Tensor | None = None
    coefficient: Tensor | None = None
    standing: Tensor | None = None
    _step_supports_amp_scaling = True  # torch's word for an optimizer that heeds found_inf
    _shelves: Sequence[Shelf] | None = None
    _without: Sequence[nn.Parameter] = ()  # a state so far
    _stepped: Sequence[dict[str, Any]] = ()  # the states

    # bitsandbytes', which has no types
    optimizer_name: str
    init_state: Callable[..., None]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The end of ``load_state_dict`` too: what was loaded lies anywhere."""
        super().__setstate__(state)
        self._shelves = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's."""
        super().add_param_group(param_group)
        self._shelves = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step_together([self])
        return loss

    def lone_shelf(self) -> Shelf | None:
        """The shelf of all parameters, where there is one, the kernel takes it as it lies, and all have as many steps
        behind them."""
        (shelf,) = self._shelves if self._shelves and len(self._shelves) == 1 else (None,)
        if shelf is None or self._without or shelf.fused is None or self._moved():
            return None
        return shelf if len(set(map(itemgetter("step"), shelf.states))) == 1 else None

    def _runs(self) -> Iterator[Run]:
        """What is to be stepped."""
        if self.standing is not None:
            (shelf,) = self._shelves or ()
            yield Run(shelf, 0, len(shelf.parameters), [], shelf.states[0]["step"] + 1, self.standing)
            return
        for shelf in self._arranged():
            gradients = [p.grad for p in shelf.parameters]
            if not all(map(Tensor.is_contiguous, shelf.parameters)):
                for turned in shelf.parameters:
                    turned.data = turned.data.contiguous()  # as bitsandbytes does
            counts: list[int | None] = [*map(itemgetter("step"), shelf.states)]
            if type(None) in set(map(type, gradients)):
                counts = [None if g is None else count for g, count in zip(gradients, counts, strict=True)]
            first = 0
            for count, same in groupby(counts):
                last = first + len(list(same))
                if count is not None:
                    own = [g for g in gradients[first:last] if g is not None]
                    if not all(map(Tensor.is_contiguous, own)):
                        own = [g.contiguous() for g in own]
                    yield Run(shelf, first, last, own, count + 1)
                first = last

    def take_back(self) -> None:
        """The device did not take the last step: it does not count."""
        for state in self._stepped:
            state["step"] -= 1

    def _advance(self, run: Run, chunk: Chunk, skip: Tensor | None) -> None:
        """The step of the parameters in ``chunk``, undone where ``skip`` says so."""
        shelf = run.shelf
        gradient = _gathered(chunk.of([*[None] * run.first, *run.gradients], shelf.padding))
        if self.coefficient is not None:
            gradient.mul_(self.coefficient)
        weights = chunk.of(shelf.parameters, shelf.padding)
        weight = _gathered(weights)
        changed = [weight, shelf.moments[:, chunk.start : chunk.stop]]
        if shelf.absmax is not None:
            changed.append(shelf.absmax[:, chunk.start // BLOCK : chunk.stop // BLOCK])
        before = [] if skip is None else [tensor.clone() for tensor in changed]
        self._update(self.param_groups[shelf.group], gradient, run.count, shelf.maps, *changed)
        del gradient
        if skip is not None:
            for old, new in zip(before, changed, strict=True):
                torch.where(skip, old, new, out=new)
        news = _unflatten_dense_tensors(weight, weights)
        if chunk.whole is None:
            own = [number for number, part in enumerate(chunk.parts) if part[0] is not None]
            weights, news = [weights[number] for number in own], [news[number] for number in own]
        torch._foreach_copy_(weights, list(news))

    def _update(
        self,
        group: dict[str, Any],
        gradient: Tensor,
        count: int,
        maps: Sequence[Tensor],
        weight: Tensor,
        moments: Tensor,
        absmax: Tensor | None = None,
    ) -> None:
        """bitsandbytes' kernel, over flat tensors."""
        from bitsandbytes import functional

        (beta1, beta2), eps, rate, decay = group["betas"], group["eps"], group["lr"], group["weight_decay"]
        first, second = _two(moments)
        if absmax is None:
            functional.optimizer_update_32bit(
                self.optimizer_name, gradient, weight, first, beta1, eps, count, rate, second, beta2, weight_decay=decay
            )
        else:
            functional.optimizer_update_8bit_blockwise(
                self.optimizer_name, gradient, weight, first, second, beta1, beta2, 0.0, 0.0, eps, count, rate,
                *_two(maps), *_two(absmax), weight_decay=decay,
            )  # fmt: skip

    # ---- the state, side by side ----

    def _arranged(self) -> Sequence[Shelf]:
        """The shelves, anew where a parameter has its first gradient, a state was loaded or the module moved."""
        shelves = self._shelves
        if shelves is None or self._moved() or any(p.grad is not None for p in self._without):
            kinds, self._without = defaultdict(list), []
            for index, group in enumerate(self.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if parameter.grad is None and not self.state.get(parameter):
                        self._without.append(parameter)
                        continue
                    kind = self._prepared(parameter, group, index, place)
                    kinds[index, parameter.device, parameter.dtype, kind].append(parameter)
            self._shelves = shelves = [self._shelve(key[0], members) for key, members in kinds.items()]
        return shelves

    def _moved(self) -> bool:
        return any(shelf.moments.device != shelf.parameters[0].device for shelf in self._shelves or ())

    def _prepared(self, parameter: nn.Parameter, group: dict[str, Any], index: int, place: int) -> torch.dtype:
        """The type of its moments. Of new ones, bitsandbytes says which there are; their room is on the shelf."""
        state = self.state[parameter]
        if not state:
            self.init_state(group, parameter, index, place)
            for name in MOMENTS & state.keys():
                state[name] = state[name].new_empty(0)
        kind: torch.dtype = state["state1"].dtype
        return kind

    def _shelve(self, group: int, parameters: list[nn.Parameter]) -> Shelf:
        states, device = [self.state[p] for p in parameters], parameters[0].device
        first = states[0]
        names = [name for name in ("state1", "state2") if name in first]
        eight = first["state1"].dtype == torch.uint8
        align = BLOCK if eight else 4  # four float32: what a GPU reads at once
        starts = [0, *accumulate(-(-p.numel() // align) * align for p in parameters)]
        moments = torch.zeros(len(names), starts[-1], dtype=first["state1"].dtype, device=device)
        absmax = torch.zeros(len(names), starts[-1] // BLOCK, device=device) if eight else None
        maps = [first[name.replace("state", "qmap")].to(device) for name in names] if eight else []
        for parameter, state, start in zip(parameters, states, starts, strict=False):
            size = parameter.numel()
            for row, name in enumerate(names):
                own = moments[row, start : start + size].view(parameter.shape)
                if state[name].numel():
                    own.copy_(state[name])
                state[name] = own
                if absmax is not None:
                    scales = absmax[row, start // BLOCK : -(-(start + size) // BLOCK)]
                    key = name.replace("state", "absmax")
                    state[key] = scales.copy_(state[key])
                    state[name.replace("state", "qmap")] = maps[row]
        padding = torch.zeros(align, dtype=parameters[0].dtype, device=device)
        fused = None
        adamw = self.optimizer_name == "adam" and len(maps) == 2
        if FUSED and adamw and parameters[0].dtype == torch.float32 and has_triton(device):
            fused = FusedShelf(starts, [p.numel() for p in parameters], maps)
        return Shelf(group, parameters, states, starts, moments, absmax, maps, padding, fused)


@torch.no_grad()
def step_together(optimizers: Sequence[FlatStep]) -> None:
    """Step each of ``optimizers``, as it would by itself; what the kernel takes, all that is laid out alike at once."""
    alike: dict[Any, list[tuple[FlatStep, Run]]] = defaultdict(list)
    for optimizer in optimizers:
        skip = None if optimizer.found_inf is None else optimizer.found_inf > 0
        stepped: list[dict[str, Any]] = []
        for run in optimizer._runs():
            shelf, fused = run.shelf, run.shelf.fused
            stepped += shelf.states[run.first : run.last]
            if fused is not None:
                alike[fused.layout(run.first, run.last), fused.maps, fused.zero].append((optimizer, run))
                continue
            for chunk in shelf.chunks(run.first, run.last):
                optimizer._advance(run, chunk, skip)
        optimizer._stepped = stepped
    for (layout, maps, zero), runs in alike.items():
        _advance_fused(layout, maps, zero, runs)
    for optimizer in optimizers:
        for state in optimizer._stepped:
            state["step"] += 1
        optimizer.found_inf = optimizer.coefficient = optimizer.standing = None


def _advance_fused(layout: Layout, maps: tuple[Any, Any], zero: int, runs: Sequence[tuple[FlatStep, Run]]) -> None:
    """The steps of tensors that are laid out alike, one kernel for all."""
    from finetuna_lightning.ops.kernels import adam

    device = layout.programs.device
    states: list[list[int]] = []
    settings: list[list[float]] = []
    for optimizer, run in runs:
        shelf, group = run.shelf, optimizer.param_groups[run.shelf.group]
        assert shelf.absmax is not None
        states.append([*map(Tensor.data_ptr, (*shelf.moments.unbind(), *shelf.absmax.unbind()))])
        settings.append(adam.settings_of(group["lr"], group["betas"], group["eps"], group["weight_decay"], run.count))
    at = torch.stack([run.addresses() for _, run in runs])
    skips = [optimizer.found_inf for optimizer, _ in runs]
    factors = [optimizer.coefficient for optimizer, _ in runs]
    with torch.cuda.device(device):  # Triton launches on the current one
        adam.adamw8bit(
            layout.programs, layout.tensors, sent(at, device), sent(torch.tensor(states), device),
            sent(torch.tensor(settings), device), maps, zero=zero,
            skip=_stacked(skips, 0.0, device) > 0, coefficient=_stacked(factors, 1.0, device),
            aligned=not bool((at & 15).any()),
        )  # fmt: skip


def _stacked(values: Sequence[Tensor | None], missing: float, device: torch.device) -> Tensor:
    """0-dim tensors as one of float32, with ``missing`` where there is none."""
    if all(value is None for value in values):
        return torch.full((len(values),), missing, device=device)
    absent = torch.full((), missing, device=device)
    return torch.stack([absent if value is None else value.float() for value in values])


def _gathered(tensors: list[Tensor]) -> Tensor:
    """Side by side, in memory of its own (of a single one torch gives a view)."""
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat.clone() if len(tensors) == 1 else flat


def _two(rows: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor | None]:
    return rows[0], rows[1] if len(rows) == 2 else None
