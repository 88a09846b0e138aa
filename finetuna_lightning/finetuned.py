"""The API of the library ``finetuna``, without Lightning: take any module, ask for as many fine-tuned models of it as
you like, train each with an ordinary loop. All of them share the base's storage.

    prepare_base_model(base)                                             # 8-bit, frozen, in place
    first = new_finetuned(base)
    second = new_finetuned(base, adapt_layers={"q_proj", "v_proj"}, linear_config=LinearAdapterConfig(r=16))
    optimizer = torch.optim.AdamW(first.parameters())                    # what it trains, and nothing else
    first.backward(first(input_ids, labels=labels).loss)
    safetensors.torch.save_file(state_dict(first), "first.safetensors")  # what differs from the base
    second.save_pretrained("second")                                     # a PEFT folder

A fine-tuned model is a copy of the base's module tree over the base's storage, and an ``AdapterBank`` with one adapter.
It keeps the base's class (``generate`` and the rest work) behind ``Finetuned``, which says what is its own."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from finetuna_lightning.adapters import (
    Adapter,
    AdapterBank,
    can_carry_delta,
    match_modules,
    matches,
    resolve_targets,
    tensor_bytes,
)
from finetuna_lightning.backbone import fingerprint, quantize_model_, quantized_layers
from finetuna_lightning.errors import CheckpointError, ConfigError, RouteError, TargetError, did_you_mean
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear
from finetuna_lightning.nn.routing import is_routed, unroute_

HEAD = frozenset({"lm_head"})  # in a default, a module that need not exist
_NAME = "finetuned"
_CHILD = "finetuna_adapters"


@dataclass(frozen=True)
class LinearAdapterConfig:
    """Deltas on linear layers: rank ``r``, scaling ``alpha / r``, dropout on their input, a bias inside the scaling."""

    r: int = 4
    alpha: float = 1
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        _check_config(self)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"LinearAdapterConfig.dropout must be a number >= 0 and < 1, not {self.dropout!r}")


@dataclass(frozen=True)
class EmbeddingAdapterConfig:
    """Deltas on embeddings: rank ``r``, scaling ``alpha / r``."""

    r: int = 4
    alpha: float = 1

    def __post_init__(self) -> None:
        _check_config(self)


def _check_config(config: LinearAdapterConfig | EmbeddingAdapterConfig) -> None:
    kind, r, alpha = type(config).__name__, config.r, config.alpha
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"{kind}.r must be an integer >= 1, not {r!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ConfigError(f"{kind}.alpha must be a number > 0, not {alpha!r}")


# ---- the base -------------------------------------------------------------------------------------------------------


class _Family:
    """The base and its fine-tuned models, as long as they live; one object for all their copies."""

    def __init__(self) -> None:
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Family:
        return self

    def __reduce__(self) -> Any:
        return _Family, ()  # a base that is pickled starts a family of its own


def prepare_base_model(
    model: nn.Module,
    modules_not_to_quantize: Iterable[str] = HEAD,
    do_not_quantize: bool = False,
    scheme: str = "int8",
    block_size: int = 64,
) -> nn.Module:
    """Freeze ``model`` and quantise its linear layers, ``Conv1D`` and embeddings, in place.

    Args:
        model: any module.
        modules_not_to_quantize: modules to leave as they are: suffixes, full paths, regular expressions. By default the
            head, if there is one. A layer that shares its weight with one of them (a tied embedding) stays too.
        do_not_quantize: freeze only.
        scheme, block_size: the 8-bit storage: ``int8``, ``int8-blockwise`` (arXiv 2110.02861, as the original) or
            ``fp8``.

    Returns:
        ``model``.

    Raises:
        TargetError: a name matches nothing.
        ConfigError: a module that is to stay is quantised already, or in another scheme.
    """
    _refuse_finetuned(model)
    for path, quantized in quantized_layers(model).items():
        if quantized.scheme != scheme and not do_not_quantize:
            raise ConfigError(f"{path!r} is quantised already, to {quantized.scheme}: load the base again for {scheme}")
    names = _names("modules_not_to_quantize", modules_not_to_quantize)
    skip = [name for name in names if modules_not_to_quantize is not HEAD or match_modules(model, name)]
    if modules_not_to_quantize is not HEAD:
        _refuse_quantized(model, skip)
    quantize_model_(model, "none" if do_not_quantize else scheme, block_size, skip)
    if not hasattr(model, "finetuna_family"):
        model.__dict__["finetuna_family"] = _Family()
    model.__dict__["finetuna_family"].models.add(model)
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` went through ``prepare_base_model``, or holds 8-bit layers already."""
    return hasattr(model, "finetuna_family") or bool(quantized_layers(model))


