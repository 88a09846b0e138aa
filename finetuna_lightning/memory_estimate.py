"""The bytes of a run before it starts: nothing is loaded, nothing is computed.

Weights, gradients and optimizer state are counted from the shapes of the model's and the adapters' own tensors.
Activations are those of a step on tensors without storage (``simulation``), of two and of three of the model's layers
where these are alike, and from there along a straight line; or, for the fused layers of a GPU, a closed form
(``fused_memory``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetuna_lightning.adapters import Adapter, AdapterBank, output_head, resolve_plain, resolve_targets
from finetuna_lightning.attention import assume_full_rows, assume_packing
from finetuna_lightning.backbone import cast_, enable_checkpointing, quantize_model_, skeleton
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, OptimConfig, optimizer_settings
from finetuna_lightning.errors import BackboneError, ConfigError, one_of
from finetuna_lightning.fused_memory import fused_shape, fused_step, runs_fused
from finetuna_lightning.simulation import SAMPLES, Phase, StepBytes, fake_mode, like_layers, simulate, to_fake_
from finetuna_lightning.training.batches import Batch
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.precision import COMPUTE

CUDA_LIBRARIES = 64 << 20  # cuBLAS's workspaces, which torch's allocator hands out: 32 MiB a thread on Hopper
CUDA_CONTEXT = 512 << 20  # of the device's memory, before torch allocates anything
_EIGHT_BIT_BLOCK, _EIGHT_BIT_LEAST, _QMAP = 256, 4096, 256 * 4  # bitsandbytes: smaller parameters have float32 state
_PAGED_LEAST = 100_000  # bitsandbytes: elements of the smallest state that is paged to the host


@dataclass(frozen=True)
class Sequences:
    """What one adapter has in a step: ``count`` sequences of ``tokens`` tokens each."""

    count: int
    tokens: int


@dataclass(frozen=True)
class AdapterBytes:
    """Of one adapter, in bytes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def standing(self) -> int:
        """What stands at every moment."""
        return self.weights + self.optimizer


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of a training run on one device.

    Args:
        backbone: codes, scales and whatever is not quantised.
        adapters: by name.
        step: activations, gradients and working memory of a step, by phase.
        libraries: workspaces that the device's libraries hold.
        device: ``cpu`` or ``cuda``.
    """

    backbone: int
    adapters: dict[str, AdapterBytes]
    step: StepBytes
    libraries: int
    device: str

    @property
    def standing(self) -> int:
        """Weights, optimizer state and library workspaces: what stands at every moment."""
        return self.backbone + sum(own.standing for own in self.adapters.values()) + self.libraries

    @property
    def activations(self) -> int:
        """What the forward pass keeps for the backward pass."""
        return round(self.step.kept)

    @property
    def peak_phase(self) -> tuple[str, Phase]:
        """When most is needed, and what of the step stands then."""
        return self.step.peak

    @property
    def peak(self) -> int:
        """The most that is allocated at once: on a GPU, what ``torch.cuda.max_memory_allocated`` will say."""
        return self.standing + round(self.peak_phase[1].total)

    @property
    def needed(self) -> int:
        """What a device must have: the peak, and on a GPU the context."""
        return self.peak + (CUDA_CONTEXT if self.device == "cuda" else 0)


# ---- what stands -----------------------------------------------------------------------------------------------------


def shape_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of distinct tensors, by their shapes and types: also of those without storage."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of the distinct parameters and buffers of ``module``."""
    return shape_bytes([*module.parameters(), *module.buffers()])


