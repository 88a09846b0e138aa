"""The output head left out of a pass, so that the loss is computed with it, fused, from hidden states.

Models differ in what they do after the head (soft caps, scales, casts), and not every head is a linear layer. So the
model's own forward runs as it is, while the head's hands its input through: what comes out as ``logits`` are hidden
states. Whether the loss of these is the loss of the model's own logits is found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetuna_lightning.adapters import AdapterBank, output_head
from finetuna_lightning.errors import RouteError
from finetuna_lightning.nn.quantized import QuantizedLinear
from finetuna_lightning.nn.routing import Route, active_route, routed
from finetuna_lightning.ops import loss
from finetuna_lightning.ops.loss import linear_cross_entropy

_PROBE = (2, 5)  # sequences and tokens that a model is tried with
_PROBE_SIZE = 100.0  # of what is given out as logits: a soft cap shows on numbers as large
_NOISE = {torch.float32: 1e-3, torch.float64: 1e-3}  # how far two ways to one loss may lie apart; else 5%

_MORE = "it does more to its logits than to scale them"
_MOVES = frozenset({"_to_copy", "view", "_unsafe_view", "reshape", "slice", "alias", "clone", "detach"})
_SCALES = frozenset({"mul", "div", "mul_", "div_"})


@dataclass
class HeadInput:
    """What a model without its output head gives.

    Args:
        hidden: [B, T, d], packed [1, T, d].
        own: by adapter, the logits of those that change the head: [rows, T, V], packed [1, T of its own, V].
        head: the frozen head of all others.
        route: which rows or tokens belong to which adapter.
        bank: whose routes the head follows.
    """

    hidden: Tensor
    own: dict[str, Tensor]
    head: nn.Linear
    route: Route
    bank: AdapterBank

    @property
    def logits(self) -> Tensor:
        """What the model with its head gives: [B, T, V], packed [1, T, V]. Computed at each call."""
        with self.bank.bare():
            pieces = self.cut(self.head(self.hidden))
        for name, logits in self.own.items():
            places = self._places(name)
            parts = logits.split([pieces[index].shape[self._axis] for index in places], self._axis)
            for index, part in zip(places, parts, strict=True):
                pieces[index] = part
        return torch.cat(pieces, self._axis)

    def losses(self, labels: Tensor) -> list[Tensor]:
        """The loss of each token, segment by segment, each flat, in float32: 0 where a label is ignored.

        ``labels`` [B, T] or [1, T] are those of the positions, not of the tokens after them.
        """
        hidden, targets = self.hidden, [part.reshape(-1) for part in self.cut(labels)]
        fused = [index for index, name in enumerate(self.route.names) if name not in self.own]
        if self.own:
            parts = self.cut(hidden)
            hidden = torch.cat([parts[index].reshape(-1, hidden.shape[-1]) for index in fused])
            labels = torch.cat([targets[index] for index in fused])
        sizes = [len(targets[index]) for index in fused]
        each = _of_head(self.head, hidden, labels, sizes).reshape(-1)
        found = dict(zip(fused, each.split(sizes), strict=True))
        for name, logits in self.own.items():
            places = self._places(name)
            label = torch.cat([targets[index] for index in places])
            each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), label, reduction="none")
            found |= zip(places, each.split([len(targets[index]) for index in places]), strict=True)
        return [found[index] for index in range(len(targets))]

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Each segment's part of a tensor of all rows, or of all packed tokens."""
        return list(whole.split(list(self.route.sizes), self._axis))

    @property
    def _axis(self) -> int:
        return self.route.axis(self.hidden.shape[:-1])

    def _places(self, name: str) -> list[int]:
        return [index for index, other in enumerate(self.route.names) if other == name]


def _of_head(head: nn.Linear, hidden: Tensor, labels: Tensor, sizes: list[int] | None = None) -> Tensor:
    """The loss of each token; ``sizes``: the tokens of each adapter."""
    # apart, an adapter's products are those of it alone to the last bit; many small ones would be slow on a GPU
    parts = sizes if loss.on_host(hidden) else None
    if not isinstance(head, QuantizedLinear):
        return linear_cross_entropy(hidden, labels, head.weight, bias=head.bias, parts=parts)
    q = head.quantized
    return linear_cross_entropy(
        hidden, labels, q.codes, q.scale, head.bias, scheme=q.scheme, block_size=q.block_size, parts=parts
    )


