"""One training step on tensors without storage, and the bytes that it would hold at each point.

torch's fake tensors run the code that a real step runs, autograd and recomputation included, but have shapes only. A
ledger adds every new storage and takes it off when it is freed. What a kernel allocates inside itself is not seen."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetuna_lightning.errors import BackboneError
from finetuna_lightning.nn import joint_cpu
from finetuna_lightning.ops import cpu_rows, loss, reference

FORWARD, HEAD, HEAD_BACKWARD = "forward pass of the layers", "head and loss", "backward pass of the head"
LAST_BACKWARD, FIRST_BACKWARD = "backward pass of the last layer", "backward pass of the first layer"
STEP = "optimizer step"
PHASES = (FORWARD, HEAD, HEAD_BACKWARD, LAST_BACKWARD, FIRST_BACKWARD, STEP)
SAMPLES = (2, 3)  # layers of the models that stand for one of many like layers
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)  # fake tensors' errors too
_CUDA_UNIT = 512  # torch's allocator gives out multiples of so many bytes


@dataclass(frozen=True)
class Phase:
    """The bytes that stand when a phase of the step needs most, weights and optimizer state left out.

    Args:
        gradients: of the adapters.
        kept: what the forward pass kept for the backward pass and is not freed yet.
        working: everything else.
    """

    gradients: float = 0.0
    kept: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.kept + self.working

    def moved(self, other: Phase, times: float) -> Phase:
        """This phase, and ``times`` what ``other`` has more."""
        return Phase(
            self.gradients + times * (other.gradients - self.gradients),
            self.kept + times * (other.kept - self.kept),
            self.working + times * (other.working - self.working),
        )


@dataclass(frozen=True)
class StepBytes:
    """What a step needs besides weights and optimizer state.

    Args:
        kept: bytes that the whole forward pass keeps for the backward pass.
        phases: by their names (``PHASES``).
    """

    kept: float
    phases: dict[str, Phase]

    def moved(self, other: StepBytes, times: float) -> StepBytes:
        """This step, and ``times`` what ``other`` has more: every phase is a linear function of the number of like
        layers, and of the number of like adapters."""
        phases = {name: phase.moved(other.phases[name], times) for name, phase in self.phases.items()}
        return StepBytes(self.kept + times * (other.kept - self.kept), phases)

    @property
    def peak(self) -> tuple[str, Phase]:
        """The phase that needs most."""
        return max(self.phases.items(), key=lambda item: item[1].total)


class Ledger(TorchDispatchMode):
    """Adds up the storages that are made within, each once, until they are freed."""

    def __init__(self, unit: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unit = unit
        self.phases: dict[str, Phase] = {}
        self.kept = 0  # of the whole forward pass
        self._now = ""
        self._live: dict[int, tuple[int, str]] = {}
        self._sums = {"gradients": 0, "kept": 0, "working": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._live:
                given = (other for other in tree_leaves((args, kwargs)) if isinstance(other, Tensor))
                if all(other.untyped_storage()._cdata != leaf.untyped_storage()._cdata for other in given):
                    self._add(leaf)  # else it is a view of what stood before
        return out

    def enter(self, phase: str) -> None:
        """From here on, what stands counts to ``phase``."""
        self._now = phase
        self._measure()

    def count(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Let ``tensors`` count to ``kind`` from here on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                self._move(key, kind)

    def keep(self) -> None:
        """All that stands and is no gradient is kept for the backward pass."""
        for key, (_, kind) in list(self._live.items()):
            if kind == "working":
                self._move(key, "kept")
        self.kept = self._sums["kept"]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // self.unit) * self.unit
        self._live[key] = (size, "working")
        self._sums["working"] += size
        weakref.finalize(storage, self._free, key)
        self._measure()

    def _move(self, key: int, kind: str) -> None:
        size, before = self._live[key]
        self._live[key] = (size, kind)
        self._sums[before] -= size
        self._sums[kind] += size

    def _free(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self._sums[kind] -= size

    def _measure(self) -> None:
        if not self._now:
            return
        most = self.phases.get(self._now)
        if most is None or sum(self._sums.values()) > most.total:
            self.phases[self._now] = Phase(**self._sums)


# ---- models without storage -----------------------------------------------------------------------------------------


def fake_mode() -> FakeTensorMode:
    """The mode in which tensors have shapes only."""
    reference._tree(torch.device("cpu"))  # it keeps what it makes, so it must not make a fake one
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake_(module: nn.Module, device: torch.device) -> nn.Module:
    """Give every parameter and buffer of ``module``, in place and under ``fake_mode``, a fake tensor of its shape and
    type on ``device``; what is shared stays shared, what is trained is trained. (Copy a module before, not after: the
    copy of a fake buffer reads memory that is not there.)"""
    done: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            trained = tensor.requires_grad
            done[id(tensor)] = nn.Parameter(new, trained) if isinstance(tensor, nn.Parameter) else new
        return done[id(tensor)]

    for part in module.modules():
        held: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for tensors in held:
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return module


def like_layers(model: nn.Module, same: Callable[[Sequence[str]], bool]) -> tuple[str, nn.ModuleList] | None:
    """The list of ``model``'s layers and its path, where its layers are alike in class and shapes, are more than the
    samples, and ``same(their paths)``; None where there is no such list, or more than one."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > max(SAMPLES):
            kinds = {
                (
                    type(layer),
                    *((name, tuple(t.shape)) for name, t in (*layer.named_parameters(), *layer.named_buffers())),
                )
                for layer in module
            }
            if len(kinds) == 1:
                found.append((path, module))
    if len(found) != 1 or not same([f"{found[0][0]}.{index}" for index in range(len(found[0][1]))]):
        return None
    types = getattr(getattr(model, "config", None), "layer_types", None)
    return found[0] if types is None or len(set(types)) == 1 else None