def get_lora_adaptable_modules(
    model: nn.Module, target_modules: Iterable[str | type[nn.Module]] | None = None
) -> set[str]:
    """Names of the layers that can carry a delta, as ``adapt_layers`` takes them: last components (``q_proj``), or full
    paths where those would be numbers, or name others too.

    Args:
        model: any module, quantised or not.
        target_modules: only these: suffixes, full paths, regular expressions, or classes of layers.

    Raises:
        TargetError: when a name matches no such layer.
    """
    everything = {path: module for path, module in model.named_modules() if path and can_carry_delta(module)}
    found = everything
    if target_modules is not None:
        given = [target_modules] if isinstance(target_modules, str | type) else list(target_modules)
        classes = tuple(target for target in given if isinstance(target, type))
        named = resolve_targets(model, _names("target_modules", [t for t in given if not isinstance(t, type)]))
        found = {p: module for p, module in everything.items() if p in named or isinstance(module, classes)}
    others = {path.rsplit(".", 1)[-1] for path in everything.keys() - found.keys()}
    ends = {path: path.rsplit(".", 1)[-1] for path in found}
    return {path if end.isdigit() or end in others else end for path, end in ends.items()}


# ---- a fine-tuned model ---------------------------------------------------------------------------------------------


def new_finetuned(
    model: nn.Module,
    adapt_layers: Iterable[str] | None = None,
    plain_layers: Iterable[str] = HEAD,
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig] | None = None,
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig] | None = None,
    modules_not_to_quantize: Iterable[str] = frozenset(),
    modules_not_to_freeze: Iterable[str] = frozenset(),
    do_not_quantize: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """A fine-tuned model (``Finetuned``) that shares every frozen tensor with ``model``.

    Names are suffixes of whole components (``q_proj``), full paths, or regular expressions for all of a path.

    Args:
        model: any module. One that has not been through ``prepare_base_model`` goes through it here, in place.
        adapt_layers: layers that carry deltas; None: every linear layer, ``Conv1D`` and embedding that is not plain.
        plain_layers: modules of which the result has a private copy, trained in full. By default the head, if there is
            one.
        embedding_config, linear_config: one configuration, or one for each adapted layer by name; where several names
            fit a layer, the longest counts.
        modules_not_to_quantize: layers to leave frozen in their own type; they may carry deltas.
        modules_not_to_freeze: as ``plain_layers``.
        do_not_quantize: quantise nothing.
        seed: of the deltas' initial values; None: drawn from torch's generator (``torch.manual_seed``).

    Raises:
        TargetError: a name matches nothing, is both adapted and plain, or a configuration by name leaves one out.
        ConfigError: a layer is to be plain, or left as it is, that is quantised already.
    """
    _refuse_finetuned(model)
    adapt = None if adapt_layers is None else _names("adapt_layers", adapt_layers)
    kept = _names("modules_not_to_quantize", modules_not_to_quantize)
    plain = _plain_names(model, plain_layers) + _names("modules_not_to_freeze", modules_not_to_freeze)
    for pattern in (*kept, *plain):
        if not match_modules(model, pattern):
            raise TargetError(f"no module matches {pattern!r}{did_you_mean(pattern, _ends(model))}")
    targets = _targets(model, adapt, plain)
    settings = _settings(targets, linear_config, embedding_config)  # whatever is wrong shows before anything changes
    _refuse_quantized(model, [*kept, *plain])
    if not hasattr(model, "finetuna_family"):
        prepare_base_model(model, {*kept, *plain}, do_not_quantize or bool(quantized_layers(model)))
    drawn = int(torch.randint(2**62, ())) if seed is None else seed
    clone, bank = _clone(model)
    common = Counter((own["rank"], own["alpha"]) for own in settings.values()).most_common(1)
    rank, alpha = common[0][0] if common else (LinearAdapterConfig.r, LinearAdapterConfig.alpha)
    dropout = max((own.get("dropout", 0.0) for own in settings.values()), default=0.0)
    bank.add(
        _NAME, rank=rank, alpha=alpha, dropout=dropout, bias=any(own.get("bias") for own in settings.values()),
        targets=[_exactly(path) for path in settings], plain=plain, seed=drawn, settings=settings, any_rank=True,
    )  # fmt: skip
    return _as_base(clone, model)