class FusedHead:
    """The output head of ``backbone``, and passes without it.

    Args:
        backbone: a model that may name its output head.
        bank: its adapters, some of which may change the head: these get their logits in the ordinary way.
    """

    def __init__(self, backbone: nn.Module, bank: AdapterBank) -> None:
        self._backbone, self._bank = backbone, bank
        self._tried: nn.Module | None = None
        self._passes_on = False  # whether what the head gives comes out of the model as it is
        self._found: tuple[nn.Module | None, list[str]] = (None, [])
        self._obstacle: str | None = None

    def obstacle(self) -> str | None:
        """Why the loss must be computed from the model's own logits, or None. A head is tried once."""
        head = output_head(self._backbone)
        if head is None:
            return f"{type(self._backbone).__name__} names no output head"
        if head._forward_hooks or head._forward_pre_hooks:
            return "a hook on the output head waits for logits"
        if any(parameter.requires_grad for parameter in head.parameters()):
            return "its output head is not frozen"
        if self._tried is not head:
            with self._bank.bare():
                self._obstacle = self._try(head)
            self._tried = head
        return self._obstacle

    @torch.no_grad()
    def assume(self, logits: Callable[[], Tensor]) -> None:
        """For tensors without values, on which nothing can be tried: take the head for one that can be left out where
        only what scales follows it, as ``logits()``, a pass of the bare model, shows."""
        head, after = output_head(self._backbone), _After()
        if not isinstance(head, nn.Linear):
            return

        def instead(hidden: Tensor) -> Tensor:
            after.begun = True
            return hidden

        with _replaced(head, instead) as seen, after:
            given = logits()
        whole = len(seen) == 1 and given.shape == seen[0].shape
        self._tried, self._passes_on = head, whole and after.seen <= _MOVES
        self._obstacle = None if whole and after.seen <= _MOVES | _SCALES else _MORE

    def suits(self, names: Sequence[str]) -> bool:
        """Whether a batch of these adapters can go without the head: some of them leave it as it is, and no other has a
        copy of a module around it. Either way an adapter's loss is the same but for rounding (an int8 head's logits may
        be rounded less here: see ``ops.loss``)."""
        if self.obstacle() is not None:
            return False
        changed = self._changed(names)
        if len(changed) == len(set(names)) or (changed and not self._passes_on):
            return False
        *around, _ = self._paths()
        return not any(self._bank.plain_copy(name, path) is not None for name in changed for path in around)

    def run(self, inputs: dict[str, Any]) -> HeadInput:
        """A pass of ``inputs``, under the route in force, whose adapters it ``suits``."""
        route, own, head = active_route(self._bank), dict[str, Tensor](), self._head()
        assert route is not None
        changed = self._changed([name for name, size in zip(route.names, route.sizes, strict=True) if size])

        def instead(hidden: Tensor) -> Tensor:
            axis = route.axis(hidden.shape[:-1])
            for name in changed:
                pieces = zip(route.names, hidden.split(list(route.sizes), axis), strict=True)
                mine, part = torch.cat([piece for other, piece in pieces if other == name], axis), route.only([name])
                with routed(self._bank, part):
                    own[name] = type(head).forward(head, mine)
            return hidden

        with _replaced(head, instead) as seen:
            hidden = self._backbone(**inputs).logits
        return HeadInput(hidden.to(seen[0].dtype), own, head, route, self._bank)

    def _head(self) -> nn.Linear:
        head = output_head(self._backbone)
        assert isinstance(head, nn.Linear)
        return head

    def _paths(self) -> list[str]:
        """The head's name, after those of the modules that it lies in."""
        head = self._head()
        if self._found[0] is not head:
            path = next(path for path, module in self._backbone.named_modules() if module is head)
            parts = path.split(".")
            self._found = head, [".".join(parts[: end + 1]) for end in range(len(parts))]
        return self._found[1]

    def _changed(self, names: Sequence[str]) -> list[str]:
        """Those of the adapters that change the head."""
        paths, bank = self._paths(), self._bank
        return [
            name
            for name in dict.fromkeys(names)
            if bank.delta(name, paths[-1]) is not None or any(bank.plain_copy(name, path) is not None for path in paths)
        ]

    @torch.no_grad()
    def _try(self, head: nn.Module) -> str | None:
        """Why the model, bare, does not give the same losses without its head as with it."""
        model = self._backbone
        if not isinstance(head, nn.Linear):
            return f"its output head is a {type(head).__name__}, and only linear layers are fused with the loss"
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        device = next(iter((*table.buffers(), *table.parameters()))).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(table.num_embeddings, 1000), _PROBE, generator=generator).to(device)
        labels = torch.randint(min(head.out_features, 1000), _PROBE, generator=generator).to(device)
        try:
            with _replaced(head, lambda hidden: hidden) as seen:
                given = model(input_ids=ids, use_cache=False).logits
            if len(seen) != 1 or seen[0].shape != (*_PROBE, head.in_features):
                return f"its output head meets {[tuple(hidden.shape) for hidden in seen]} for a batch of {_PROBE}"
            dtype, stored = seen[0].dtype, getattr(head, "quantized", None)
            noise = _NOISE.get(dtype, 0.05) if stored is None or stored.compute == "16bit" else 0.05
            probe = (torch.randn(seen[0].shape, generator=generator) * _PROBE_SIZE).to(device, dtype)
            with _replaced(head, lambda hidden: probe):
                after = model(input_ids=ids, use_cache=False).logits
            at = probe.abs().argmax()
            if after.shape != probe.shape or not _close(after, probe * (after.flatten()[at] / probe.flatten()[at])):
                return _MORE
            self._passes_on = torch.equal(after.to(dtype), probe)
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            whole = F.cross_entropy(logits.float(), labels.flatten(), reduction="none")
            fused = _of_head(head, given.to(dtype), labels).flatten()
            if not (error := float((fused - whole).norm() / whole.norm())) <= noise:
                return f"its losses from hidden states are not those from its logits ({error:.1e} of their norm apart)"
        except (RouteError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError) as error:
            lines = str(error).splitlines()
            return f"it was tried without its head: {type(error).__name__}{': ' + lines[0] if lines else ''}"
        return None


class _After(TorchDispatchMode):
    """Which operators run from ``begun`` on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.begun = False
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.begun:
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-5 if one.dtype == other.dtype == torch.float32 else 1e-2
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=0)


@contextmanager
def _replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Within, ``head(x)`` is ``forward(x)``; gives the list of what it was called with."""
    seen: list[Tensor] = []

    def instead(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return forward(hidden)

    head.__dict__["forward"] = instead  # found before the class's, which routing may change
    try:
        yield seen
    finally:
        del head.__dict__["forward"]
