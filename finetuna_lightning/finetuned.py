"""The API of the library ``finetuna``, without Lightning: take any module, ask for as many fine-tuned models of it as
you like, train each with an ordinary loop. All of them share the base's storage.

    prepare_base_model(base)                       # 8-bit, frozen, in place
    first, second = new_finetuned(base), new_finetuned(base, linear_config=LinearAdapterConfig(r=16))
    optimizer = torch.optim.AdamW(p for p in first.parameters() if p.requires_grad)
    first(input_ids).logits ...                    # no route to give: each model is one adapter
    torch_save(state_dict(first))                  # what differs from the base, and nothing else
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetuna_lightning.adapters import AdapterBank, can_carry_delta, matches, resolve_targets, tensor_bytes
from finetuna_lightning.backbone import quantize_model_, quantized_layers
from finetuna_lightning.configs import ALL_LINEAR
from finetuna_lightning.errors import ConfigError, TargetError, did_you_mean

_NAME = "finetuned"
_CHILD = "finetuna_adapters"


@dataclass(frozen=True)
class LinearAdapterConfig:
    """Deltas on linear layers: rank ``r``, scaling ``alpha / r``, dropout on their input, a bias inside the scaling."""

    r: int = 4
    alpha: float = 1
    dropout: float = 0.0
    bias: bool = True


@dataclass(frozen=True)
class EmbeddingAdapterConfig:
    """Deltas on embeddings: rank ``r``, scaling ``alpha / r``."""

    r: int = 4
    alpha: float = 1


def prepare_base_model(
    model: nn.Module, modules_not_to_quantize: Iterable[str] = ("lm_head",), do_not_quantize: bool = False
) -> nn.Module:
    """Freeze ``model`` and quantise it to ``int8``, in place; names that it does not have are no error.

    Returns:
        ``model``.
    """
    skip = [name for name in modules_not_to_quantize if any(matches(name, path) for path, _ in model.named_modules())]
    return quantize_model_(model, "none" if do_not_quantize else "int8", skip=skip)


def get_lora_adaptable_modules(model: nn.Module, target_modules: Iterable[str] | None = None) -> set[str]:
    """Paths of the layers that can carry a delta; with ``target_modules`` (suffixes, full paths, regular expressions),
    those of them that it names.

    Raises:
        TargetError: when an entry names no such layer.
    """
    if target_modules is not None:
        return set(resolve_targets(model, list(target_modules)))
    return {path for path, module in model.named_modules() if path and can_carry_delta(module)}


def new_finetuned(
    model: nn.Module,
    adapt_layers: Iterable[str] | None = None,
    plain_layers: Iterable[str] = ("lm_head",),
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig] | None = None,
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig] | None = None,
    modules_not_to_quantize: Iterable[str] = (),
    modules_not_to_freeze: Iterable[str] = (),
    do_not_quantize: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A fine-tuned model that shares every frozen tensor with ``model``.

    Args:
        model: any module; quantised first, in place, unless it is already or ``do_not_quantize``.
        adapt_layers: layers that carry deltas (suffixes, full paths, regular expressions); None: every linear layer but
            the output head.
        plain_layers: modules of which the result has a private copy, trained in full; names that ``model`` does not
            have are no error.
        embedding_config, linear_config: one configuration, or one for each name of ``adapt_layers``.
        modules_not_to_quantize, do_not_quantize: as in ``prepare_base_model``.
        modules_not_to_freeze: as ``plain_layers``: a private copy, trained in full.
        seed: of the initial values.

    Raises:
        TargetError: a name matches nothing, is both adapted and plain, or a per-module configuration leaves one out.
        ConfigError: a module named in ``modules_not_to_quantize`` is quantised already.
    """
    for path in quantized_layers(model):
        for name in modules_not_to_quantize:
            if matches(name, path):
                raise ConfigError(
                    f"{path!r} is quantised already: name it in prepare_base_model(modules_not_to_quantize=...)"
                )
    if not do_not_quantize and not quantized_layers(model):
        prepare_base_model(model, set(modules_not_to_quantize) | set(plain_layers))
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    clone = copy.deepcopy(model, memo=dict(shared))
    present = [path for path, _ in clone.named_modules()]
    plain = [name for name in plain_layers if any(matches(name, path) for path in present)]
    bank = AdapterBank(clone)
    targets = [ALL_LINEAR] if adapt_layers is None else list(adapt_layers)
    bank.add(
        _NAME, targets=targets, plain=[*plain, *modules_not_to_freeze], seed=seed,
        settings=_settings(clone, targets, linear_config, embedding_config),
    )  # fmt: skip
    bank.default_route = _NAME
    clone.add_module(_CHILD, bank)
    return clone


def _settings(model: nn.Module, targets: list[str], linear: Any, embedding: Any) -> dict[str, dict[str, Any]]:
    """By path, the delta's rank, alpha, dropout and bias."""
    chosen: dict[str, dict[str, Any]] = {}
    for path, module in resolve_targets(model, targets).items():
        embeds = isinstance(module, nn.Embedding)
        default = EmbeddingAdapterConfig() if embeds else LinearAdapterConfig()
        config: Any = (embedding if embeds else linear) or default
        if isinstance(config, Mapping):
            name = next((name for name in config if matches(name, path)), None)
            if name is None:
                kind, near = "embedding" if embeds else "linear", did_you_mean(path, config)
                raise TargetError(f"{kind}_config has no entry for {path!r}{near} (there are: {', '.join(config)})")
            config = config[name]
        chosen[path] = {"rank": config.r, "alpha": config.alpha}
        if not embeds:
            chosen[path] |= {"dropout": config.dropout, "bias": config.bias}
    return chosen


def state_dict(finetuned: nn.Module) -> dict[str, Tensor]:
    """What differs from the base: the deltas and the private copies."""
    prefix = f"{_CHILD}.{_NAME}."
    bank = _bank(finetuned)
    return {key.removeprefix(prefix): value for key, value in bank.state_dict(prefix=f"{_CHILD}.").items()}


def load_state_dict(finetuned: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Take what ``state_dict`` gave. With ``strict`` every name must be there and none left over."""
    return _bank(finetuned)[_NAME].load_state_dict(dict(state), strict=strict)


def get_model_mem_consumption(*models: nn.Module) -> int:
    """Bytes of parameters and buffers of ``models`` together, each storage once."""
    return tensor_bytes(*models)


def _bank(finetuned: nn.Module) -> AdapterBank:
    bank = getattr(finetuned, _CHILD, None)
    if not isinstance(bank, AdapterBank):
        raise ConfigError(f"{type(finetuned).__name__} was not made by new_finetuned")
    return bank