def optimizer_state_bytes(kind: str, parameters: Sequence[Tensor], settings: Mapping[str, Any], gpu: bool) -> int:
    """Bytes of the state that optimizer ``kind`` (a name of ``OPTIMIZERS``) keeps on the device for ``parameters``."""
    eight_bit, paged = kind.endswith("8bit"), kind.startswith("paged") and gpu
    moments = 2 if "adamw" in kind else 1
    total, mapped = 0, False
    for parameter in parameters:
        size = parameter.numel()
        if kind == "adamw":
            total += 2 * size * parameter.element_size() + 4  # and the step count
        elif kind == "sgd":
            total += size * parameter.element_size() if settings.get("momentum") else 0
        elif kind == "adafactor":
            factors = (size // parameter.shape[-1] + size // parameter.shape[-2]) if parameter.dim() > 1 else size
            total += factors * parameter.element_size() + 4
        elif eight_bit and size >= _EIGHT_BIT_LEAST:
            mapped = True
            total += moments * -(-size // _EIGHT_BIT_BLOCK) * 4
            total += 0 if paged and size >= _PAGED_LEAST else moments * size
        else:
            total += 0 if paged and size >= _PAGED_LEAST else moments * size * 4
    return total + (moments * _QMAP if mapped else 0)


def _adapter_bytes(adapter: Adapter, config: AdapterConfig, optim: OptimConfig, gpu: bool) -> AdapterBytes:
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    kind, settings = optimizer_settings(config, optim)
    return AdapterBytes(
        module_bytes(adapter), shape_bytes(trained), optimizer_state_bytes(kind, trained, settings, gpu)
    )


# ---- the model without weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What is to be estimated; see ``estimate_memory``."""

    architecture: Any
    adapters: dict[str, AdapterConfig]
    sequences: dict[str, Sequences]
    optim: OptimConfig
    backbone: BackboneConfig
    dtype: torch.dtype
    gpu: bool
    packed: bool
    paths: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)  # by adapter: of deltas, of plain ones

    def model(self) -> nn.Module:
        """The backbone in 8 bits, on the meta device."""
        backbone = self.backbone
        model = skeleton(
            copy.deepcopy(self.architecture), backbone.task, backbone.num_labels, backbone.trust_remote_code,
            backbone.attn_implementation,
        )  # fmt: skip
        quantize_model_(model, backbone.scheme, backbone.block_size, backbone.skip_modules)
        return cast_(model, self.dtype)

    def bank(self, model: nn.Module, names: Sequence[str]) -> AdapterBank:
        """A bank over ``model`` with the adapters ``names``, on those of their paths that ``model`` has; on the meta
        device too."""
        bank = AdapterBank(model)
        there = {path for path, _ in model.named_modules()}
        for name in names:
            config = self.adapters[name]
            targets, plain = (_exactly([path for path in paths if path in there]) for paths in self.paths[name])
            bank.add(name, rank=config.rank, alpha=config.alpha, dropout=config.dropout, bias=config.bias,
                     targets=targets, plain=plain)  # fmt: skip
        return bank


def _exactly(paths: Sequence[str]) -> list[str]:
    """One pattern for all of ``paths``: each pattern is a walk over the model."""
    return ["(?:" + "|".join(path.replace(".", r"\.") for path in paths) + ")"] if paths else []


def _new_heads(model: nn.Module, task: str) -> list[str]:
    """A classifier's head, which checkpoints of language models lack and every adapter then trains in full."""
    if task != "sequence-classification":
        return []
    body, head = getattr(model, "base_model_prefix", ""), output_head(model)
    return [name for name, child in model.named_children() if name != body and child is not head]


def _resolve(run: _Run, model: nn.Module) -> None:
    for name, config in run.adapters.items():
        plain = resolve_plain(model, [*config.plain_modules, *_new_heads(model, run.backbone.task)])
        targets = resolve_targets(model, config.target_modules, plain) if config.target_modules else {}
        run.paths[name] = list(targets), list(plain)


def _same_targets(run: _Run, layers: Sequence[str]) -> bool:
    """Whether every adapter changes the same modules of each of ``layers``."""
    for targets, plain in run.paths.values():
        paths = [*targets, *plain]
        own = {tuple(path.removeprefix(layer) for path in paths if path.startswith(layer + ".")) for layer in layers}
        if len(own) != 1 or any(path in layers for path in paths):
            return False
    return True


def _counted(run: _Run) -> dict[str, AdapterBytes]:
    """By adapter, its bytes. Adapters of one configuration are counted once."""
    counted: dict[str, AdapterBytes] = {}
    for name, config in run.adapters.items():
        like = next((other for other in counted if run.adapters[other] == config), None)
        if like is None:
            adapter = next(run.bank(run.model(), [name]).adapters())
            counted[name] = _adapter_bytes(adapter, config, run.optim, run.gpu)
        else:
            counted[name] = counted[like]
    return counted


# ---- the step --------------------------------------------------------------------------------------------------------


PACKED, FULL, MASKED = "packed", "full", "masked"  # one row; rows without pads, and no mask; rows with a mask


def _batch(run: _Run, rows: str) -> Batch:
    """A batch of tokens without values, under ``fake_mode``."""
    names, own = list(run.sequences), list(run.sequences.values())
    lengths = [each.tokens for each in own for _ in range(each.count)]
    shape = (1, sum(lengths)) if rows == PACKED else (len(lengths), max(lengths))
    ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.zeros(len(lengths) if run.backbone.task == "sequence-classification" else shape, dtype=torch.int64)
    batch = Batch(input_ids=ids, labels=labels, adapters=names, rows=[each.count for each in own])
    if rows == MASKED:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    if rows == PACKED:
        batch["lengths"], batch["position_ids"] = lengths, torch.zeros(shape, dtype=torch.int64)
    return batch


def _simulated(run: _Run, rows: str, layers: tuple[str, nn.ModuleList] | None, count: int | None) -> StepBytes:
    """A step of the model, or of the model with only ``count`` of its like layers.

    Raises:
        BackboneError: where the model does not take such ``rows``, or no fake tensors at all.
    """
    model = run.model()
    path = "" if layers is None else layers[0]
    if count is not None:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(path)[:count])  # type: ignore[index]
    if run.backbone.gradient_checkpointing:
        enable_checkpointing(model)
    bank = run.bank(model, list(run.adapters))
    with fake_mode():
        to_fake_(model, torch.device("cpu"))
        to_fake_(bank, torch.device("cpu"))
        module = MultiAdapterModule(
            BackboneConfig(task=run.backbone.task), run.adapters, run.optim, deterministic=False
        )
        module.backbone, module._bank, module._packing_tried = model, bank, True
        if rows == PACKED and (obstacle := assume_packing(model, bank)) is not None:
            raise BackboneError(obstacle)
        if rows == FULL:
            assume_full_rows(model, max(own.tokens for own in run.sequences.values()))
        module.train()
        inner: Any = model.config
        if run.backbone.task == "sequence-classification" and inner.pad_token_id is None:
            inner.pad_token_id = 0
        batch = _batch(run, rows)
        trained = {name: [p for p in bank[name].parameters() if p.requires_grad] for name in bank}
        return simulate(
            partial(_loss, module, batch), trained, _list(model, path), prepare=partial(_assume_head, module, batch),
            accumulating=[name for name, config in run.adapters.items() if config.accumulate > 1], gpu=run.gpu,
        )  # fmt: skip