def load_finetuned(model: nn.Module, path: str | Path) -> nn.Module:
    """The fine-tuned model that ``save_pretrained``, PEFT or ``AdapterCheckpoint`` wrote to the folder ``path``, over
    the base ``model`` (see ``new_finetuned``).

    Raises:
        CheckpointError: the folder is not complete, or of another backbone.
    """
    _refuse_finetuned(model)
    if not hasattr(model, "finetuna_family"):
        prepare_base_model(model, do_not_quantize=bool(quantized_layers(model)))
    clone, bank = _clone(model)
    bank.origin["fingerprint"] = _fingerprint(model)
    bank.load(_NAME, path)
    return _as_base(clone, model)


def finetuned_from_bank(bank: AdapterBank, name: str) -> nn.Module:
    """Adapter ``name`` of ``bank`` as a stand-alone fine-tuned model: it shares the backbone's storage and the
    adapter's own parameters, so that what is trained here is trained there.

    Raises:
        ConfigError: for a name that the bank has not.
    """
    if name not in bank:
        raise ConfigError(f"there is no adapter {name!r}{did_you_mean(name, bank)} (there are: {', '.join(bank)})")
    adapter = bank[name]
    assert isinstance(adapter, Adapter)
    if not hasattr(bank.backbone, "finetuna_family"):
        prepare_base_model(bank.backbone, do_not_quantize=True)
    clone, own = _clone(bank.backbone)
    own.adopt(_NAME, adapter)
    return _as_base(clone, bank.backbone)


def adapter_of(finetuned: nn.Module) -> Adapter:
    """The adapter of a fine-tuned model, as ``AdapterBank.adopt`` takes it.

    Raises:
        ConfigError: for a module that ``new_finetuned`` did not make.
    """
    if not isinstance(finetuned, Finetuned):
        raise ConfigError(f"{type(finetuned).__name__} was not made by new_finetuned")
    adapter = finetuned.finetuna_adapters[_NAME]
    assert isinstance(adapter, Adapter)
    return adapter


def shares_base(finetuned: nn.Module, model: nn.Module) -> bool:
    """Whether the frozen tensors of ``finetuned`` are those of ``model``: the same storage, or the same values."""
    theirs = dict(_tensors(model))
    mine = dict(_frozen(finetuned))
    return mine.keys() == theirs.keys() and all(_alike(tensor, theirs[name]) for name, tensor in mine.items())


def state_dict(finetuned: nn.Module) -> dict[str, Tensor]:
    """What differs from the base: the deltas and the private copies, by their names in ``finetuned.state_dict()``."""
    adapter_of(finetuned)
    return {key: tensor for key, tensor in finetuned.state_dict().items() if key.startswith(_CHILD + ".")}


