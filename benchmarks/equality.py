"""Whether a workload computes what it says, on a cut of two layers: one training step through ``Trainer.fit``.

Joint against alone: the loss and the gradients of an adapter in company, and in a fit of its own on the same path.
Against the reference: plain torch in float32 over the dequantised weights, the delta merged into them (W + alpha / r B
A) and the gradients of A and B taken from that of the merged matrix; no line of ours but the quantiser is in it.

Differences are relative: |a - b| / |b| of losses, ||a - b|| / ||b|| of all of an adapter's gradients as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import SharedBackbone, joint_batches, llama_config, release_memory, show
from benchmarks.ours import Settings, build, compute_of, fit
from benchmarks.workloads import ALPHA, Workload
from finetuna_lightning.backbone import quantized_layers, skeleton
from finetuna_lightning.training.batches import collate
from finetuna_lightning.training.tokenizing import Example

SAMPLED = 3  # adapters that are run alone and by the reference


@dataclass(frozen=True)
class Allowed:
    """The largest relative differences: of losses and gradients, joint against alone and against the reference."""

    joint_loss: float
    joint_gradient: float
    reference_loss: float
    reference_gradient: float


# float32: rounding. bfloat16: 8 bits of mantissa, other shapes of products. 8-bit products: each activation is off by
# up to half a step of its token's scale, so a product of random numbers by about a percent and its gradients by
# several; a last bit that differs between joint and alone moves some of them by a whole step.
ALLOWED = {
    "float32": Allowed(1e-5, 1e-4, 1e-5, 1e-3),
    "bfloat16": Allowed(2e-3, 3e-2, 5e-3, 5e-2),
    "8-bit products": Allowed(5e-3, 1e-1, 1e-2, 1.5e-1),
}


@dataclass
class Step:
    """What one training step gave an adapter: its loss, its weights and their gradients by name."""

    loss: float
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Catch(pl.Callback):
    """Makes every B random (a new delta's is zero, which would hide A) and keeps the losses and gradients of a step."""

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self.compute = ""
        self._gradients: dict[str, dict[str, Tensor]] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.compute = compute_of(pl_module.backbone)
        for number, adapter in enumerate(pl_module.adapters.adapters()):
            number = int("".join(c for c in adapter.name if c.isdigit()) or number)  # the same in company and alone
            generator = torch.Generator().manual_seed(number)
            for name, parameter in adapter.named_parameters():
                if name.endswith("lora_B"):
                    drawn = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.data.copy_(drawn)
            self._weights[adapter.name] = {n: p.detach().clone() for n, p in adapter.named_parameters()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for adapter in pl_module.adapters.adapters():
            grads = {name: p.grad for name, p in adapter.named_parameters()}
            self._gradients[adapter.name] = {n: torch.zeros(()) if g is None else g.clone() for n, g in grads.items()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name, weights in self._weights.items():
            loss = float(trainer.callback_metrics[f"train/{name}/loss"])
            self.steps[name] = Step(loss, weights, self._gradients[name])


def one_step(shared: SharedBackbone, work: Workload, batch: Any, given: Settings) -> Catch:
    """A training step of ``work`` on ``batch``."""
    catch = Catch()
    fit(build(shared.model(), work, given), [batch], shared.device, given, [catch], frozen=False)
    release_memory()
    return catch


def plain_model(shared: SharedBackbone) -> nn.Module:
    """Transformers' own model in float32 with the backbone's dequantised weights."""
    quantized, source = quantized_layers(shared.model()), dict(shared.model().named_parameters())
    model = skeleton(llama_config(shared.shape, shared.layers), "causal-lm")
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            here = quantized[path].dequantize(torch.float32) if path in quantized else source[full].detach().float()
            assert here.shape == parameter.shape
            module._parameters[name] = nn.Parameter(here, requires_grad=False)
    return model.to(shared.device)


def reference_step(model: nn.Module, rows: Sequence[Tensor], own: Step, scaling: float) -> Step:
    """What ``own``'s weights should get from ``rows``, by plain torch; ``model`` is left as it was."""
    paths = sorted({name.rsplit(".", 1)[0] for name in own.weights})
    layers: dict[str, Any] = {path: _layer(model, path) for path in paths}
    before = {path: layer.weight for path, layer in layers.items()}
    for path, layer in layers.items():
        a, b = own.weights[f"{path}.lora_A"].float(), own.weights[f"{path}.lora_B"].float()
        layer.weight = nn.Parameter(before[path].detach() + scaling * (b @ a))
    count = sum(len(row) - 1 for row in rows)
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, row[1:], reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    gradients = {}
    for path, layer in layers.items():
        a, b = own.weights[f"{path}.lora_A"].float(), own.weights[f"{path}.lora_B"].float()
        gradients[f"{path}.lora_A"] = scaling * (b.t() @ layer.weight.grad)
        gradients[f"{path}.lora_B"] = scaling * (layer.weight.grad @ a.t())
        layer.weight = before[path]
    return Step(total, own.weights, gradients)


def _layer(model: nn.Module, path: str) -> nn.Module:
    """The layer that an adapter's parameter path (``deltas.model/layers/...``) speaks of."""
    return model.get_submodule(path.removeprefix("deltas.").replace("/", "."))


def apart(one: Step, other: Step) -> tuple[float, float]:
    """Relative differences of loss and gradients."""
    names = sorted(other.gradients)
    mine, theirs = (torch.cat([s.gradients[n].double().expand_as(other.gradients[n]).flatten() for n in names])
                    for s in (one, other))  # fmt: skip
    return abs(one.loss - other.loss) / abs(other.loss), float((mine - theirs).norm() / theirs.norm())


@dataclass
class Result:
    """``rows``: by adapter, the four differences in ``Allowed``'s order; ``kind``: which of ``ALLOWED`` they meet."""

    title: str
    kind: str
    rows: dict[str, tuple[float, ...]]

    @property
    def allowed(self) -> Allowed:
        """What ``rows`` are held against."""
        return ALLOWED[self.kind]

    @property
    def passed(self) -> bool:
        """Whether no difference is above the allowed; one that is not a number is."""
        limits = vars(self.allowed).values()
        return all(value <= limit for row in self.rows.values() for value, limit in zip(row, limits, strict=True))


def check(shared: SharedBackbone, work: Workload, given: Settings) -> Result:
    """Compare some of ``work``'s adapters over ``shared``, a cut of its layers."""
    (lengths,) = work.lengths(1)
    (batch,) = joint_batches([lengths], shared.shape["vocab_size"], given.packed)
    joint = one_step(shared, work, batch, given)
    names = list(work.ranks)
    sampled = [names[0], names[len(names) // 2], names[-1]][:SAMPLED]
    rows = {name: _rows_of(batch, name) for name in names}
    alone = {name: one_step(shared, work.only([name]), _batch_of({name: rows[name]}, given), given).steps[name]
             for name in dict.fromkeys(sampled)}  # fmt: skip
    model = plain_model(shared)
    found = {}
    for name in alone:
        ids = [row.to(shared.device) for row in rows[name]]
        own = joint.steps[name]
        truth = reference_step(model, ids, own, ALPHA / work.ranks[name])
        found[name] = (*apart(own, alone[name]), *apart(own, truth))
    del model
    release_memory()
    kind = "8-bit products" if joint.compute != "16bit" else str(shared.dtype).removeprefix("torch.")
    return Result(f"{work.key.upper()}, equality on {shared.layers} layers, compute {joint.compute}", kind, found)


def _rows_of(batch: Mapping[str, Any], name: str) -> list[Tensor]:
    """The tokens of each of the adapter's sequences."""
    if "lengths" in batch:
        pieces = list(batch["input_ids"][0].split(batch["lengths"]))
    else:
        pieces = [row[: int(mask.sum())] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    first = 0
    for other, count in zip(batch["adapters"], batch["rows"], strict=True):
        if other == name:
            return pieces[first : first + count]
        first += count
    raise KeyError(name)


def _batch_of(groups: Mapping[str, Sequence[Tensor]], given: Settings) -> Any:
    return collate({n: [Example(r, r.clone()) for r in rows] for n, rows in groups.items()}, packed=given.packed)


def table(result: Result) -> None:
    """Print the differences beside the allowed ones, and whether the check is passed."""
    columns = ["", "loss: joint, alone", "gradients", "loss: ours, reference", "gradients"]
    rows = [[name, *(f"{value:.1e}" for value in row)] for name, row in result.rows.items()]
    rows.append([f"allowed ({result.kind})", *(f"{value:.0e}" for value in vars(result.allowed).values())])
    show(result.title, columns, rows)
    print("equal within the allowed" if result.passed else "NOT EQUAL: no ratio will be shown", flush=True)