def _assume_head(module: MultiAdapterModule, batch: Any) -> None:
    if module.task == "causal-lm":
        module._fused_head().assume(lambda: module._pass(batch, training=False, bare=True).logits)


def _list(model: nn.Module, path: str) -> nn.ModuleList | None:
    found = model.get_submodule(path) if path else None
    return found if isinstance(found, nn.ModuleList) else None


def _loss(module: MultiAdapterModule, batch: Any) -> Tensor:
    output = module._for_losses(batch, training=True)
    return torch.stack([total / count for _, total, count, _ in module.losses(output, batch)]).sum()


def _step(run: _Run, model: nn.Module) -> StepBytes:
    """A step with packed rows if these were asked for, else with rows without pads, or where the model insists on one,
    with a mask."""
    layers = like_layers(model, partial(_same_targets, run))
    refusal: BackboneError | None = None
    for rows in (PACKED, FULL, MASKED) if run.packed else (FULL, MASKED):
        try:
            if layers is None:
                return _simulated(run, rows, None, None)
            few, more = (_simulated(run, rows, layers, count) for count in SAMPLES)
            return few.moved(more, (len(layers[1]) - SAMPLES[0]) / (SAMPLES[1] - SAMPLES[0]))
        except BackboneError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _low_rank_width(run: _Run) -> int:
    """Low-rank products of a token in one layer, the largest rank for each of its targets."""
    rank = max(config.rank for config in run.adapters.values())
    return 7 * rank