def load_state_dict(finetuned: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> Any:
    """``finetuned.load_state_dict``: take what ``state_dict`` gave. With ``strict`` every name must be there and none
    left over."""
    adapter_of(finetuned)
    return finetuned.load_state_dict(state, strict=strict)


def get_model_mem_consumption(*models: nn.Module) -> int:
    """Bytes of parameters and buffers of ``models`` together, each storage once."""
    return tensor_bytes(*models)


class Finetuned(nn.Module):
    """What every fine-tuned model is, beside its base's class."""

    finetuna_adapters: AdapterBank
    finetuna_family: _Family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.finetuna_adapters.grad_wanted = torch.is_grad_enabled()
        return super().__call__(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What this model trains: what an optimizer should be given. ``named_parameters`` has the frozen ones too.

        Frozen parameters of the root module itself come first, as they do among a wrapper's: ``AveragedModel`` and its
        kin walk both side by side.

        Raises:
            ConfigError: for a thawed parameter of the base, which all its models share.
        """
        for name, parameter in self.named_parameters(recurse=recurse):
            if name in self._parameters or (name.startswith(_CHILD + ".") and parameter.requires_grad):
                yield parameter
            if parameter.requires_grad and not name.startswith(_CHILD + "."):
                raise ConfigError(
                    f"{name!r} is the base's, which other models share, and requires grad: name its module in "
                    "new_finetuned(modules_not_to_freeze=...) to train a copy of it"
                )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """``loss.backward()``, and an error where the loss reaches nothing that this model trains.

        Raises:
            RouteError: no parameter of this model got a gradient.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        before = [_mark(parameter) for parameter in own.values()]
        if loss.requires_grad:
            loss.backward(*args, **kwargs)
        reached = [_mark(p) != mark for p, mark in zip(own.values(), before, strict=True)]
        if not any(reached):
            raise RouteError(
                "the loss does not depend on anything that this model trains: was it computed by another model, under "
                "torch.no_grad, or within reentrant gradient checkpointing (use_reentrant=False works)?"
            )
        if not self.__dict__.setdefault("finetuna_checked", False):
            self.__dict__["finetuna_checked"] = True
            missed = [name for name, there in zip(own, reached, strict=True) if not there]
            if missed:
                short = ", ".join(name.removeprefix(f"{_CHILD}.{_NAME}.") for name in missed[:3])
                warnings.warn(
                    f"{len(missed)} of {len(own)} parameters of this model got no gradient from its first loss ({short}"
                    f"{', ...' if len(missed) > 3 else ''}): is their module called in the forward pass?",
                    stacklevel=2,
                )

    def train(self, mode: bool = True) -> Finetuned:
        """As every module's; but frozen normalisation layers keep the base's running statistics."""
        super().train(mode)
        _keep_statistics(self)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take what is this model's own. Of the base's tensors, which a whole ``model.state_dict()`` has too, nothing
        is written.

        Raises:
            RuntimeError: with ``strict``, for missing and unexpected names; always, for another shape.
            CheckpointError: the state has tensors of another base.
        """
        return super().load_state_dict({**self._own_frozen(""), **state_dict}, strict=strict, assign=assign)

    def _own_frozen(self, prefix: str) -> dict[str, Tensor]:
        return {prefix + name: t for name, t in self.state_dict().items() if not name.startswith(_CHILD + ".")}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Also where a module around this one loads: torch calls this before it comes to the modules within."""
        for name, tensor in self._own_frozen(prefix).items():
            if name in state_dict:
                if not _alike(tensor, state_dict[name]):
                    raise CheckpointError(f"the state is of another base: {name!r} differs from this one's")
                state_dict[name] = tensor
        super()._load_from_state_dict(state_dict, prefix, *args)

    def requires_grad_(self, requires_grad: bool = True) -> Finetuned:
        """Freeze or thaw what is this model's own; the base stays frozen."""
        self.finetuna_adapters.requires_grad_(requires_grad)
        return self

    def save_pretrained(self, save_directory: str | Path, state_dict: Any = None, **options: Any) -> Path:
        """Write what differs from the base as a PEFT folder, beside and renamed; ``load_finetuned`` reads it.

        What transformers' ``Trainer`` gives beside the folder is taken and not needed. PEFT itself reads no folder that
        has deltas on an embedding and biases both.
        """
        unknown = options.keys() - {"safe_serialization", "max_shard_size", "is_main_process"}
        if unknown:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {min(unknown)!r}")
        adapter = adapter_of(self)
        source = getattr(getattr(self, "config", None), "_name_or_path", None) or None
        adapter.origin |= {"backbone": source, "fingerprint": _fingerprint(self)}
        return adapter.save_pretrained(save_directory)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Finetuned:
        """``.to``, ``.half`` and so on: a frozen tensor goes where a relative's is already by using the relative's
        storage."""
        home = {_key(tensor): name for name, tensor in _frozen(self) if tensor.numel()}
        relatives = [dict(_tensors(model)) for model in self.finetuna_family.models if model is not self]

        def moved(tensor: Tensor) -> Tensor:
            name = home.get(_key(tensor), "")
            out = fn(tensor)
            if ".quantized." in name:  # never cast, see QuantizedWeight
                out = tensor.to(out.device)
            if not name or (out.device, out.dtype) == (tensor.device, tensor.dtype) or out.device.type == "meta":
                return out
            there = (relative[name] for relative in relatives if name in relative)
            return next((other.detach() for other in there if _same(other, out)), out)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Finetuned:
        """A model of its own over the same base: frozen tensors are shared, as by ``new_finetuned``."""
        _share(self, memo)
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        memo[id(self.finetuna_adapters.backbone)] = weakref.proxy(new)
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.finetuna_family.models.add(new)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CheckpointError(
            "a fine-tuned model is not pickled: save state_dict(model) with safetensors, or use "
            "model.save_pretrained(folder)"
        )


# ---- how it is made -------------------------------------------------------------------------------------------------


def _clone(model: nn.Module) -> tuple[nn.Module, AdapterBank]:
    """A copy of the module tree over the same storage, and its empty bank."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if is_routed(module):  # the base of a bank too: without its adapters
            memo[id(module._finetuna_bank)] = module._finetuna_bank
    _share(model, memo)
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        if is_routed(module):
            unroute_(module)
    bank = AdapterBank(clone)
    bank.sole = _NAME
    clone.__class__ = _finetuned_class(type(clone))
    clone.add_module(_CHILD, bank)
    clone._modules = {_CHILD: bank, **clone._modules}  # first: see Finetuned.parameters
    bank.__dict__["backbone"] = weakref.proxy(clone)  # no cycle: a model that is let go is gone at once
    clone.__dict__["finetuna_family"].models.add(clone)
    return clone, bank


_CLASSES: dict[type, type] = {}


def _finetuned_class(cls: type) -> type:
    if cls not in _CLASSES:
        own: dict[str, Any] = {"__module__": cls.__module__}
        if isinstance(getattr(cls, "device", None), property):  # transformers asks the parameters, and means all
            own["device"] = property(lambda self: next(p.device for _, p in self.named_parameters()))
        if isinstance(getattr(cls, "dtype", None), property):
            own["dtype"] = property(
                lambda self: next(p.dtype for _, p in self.named_parameters() if p.is_floating_point())
            )
        if issubclass(cls, nn.Sequential):  # which calls its children one after another, the bank not among them
            own["__iter__"] = lambda self: (part for name, part in self._modules.items() if name != _CHILD)
            own["__len__"] = lambda self: len(self._modules) - 1
            own["__getitem__"] = _item
        _CLASSES[cls] = type(f"Finetuned[{cls.__name__}]", (Finetuned, cls), own)
    return _CLASSES[cls]


def _item(model: nn.Sequential, at: int | slice) -> nn.Module:
    parts = list(model)
    return nn.Sequential(*parts[at]) if isinstance(at, slice) else parts[at]


def _as_base(clone: nn.Module, model: nn.Module) -> nn.Module:
    """Put what is the clone's own into the mode of ``model``; its layers are in that of the base's layers."""
    clone.get_submodule(_CHILD).train(model.training)
    _keep_statistics(clone)
    return clone


def _keep_statistics(model: nn.Module) -> None:
    """Put frozen modules that update their own buffers in training into evaluation mode."""
    private = set(model.get_submodule(_CHILD).modules())
    for module in model.modules():
        if isinstance(module, _NormBase | _SpectralNorm) and module not in private:
            module.training = False


def _mark(parameter: nn.Parameter) -> tuple[int, int, int]:
    """What a gradient, or a step that a hook took at once, changes."""
    grad = parameter.grad
    return (0, 0, parameter._version) if grad is None else (id(grad), grad._version, parameter._version)


def _share(model: nn.Module, memo: dict[int, Any]) -> None:
    """Fill ``memo`` so that a deep copy of ``model`` has frozen tensors of its own over the same storage. They are
    other objects, so that a move or cast of the one model does not touch the other."""
    frozen = list(_frozen(model)) if isinstance(model, Finetuned) else list(_tensors(model))
    for _, tensor in frozen:
        same = tensor.detach()
        memo[id(tensor)] = nn.Parameter(same, requires_grad=False) if isinstance(tensor, nn.Parameter) else same
    for module in model.modules():
        for value in vars(module).values():  # a constant, or an activation that was kept
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names, a fine-tuned model's own left out."""
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if not name.startswith(_CHILD + "."):
            yield name, tensor


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in _tensors(model) if not tensor.requires_grad)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape) and torch.equal(one, other)


