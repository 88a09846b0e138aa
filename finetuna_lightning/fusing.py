"""Puts the fused parts of ``nn.blocks`` before a transformers model's own: RMSNorm, SwiGLU, attention inputs, and whole
decoder layers of these.

Which modules have that form is told by their children's names, as Llama, Mistral, Qwen and their kin have them, and
then found out by trying: one of each class computes a few tokens both ways, and what does not agree is left alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetuna_lightning.nn.blocks import FusedAttention, FusedLayer, FusedNorm, FusedSwiGLU
from finetuna_lightning.nn.packing import packed_lengths
from finetuna_lightning.nn.quantized import QuantizedLinear, QuantizedWeight
from finetuna_lightning.ops import cpu_attention
from finetuna_lightning.ops.library import has_joint_kernels

_ATTENTIONS = ("sdpa", "eager", "finetuna_sdpa", "finetuna_eager")  # others want more than this one passes on
_AGREES = 0.03  # of the norm: what two roundings of one 16-bit computation may be apart
_TOKENS = 24


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    name = module.config._attn_implementation
    plain = name.endswith("sdpa") and mask is None and packed_lengths() is None and getattr(module, "is_causal", False)
    if plain and not options["dropout"] and cpu_attention.takes(query, key, value):
        return cpu_attention.attend(query, key, value, options["scaling"]), None
    own = sys.modules[_own_class(module).__module__].eager_attention_forward if name == "eager" else None
    return (own or ALL_ATTENTION_FUNCTIONS[name])(module, query, key, value, mask, **options)


def _own_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))


def _is_norm(module: nn.Module) -> bool:
    eps, weight = getattr(module, "variance_epsilon", None), module._parameters.get("weight")
    return isinstance(eps, float) and weight is not None and weight.dim() == 1 and not list(module.children())


def _has_linear(module: nn.Module, *names: str) -> bool:
    return all(isinstance(module._modules.get(name), QuantizedLinear) for name in names)


def _is_swiglu(module: nn.Module) -> bool:
    act = getattr(module, "act_fn", None)
    return _has_linear(module, "gate_proj", "up_proj", "down_proj") and "SiLU" in type(act).__name__


def _is_attention(module: nn.Module) -> bool:
    if not _has_linear(module, "q_proj", "k_proj", "v_proj", "o_proj") or len(list(module.children())) != 4:
        return False
    known = isinstance(getattr(module, "head_dim", None), int) and isinstance(getattr(module, "scaling", None), float)
    return known and getattr(module.config, "_attn_implementation", None) in _ATTENTIONS


_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def _is_layer(module: nn.Module) -> bool:
    """Of parts that are fused already."""
    if set(module._modules) != set(_LAYER):
        return False
    norm, attention, second, mlp = (module._modules[name] for name in _LAYER)
    fused = isinstance(attention, FusedAttention) and isinstance(mlp, FusedSwiGLU)
    return fused and isinstance(norm, FusedNorm) and isinstance(second, FusedNorm)


_FORMS: tuple[tuple[Callable[[nn.Module], bool], type], ...] = (
    (_is_norm, FusedNorm), (_is_swiglu, FusedSwiGLU), (_is_attention, FusedAttention),
    (_is_layer, FusedLayer),
)  # fmt: skip
_FUSED: dict[tuple[type, type], type] = {}


def fuse_(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Put fused parts before the model's own, in place, for computing on ``device`` in ``dtype``; how many of each
    class. Does nothing where the kernels do not run. A second call changes nothing."""
    on_cpu = device.type == "cpu"
    known = dtype in ((torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16, torch.float16))
    if not known or not (on_cpu or has_joint_kernels(device)):
        return {}
    agreeing: dict[tuple[type, type], bool] = {}
    done: dict[str, int] = {}
    for module in [*model.modules()][::-1]:  # a layer's parts before the layer
        form = next((form for fits, form in _FORMS if fits(module)), None)
        cls = type(module)
        if form is None or issubclass(cls, form) or (on_cpu and form is FusedLayer):
            continue
        if (cls, form) not in agreeing:
            agreeing[cls, form] = _agree(module, form, device, dtype)
        if agreeing[cls, form]:
            _put(module, form)
            done[cls.__name__] = done.get(cls.__name__, 0) + 1
    return done


def _put(module: nn.Module, form: type) -> None:
    cls = type(module)
    if (form, cls) not in _FUSED:
        _FUSED[form, cls] = type(f"{form.__name__}[{cls.__name__}]", (form, cls), {"__module__": cls.__module__})
    module.__class__ = _FUSED[form, cls]
    if form is FusedAttention:
        module.__dict__["finetuna_attend"] = _attend


@torch.no_grad()
def _agree(module: nn.Module, form: type, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a copy of ``module`` computes the same in front of its own forward as without."""
    layer = copy.deepcopy(module).to(device)
    for part in layer.modules():
        if isinstance(part, QuantizedWeight):
            part.dtype, part.compute = dtype, "16bit"
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(0)
    attention: Any = getattr(layer, "self_attn", layer)
    if form in (FusedAttention, FusedLayer):
        width = attention.q_proj.in_features
    else:
        width = layer.gate_proj.in_features if form is FusedSwiGLU else layer.weight.numel()  # type: ignore[union-attr, operator]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, arguments = random(1, _TOKENS, int(width)), {}
    if form in (FusedAttention, FusedLayer):
        arguments = {
            "position_embeddings": (random(1, _TOKENS, attention.head_dim), random(1, _TOKENS, attention.head_dim)),
            "attention_mask": None,
        }
    try:
        wanted = layer(x, **arguments)
        _put(layer, form)
        given = layer(x, **arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError):
        return False
    wanted, given = (out[0] if isinstance(out, tuple) else out for out in (wanted, given))
    return float((given.float() - wanted.float()).norm()) <= _AGREES * float(wanted.float().norm())