# ---- the whole -------------------------------------------------------------------------------------------------------


def estimate_memory(
    architecture: Any,
    adapters: Mapping[str, AdapterConfig],
    sequences: Mapping[str, Sequences] | Sequences,
    *,
    optim: OptimConfig | None = None,
    backbone: BackboneConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    packed: bool = False,
    compute: str = "auto",
    fused: bool | None = None,
) -> MemoryEstimate:
    """The bytes of a training run, before it starts.

    Args:
        architecture: the backbone's configuration (transformers'), as ``backbone.read_config`` gives it.
        adapters: by name.
        sequences: what each has in a step, by name, or one for all.
        optim: the optimizer of those that name none.
        backbone: scheme, block size, task, skipped modules and recomputation; its name is not read.
        dtype: of the activations; None: bfloat16 on a GPU, else float32.
        device: ``cpu`` or ``cuda``; neither need be there.
        packed: the sequences of a step are one row, where the model's attention can.
        compute: ``EightBitPrecision``'s.
        fused: count the layers as the fused ones of a GPU (``fused_memory``); None: where the run would use these.

    Raises:
        ConfigError, TargetError: as ``AdapterBank.add`` would.
        BackboneError: for a model whose forward pass depends on values (mixtures of experts).

    Example:
        >>> config = transformers.AutoConfig.from_pretrained("./llama")  # doctest: +SKIP
        >>> own = {f"a{i}": AdapterConfig(rank=16, alpha=32) for i in range(8)}  # doctest: +SKIP
        >>> estimate_memory(config, own, Sequences(1, 1024), device="cuda").peak  # doctest: +SKIP
    """
    if compute not in COMPUTE:
        raise ConfigError(one_of("EightBitPrecision.compute", compute, COMPUTE))
    backbone, gpu = backbone or BackboneConfig(), device != "cpu"
    each = dict.fromkeys(adapters, sequences) if isinstance(sequences, Sequences) else dict(sequences)
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    run = _Run(architecture, dict(adapters), each, optim or OptimConfig(), backbone, dtype, gpu, packed)
    model = run.model()
    _resolve(run, model)
    standing = module_bytes(model)
    counted = _counted(run)
    if runs_fused(architecture, backbone, adapters.values(), dtype, gpu) if fused is None else fused:
        tokens = {name: own.count * own.tokens for name, own in each.items()}
        gradients = sum(own.gradients for own in counted.values())
        waiting = sum(own.gradients for name, own in counted.items() if adapters[name].accumulate > 1)
        total, recompute = sum(tokens.values()), backbone.gradient_checkpointing
        shape = fused_shape(architecture, _low_rank_width(run), compute)
        step = fused_step(shape, total, gradients, waiting, recompute)
    else:
        step = _step(run, model)
    return MemoryEstimate(standing, counted, step, CUDA_LIBRARIES if gpu else 0, "cuda" if gpu else "cpu")


def with_one_more(adapters: Mapping[str, AdapterConfig], sequences: Mapping[str, Sequences], **rest: Any
                  ) -> tuple[str, MemoryEstimate]:  # fmt: skip
    """The estimate with a twin of the adapter that has most tokens in a step, and that adapter's name."""
    like = max(adapters, key=lambda name: sequences[name].count * sequences[name].tokens)
    name = "one_more"
    while name in adapters:
        name += "_"
    more = {**adapters, name: adapters[like]}, {**sequences, name: sequences[like]}
    return like, estimate_memory(adapters=more[0], sequences=more[1], **rest)


def adapters_that_fit(found: MemoryEstimate, one_more: MemoryEstimate, memory: int) -> int:
    """How many adapters fit into ``memory`` bytes, where each has its own sequences in a step, and each more or fewer
    is like the one that ``one_more`` has besides those of ``found``."""

    def needed(count: int) -> float:
        times = count - len(found.adapters)
        step = found.step.moved(one_more.step, times).peak[1].total
        return found.needed - found.peak + found.standing + times * (one_more.standing - found.standing) + step

    low, high = 0, 1
    while needed(high) <= memory and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle)
    return low