def _alike(mine: Tensor, theirs: Tensor) -> bool:
    """The same values, wherever they are."""
    if _key(mine) == _key(theirs):
        return True
    return mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine))


def _fingerprint(model: nn.Module) -> str | None:
    return fingerprint(model) if quantized_layers(model) else None


def _names(what: str, given: Iterable[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(name, str) and name for name in names):
        raise TargetError(f"{what} must be names of modules, suffixes or regular expressions, not {given!r}")
    return names


def _exactly(path: str) -> str:
    """A pattern for this path, and for none that ends like it."""
    return f"(?:{re.escape(path)})"


def _ends(model: nn.Module) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path, _ in model.named_modules() if path}


def _plain_names(model: nn.Module, plain_layers: Iterable[str]) -> list[str]:
    names = _names("plain_layers", plain_layers)
    if plain_layers is not HEAD:
        return names
    there = [name for name in names if match_modules(model, name)]
    frozen = [name for name in there if _quantized_in(model, name)]
    if frozen:
        warnings.warn(
            f"{', '.join(frozen)} is quantised already and stays frozen; plain_layers=() says that this is meant",
            stacklevel=3,
        )
    return [name for name in there if name not in frozen]


def _inside(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules that ``pattern`` names and what lies in them, by path."""
    chosen = {id(part) for module in match_modules(model, pattern).values() for part in module.modules()}
    return {path: module for path, module in model.named_modules() if id(module) in chosen}


def _quantized_in(model: nn.Module, pattern: str) -> list[str]:
    layers = _inside(model, pattern).items()
    return [path for path, module in layers if isinstance(module, QuantizedLinear | QuantizedEmbedding)]


def _targets(model: nn.Module, adapt: list[str] | None, plain: list[str]) -> dict[str, nn.Module]:
    """The layers to adapt, by path."""
    private = {path for pattern in plain for path in _inside(model, pattern)}
    if adapt is None:
        found = {p: m for p, m in model.named_modules() if p and can_carry_delta(m) and p not in private}
        if not found and not plain:
            raise TargetError(f"{type(model).__name__} has no linear layer or embedding inside it to adapt")
        return found
    if not adapt and not plain:
        raise TargetError("there is nothing to train: name a layer in adapt_layers or plain_layers")
    found = resolve_targets(model, adapt)
    for path in found.keys() & private:
        raise TargetError(
            f"{path!r} is both in adapt_layers and among the modules trained in full: choose one (plain_layers has "
            "'lm_head' by default; plain_layers=() has none)"
        )
    return found


def _refuse_finetuned(model: nn.Module) -> None:
    if isinstance(model, Finetuned):
        raise ConfigError("this is a fine-tuned model already: give the base that it was made from")


def _refuse_quantized(model: nn.Module, patterns: Iterable[str]) -> None:
    """Raise where a pattern names what is quantised: the weights that it had are gone."""
    for pattern in patterns:
        for path in _quantized_in(model, pattern)[:1]:
            raise ConfigError(
                f"{path!r} is quantised already and cannot be had back: load the base again, and name {pattern!r} in "
                "prepare_base_model(modules_not_to_quantize=...)"
            )


def _settings(targets: dict[str, nn.Module], linear: Any, embedding: Any) -> dict[str, dict[str, Any]]:
    """By path, the delta's rank, alpha, dropout and bias."""
    chosen: dict[str, dict[str, Any]] = {}
    kinds = {False: ("linear", linear, LinearAdapterConfig), True: ("embedding", embedding, EmbeddingAdapterConfig)}
    for embeds, (kind, given, cls) in kinds.items():
        paths = [path for path, module in targets.items() if isinstance(module, nn.Embedding) is embeds]
        by_path = _by_path(f"{kind}_config", cls() if given is None else given, paths, cls)
        for path, config in by_path.items():
            chosen[path] = {"rank": config.r, "alpha": config.alpha}
            if not embeds:
                chosen[path] |= {"dropout": config.dropout, "bias": config.bias}
    return {path: chosen[path] for path in targets}


def _by_path(what: str, given: Any, paths: list[str], cls: type) -> dict[str, Any]:
    """The configuration of every path; given one for all, or by name."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(paths, given)
    for config in by_name.values():
        if not isinstance(config, cls):
            raise ConfigError(
                f"{what} must be a {cls.__name__}, or one by name, not {config!r} ({type(config).__name__})"
            )
    if not isinstance(given, Mapping):
        return dict(by_name)
    named = {name: [path for path in paths if matches(name, path)] for name in by_name}
    for name, found in named.items():
        if not found:
            ends = {path.rsplit(".", 1)[-1] for path in paths}
            raise TargetError(f"{what}: {name!r} names no adapted layer{did_you_mean(name, ends)}")
    chosen: dict[str, Any] = {}
    for path in paths:
        name = max((name for name, found in named.items() if path in found), key=len, default=None)
        if name is None:
            raise TargetError(f"{what} has no entry for {path!r} (there are: {', '.join(by_name)})")
        chosen[path] = by_name[name]
    return chosen