# ---- as on a GPU -----------------------------------------------------------------------------------------------------


class _FlashAttention(torch.autograd.Function):
    """What a fused attention kernel on a GPU takes, keeps and gives, in shapes alone: q, k, v, the output and a
    float32 logarithm a row and head; a float32 accumulator of dq in the backward pass (arXiv 2307.08691)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # the kernel's own layout, [rows, tokens, heads, features]: the model's transpose back is a view
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1])
        out = q.new_empty(shape).transpose(-2, -3)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        wide = q.new_empty(q.shape, dtype=torch.float32)
        each = [q.new_empty(q.shape) for _ in range(2)] if k.shape[-3] != q.shape[-3] else []
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del wide, each  # the second: dk and dv of every query head, before they are added up by group
        return found


@contextmanager
def _as_on(gpu: bool) -> Iterator[None]:
    """Within, attention is a fused kernel's, the loss is cut as on a GPU and the CPU's joint layers are not taken:
    tensors that lie nowhere are the CPU's to torch. For the CPU, some token of each adapter has no label, as is usual:
    which, such tensors cannot say."""
    attention = torch.nn.functional.scaled_dot_product_attention
    own = loss.on_host, loss.rows_that_count, loss.may_hold_any, loss.cross_entropy_, joint_cpu.takes
    read_out = cpu_rows.dequantize_rows_
    if gpu:
        torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: _FlashAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        loss.on_host = lambda x: False
        loss.cross_entropy_ = lambda *_: None  # Triton's writes over the logits
        joint_cpu.takes = lambda *_: False
        cpu_rows.dequantize_rows_ = lambda codes, scale, out: out  # in one pass, not in hundreds of pieces of a matrix
    loss.rows_that_count, loss.may_hold_any = lambda labels: torch.arange(len(labels) - 1), lambda mask: True
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
        loss.on_host, loss.rows_that_count, loss.may_hold_any, loss.cross_entropy_, joint_cpu.takes = own
        cpu_rows.dequantize_rows_ = read_out


# ---- one step -------------------------------------------------------------------------------------------------------


def simulate(
    total_loss: Callable[[], Tensor],
    parameters: Mapping[str, Sequence[nn.Parameter]],
    layers: nn.ModuleList | None,
    *,
    prepare: Callable[[], None] = lambda: None,
    accumulating: Sequence[str] = (),
    gpu: bool = False,
) -> StepBytes:
    """One step after the first, under ``fake_mode``: the gradients of a step that was taken are gone
    (``AdapterOptimizers.release``), those of adapters that accumulate stand from the beginning.

    Args:
        total_loss: the forward pass.
        parameters: what is trained, by adapter.
        layers: the model's; without them the backward pass is one phase.
        prepare: called before the step, for what a run does once.
        accumulating: adapters that take several batches to a step.
        gpu: count as torch's allocator for CUDA does, with its attention kernels.

    Raises:
        BackboneError: when the forward pass asks for values and not only for shapes, or fails.
    """
    ledger = Ledger(_CUDA_UNIT if gpu else 1)
    handles: list[Any] = []
    every = [parameter for own in parameters.values() for parameter in own]
    try:
        with _silent(), _as_on(gpu):
            prepare()
        handles += _mark_layers(ledger, layers)
        for parameter in every:
            handles.append(parameter.register_post_accumulate_grad_hook(_count_gradient(ledger)))
        with _silent(), _as_on(gpu), ledger:
            standing = [parameter for name in accumulating for parameter in parameters[name]]
            for parameter in standing:
                parameter.grad = torch.empty_like(parameter)
            ledger.count([p.grad for p in standing if p.grad is not None], "gradients")
            ledger.enter(FORWARD)
            total = total_loss()
            ledger.keep()
            ledger.enter(HEAD_BACKWARD)
            torch.autograd.backward(total)
            del total
            ledger.enter(STEP)
    except _REFUSALS as error:
        lines = str(error).splitlines() or [""]
        raise BackboneError(
            "the memory of this model cannot be told without running it: its forward pass refuses tensors that have "
            f"shapes alone ({type(error).__name__}: {lines[0]})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for parameter in every:
            parameter.grad = None
    first = ledger.phases[HEAD_BACKWARD]
    phases = {name: ledger.phases.get(name, first) for name in PHASES}
    for name in (FORWARD, HEAD):  # what will be kept is not known yet while it is made
        kept = min(ledger.kept, phases[name].working + phases[name].kept)
        phases[name] = Phase(phases[name].gradients, kept, phases[name].total - phases[name].gradients - kept)
    return StepBytes(ledger.kept, phases)


@contextmanager
def _silent() -> Iterator[None]:
    """Within, torch does not log the traceback of an operator that refuses fake tensors: the error says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _count_gradient(ledger: Ledger) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.count([parameter.grad], "gradients")

    return hook


def _mark_layers(ledger: Ledger, layers: nn.ModuleList | None) -> list[Any]:
    """Say to the ledger when the forward pass leaves the last layer, and when the backward pass gets to the last and
    to the first."""
    handles: list[Any] = []

    def arrives(index: int, phase: str) -> None:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if ledger.kept:
                return  # a recomputation
            if phase == LAST_BACKWARD:
                ledger.enter(HEAD)
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.enter(phase))

        assert layers is not None
        handles.append(layers[index].register_forward_hook(hook))

    for index in range(len(layers or ())):
        last = len(layers or ()) - 1
        arrives(index, LAST_BACKWARD if index == last else FIRST_BACKWARD if index == 0 else f"layer {index}")
    return handles
