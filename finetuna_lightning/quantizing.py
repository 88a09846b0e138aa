"""Quantise any module in place; the quantised matrices of a model, and their fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from finetuna_lightning.adapters import matches
from finetuna_lightning.configs import BackboneConfig
from finetuna_lightning.errors import BackboneError, TargetError, did_you_mean
from finetuna_lightning.nn.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    is_conv1d,
    quantizable,
    quantize_embedding_,
    quantize_linear_,
)


def skipped(model: nn.Module, skip: Iterable[str]) -> set[int]:
    """Ids of the layers that ``skip`` names, of what lies in them, and of layers that share a weight with one of
    these."""
    layers = dict(model.named_modules(remove_duplicate=False))
    chosen: set[int] = set()
    for pattern in skip:
        named = [path for path in layers if path and matches(pattern, path)]
        if not named:
            ends = {path.rsplit(".", 1)[-1] for path in layers if path}
            raise TargetError(f"skip_modules: no module matches {pattern!r}{did_you_mean(pattern, ends)}")
        chosen |= {id(m) for p, m in layers.items() for name in named if p == name or p.startswith(name + ".")}
    weights = {id(getattr(m, "weight", None)) for m in layers.values() if id(m) in chosen and quantizable(m)}
    return chosen | {id(m) for m in layers.values() if quantizable(m) and id(m.weight) in weights}


def quantize_model_(
    model: nn.Module, scheme: str = "int8", block_size: int = 64, skip: Iterable[str] = ()
) -> nn.Module:
    """Quantise every linear layer, ``Conv1D`` and embedding of ``model`` in place, and freeze all of it.

    Layers that share a weight go on sharing one storage. What is quantised already is left as it is, so a second call
    changes nothing.

    Raises:
        ConfigError: for an unknown scheme.
        TargetError: when an entry of ``skip`` matches no module.
        BackboneError: for a weight that is not finite, or a linear subclass with a forward of its own.
    """
    BackboneConfig("quickstart", scheme=scheme)  # checks it
    left = skipped(model, skip)
    done: dict[int, tuple[QuantizedWeight, Tensor]] = {}
    for path, module in list(model.named_modules()):
        if scheme == "none" or id(module) in left or not quantizable(module) or module.weight.dim() != 2:
            continue
        weight: Tensor = module.weight
        try:
            if id(weight) not in done:
                matrix = weight.t() if is_conv1d(module) else weight
                done[id(weight)] = QuantizedWeight.from_weight(matrix, scheme, block_size), weight
            put_(module, done[id(weight)][0])
        except (ValueError, TypeError) as error:
            raise BackboneError(f"cannot quantise {path!r}: {error}; name it in skip_modules") from error
    return model.requires_grad_(False)


def cast_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put what is not quantised into ``dtype``. Buffers keep their type: rotary frequencies need their 32 bits."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.dtype = dtype
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    return model


def put_(module: nn.Module, quantized: QuantizedWeight, *, checked: bool = False) -> None:
    if isinstance(module, nn.Embedding):
        quantize_embedding_(module, quantized)
    else:
        quantize_linear_(module, quantized, checked=checked)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The distinct quantised matrices of ``model``, each under the path of the first layer that uses it."""
    found: dict[int, tuple[str, QuantizedWeight]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            found.setdefault(id(module.quantized), (path, module.quantized))
    return dict(found.values())


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A fingerprint for every quantised matrix, by path. Any change of a code or scale changes it."""
    return {path: quantized.fingerprint() for path, quantized in quantized_layers(model).items()}


def fingerprint(model: nn.Module) -> str:
    """One fingerprint of all quantised matrices; for a model with none, of its parameters' names and shapes."""
    marks = fingerprints(model) or {name: str(tuple(p.shape)) for name, p in model.named_parameters()}
    text = "\n".join(f"{path} {mark}" for path, mark in sorted(marks.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
