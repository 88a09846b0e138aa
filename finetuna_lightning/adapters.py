"""Adapters, and the bank that holds them beside the backbone they share.

The bank owns the adapters and the backbone owns none: adding or removing one registers nothing in the backbone, whose
layers only gain or lose a forward that asks the bank."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from finetuna_lightning.configs import ALL_LINEAR, check_adapter_name, check_adapter_names
from finetuna_lightning.errors import CheckpointError, ConfigError, TargetError, did_you_mean
from finetuna_lightning.nn.lora import Delta, LoRAEmbedding, LoRALinear
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear, dequantize_, is_conv1d
from finetuna_lightning.nn.routing import (
    Route,
    forget,
    is_routed,
    route_,
    routed,
    unroute_,
)
from finetuna_lightning.peft_io import AdapterFolder, load_folder, save_folder
from finetuna_lightning.seeds import stream_seed

_EXPERT_NAMES = {"experts", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}


# ---- naming modules -------------------------------------------------------------------------------------------------


def can_carry_delta(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, a ``Conv1D`` or an embedding that its parent calls."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` names ``path``: the full path, a suffix of whole components, or a regular expression for all
    of it."""
    if path == pattern or path.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise TargetError(f"{pattern!r} is neither a module's name nor a regular expression: {error}") from None


def match_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules that ``pattern`` names, each once, under its first path in ``model``."""
    first = {id(module): path for path, module in model.named_modules()}
    found = (m for path, m in model.named_modules(remove_duplicate=False) if path and matches(pattern, path))
    return {first[id(module)]: module for module in found}


def _expert_target(model: nn.Module, pattern: str) -> TargetError:
    path = next(path for path, p in model.named_parameters() if p.dim() == 3)
    return TargetError(
        f"{pattern!r} names expert weights, which are one 3-D parameter ({path}) and no linear layers: deltas on "
        f"experts "
        "are not supported; target the attention projections instead"
    )


def _no_match(model: nn.Module, pattern: str, wanted: str) -> TargetError:
    if pattern.rsplit(".", 1)[-1] in _EXPERT_NAMES and any(p.dim() == 3 for p in model.parameters()):
        return _expert_target(model, pattern)
    names = {
        part for path, m in model.named_modules() if can_carry_delta(m) for part in (path.rsplit(".", 1)[-1], path)
    }
    short = sorted({path.rsplit(".", 1)[-1] for path in names if not path.rsplit(".", 1)[-1].isdigit()})
    return TargetError(f"no {wanted} matches {pattern!r}{did_you_mean(pattern, names)} (there are: {', '.join(short)})")


def output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head, where the model names one (transformers' ``get_output_embeddings``)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def resolve_targets(model: nn.Module, patterns: Sequence[str], excluded: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers that ``patterns`` name, by path, in the model's order.

    Args:
        model: the backbone, also on the meta device.
        patterns: suffixes, full paths, regular expressions, or ``all-linear``: every linear layer but the output head.
        excluded: paths of modules trained in full; what lies in them is not part of ``all-linear``.

    Raises:
        TargetError: when one of the patterns matches no layer that can carry a delta.
    """
    found: set[int] = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            head = output_head(model)
            layers = {
                path: module
                for path, module in model.named_modules()
                if can_carry_delta(module)
                and not isinstance(module, nn.Embedding)
                and module is not head
                and not any(path == name or path.startswith(name + ".") for name in excluded)
            }
        else:
            everything = match_modules(model, pattern)
            layers = {path: module for path, module in everything.items() if can_carry_delta(module)}
            if everything and not layers:
                path, module = next(iter(everything.items()))
                inside = sorted({p.rsplit(".", 1)[-1] for p, m in module.named_modules() if p and can_carry_delta(m)})
                experts = any(p.dim() == 3 for p in module.parameters())
                if experts:
                    raise _expert_target(model, pattern)
                raise TargetError(
                    f"{pattern!r} names {path!r}, a {type(module).__name__}, which is no linear layer or embedding"
                    + (f"; inside it are: {', '.join(inside)}" if inside else "")
                )
        if not layers:
            raise _no_match(model, pattern, "layer")
        found |= {id(module) for module in layers.values()}
    return {path: module for path, module in model.named_modules() if id(module) in found}


def resolve_plain(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules trained in full that ``patterns`` name, by path; outermost only.

    Raises:
        TargetError: when one of the patterns matches nothing.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        modules = match_modules(model, pattern)
        if not modules:
            raise _no_match(model, pattern, "module")
        for path, module in modules.items():
            own = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            if own or type(module).forward is nn.Module.forward:
                kind, inside = type(module).__name__, ", ".join(name for name, _ in module.named_children())
                raise TargetError(
                    f"{pattern!r} names {path!r}, a {kind} that nobody calls, so a copy of it would not be trained: "
                    + (f"name what is in it ({inside})" if inside else "name the module that holds it")
                )
        found |= modules
    return {p: m for p, m in found.items() if not any(p != q and p.startswith(q + ".") for q in found)}


# ---- one adapter ----------------------------------------------------------------------------------------------------


def _key(path: str) -> str:
    return path.replace(".", "/")  # a ModuleDict's keys have no dots


def _path(key: str) -> str:
    return key.replace("/", ".")


class Adapter(nn.Module):
    """Everything that one fine-tune owns: its deltas and its private copies of modules trained in full.

    Made by ``AdapterBank.add``.

    Args:
        name: of the adapter in its bank.
        rank, alpha, dropout, bias: of every delta.
        seed: of its random streams.
    """

    def __init__(self, name: str, rank: int, alpha: float, dropout: float, bias: bool, seed: int) -> None:
        super().__init__()
        self.name, self.rank, self.alpha, self.dropout, self.bias, self.seed = name, rank, alpha, dropout, bias, seed
        self.calls = 0  # forward passes in training: the position in the dropout stream
        self.target_modules: list[str] = []  # as a PEFT reader should be told
        self.plain_modules: list[str] = []
        self.origin: dict[str, str | None] = {"task": None, "backbone": None, "revision": None, "fingerprint": None}
        self.conv1d = False
        self.deltas = nn.ModuleDict()
        self.plain = nn.ModuleDict()

    @property
    def nbytes(self) -> int:
        """Bytes of this adapter's weights."""
        return tensor_bytes(self)

    def folder(self) -> AdapterFolder:
        """This adapter as PEFT's files hold it. The tensors are the adapter's own, not copies."""
        plain: dict[str, Tensor] = {}
        for key, module in self.plain.items():
            transposed = {path for path, m in module.named_modules() if getattr(m, "finetuna_conv1d", False)}
            for name, tensor in module.state_dict().items():
                owner, _, leaf = name.rpartition(".")
                turned = leaf == "weight" and owner in transposed
                plain[f"{_path(key)}.{name}"] = tensor.t() if turned else tensor
        own: dict[str, Any] = {_path(key): delta for key, delta in self.deltas.items()}
        deltas: dict[str, dict[str, Tensor]] = {path: dict(delta.named_parameters()) for path, delta in own.items()}
        if self.bias:  # the format has one for all: a delta without gets one of zeros
            for path, delta in own.items():
                if isinstance(delta, LoRALinear) and delta.lora_bias is None:
                    deltas[path]["lora_bias"] = delta.lora_B.new_zeros(delta.shape[1])
        return AdapterFolder(
            rank=self.rank, alpha=self.alpha, dropout=self.dropout, bias=self.bias,
            target_modules=self.target_modules, plain_modules=self.plain_modules, deltas=deltas, plain=plain,
            task=self.origin["task"], backbone=self.origin["backbone"], revision=self.origin["revision"],
            fingerprint=self.origin["fingerprint"], fan_in_fan_out=self.conv1d,
            ranks={path: delta.rank for path, delta in own.items() if delta.rank != self.rank},
            alphas={path: delta.alpha for path, delta in own.items() if delta.alpha != self.alpha},
        )  # fmt: skip

    def save_pretrained(self, path: str | Path) -> Path:
        """Write this adapter as a PEFT folder, beside and renamed. Returns the folder's path."""
        return save_folder(path, self.folder())

    def load_folder(self, folder: AdapterFolder) -> None:
        """Take the weights of ``folder``.

        Raises:
            CheckpointError: when its tensors are not exactly this adapter's, in name and shape. Nothing is changed
            then.
        """
        mine, theirs = _flat(self.folder()), _flat(folder)
        missing, unexpected = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
        shapes = [
            f"{k} is {tuple(theirs[k].shape)}, not {tuple(mine[k].shape)}"
            for k in sorted(mine.keys() & theirs.keys())
            if mine[k].shape != theirs[k].shape
        ]
        if missing or unexpected or shapes:
            raise CheckpointError(
                f"the folder does not hold adapter {self.name!r}: missing {missing}, unexpected {unexpected}, "
                f"shapes {shapes}"
            )
        with torch.no_grad():
            for key, tensor in mine.items():
                tensor.copy_(theirs[key])


def _flat(folder: AdapterFolder) -> dict[str, Tensor]:
    return folder.plain | {f"{path}.{part}": t for path, parts in folder.deltas.items() for part, t in parts.items()}


def tensor_bytes(*modules: nn.Module) -> int:
    """Bytes of all distinct storages among the parameters and buffers of ``modules``."""
    seen: dict[tuple[torch.device, int], int] = {}
    for module in modules:
        for _, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.device.type != "meta":
                seen[tensor.device, tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


# ---- the bank -------------------------------------------------------------------------------------------------------


class AdapterBank(nn.ModuleDict):
    """The adapters of one backbone: a ``ModuleDict`` with one child for each fine-tune.

    Args:
        backbone: any module; its parameters are frozen. The bank refers to it and does not own it.
        origin: what saved adapters say they were trained over: ``task``, ``backbone``, ``revision``, ``fingerprint``.

    Example:
        bank = AdapterBank(model)
        bank.add("sql", rank=8, targets=["q_proj", "v_proj"])
        with bank.route(["sql", "sql"]):        # two rows
            logits = model(input_ids).logits
    """

    backbone: nn.Module

    def __init__(self, backbone: nn.Module, origin: dict[str, str | None] | None = None) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # by reference: not a child
        self.origin = origin or {"task": None, "backbone": None, "revision": None, "fingerprint": None}
        self.sole: str | None = None  # in a stand-alone fine-tuned model, its one adapter
        self.grad_wanted = False
        if any(is_routed(module) for module in backbone.modules()):
            raise ConfigError("this backbone has a bank already: add the adapters to that one")
        backbone.requires_grad_(False)

    def add(
        self,
        name: str,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = False,
        targets: Sequence[str] = (ALL_LINEAR,),
        plain: Sequence[str] = (),
        seed: int = 0,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        any_rank: bool = False,
    ) -> Adapter:
        """Add an adapter to the live bank; its weights stand where its layers' do.

        Args:
            name: of the adapter.
            rank, alpha, dropout, bias: of every delta, where ``settings`` says nothing else for its path.
            targets: layers that carry a delta (see ``resolve_targets``).
            plain: modules trained in full.
            seed: of its random streams.
            settings: by full path, other values of ``rank``, ``alpha``, ``dropout`` or ``bias``.
            any_rank: allow a rank larger than a layer's smaller side, which can learn no more than that side's.

        Raises:
            ConfigError: for a name that is taken or not allowed, or a rank larger than a target layer.
            TargetError: for a pattern that matches nothing, or a module both adapted and trained in full.
        """
        self._check_new_name(name)
        plain_paths = resolve_plain(self.backbone, plain)
        target_paths = resolve_targets(self.backbone, targets, plain_paths) if targets else {}
        own = {path: {"rank": rank, "alpha": alpha} | dict((settings or {}).get(path, {})) for path in target_paths}
        for path, module in target_paths.items():
            check_fit(own[path]["rank"], {path: module}, plain_paths, any_rank)
        adapter = Adapter(name, rank, alpha, dropout, bias, seed)
        adapter.origin = dict(self.origin)
        adapter.target_modules = self._short_names(target_paths)
        adapter.plain_modules = sorted(plain_paths)
        adapter.conv1d = any(is_conv1d(m) or getattr(m, "conv1d", False) for m in target_paths.values())
        for path, module in target_paths.items():
            adapter.deltas[_key(path)] = self._new_delta(adapter, path, module, own[path])
        memo: dict[int, Any] = {id(self): self}  # a routed layer refers to this bank; tied copies stay tied
        for path, module in plain_paths.items():
            adapter.plain[_key(path)] = self._private_copy(module, memo)
        self[name] = adapter
        self._route_layers()
        return adapter

    def adopt(self, name: str, adapter: Adapter) -> Adapter:
        """Add ``adapter``, which another bank over the same backbone made, under ``name``. Both banks then hold the
        same parameters: what is trained here is trained there.

        Raises:
            ConfigError: for a name that is taken or not allowed.
            TargetError: when this backbone lacks one of its modules, or has it in another shape.
        """
        self._check_new_name(name)
        paths = dict(self.backbone.named_modules())
        for key, delta in adapter.deltas.items():
            layer = paths.get(_path(key))
            if layer is None or not can_carry_delta(layer) or layer_shape(layer) != delta.shape:
                raise TargetError(
                    f"adapter {adapter.name!r} has a delta for {_path(key)!r}, which this backbone has not"
                )
        for key in adapter.plain:
            if _path(key) not in paths:
                raise TargetError(f"adapter {adapter.name!r} trains {_path(key)!r}, which this backbone has not")
        twin = Adapter(name, adapter.rank, adapter.alpha, adapter.dropout, adapter.bias, adapter.seed)
        twin.target_modules, twin.plain_modules = list(adapter.target_modules), list(adapter.plain_modules)
        twin.origin, twin.conv1d, twin.calls = dict(self.origin), adapter.conv1d, adapter.calls
        twin.deltas, twin.plain = adapter.deltas, adapter.plain
        self[name] = twin
        self._route_layers()
        return twin

    def load(self, name: str, path: str | Path, seed: int = 0) -> Adapter:
        """Add an adapter from a PEFT folder.

        Raises:
            CheckpointError: when a tensor is missing, left over, of another shape or not finite, or the folder says
            that
                it was trained over another backbone.
        """
        folder = load_folder(path)
        known, given = self.origin.get("fingerprint"), folder.fingerprint
        if known and given and known != given:
            raise CheckpointError(
                f"{path} was trained over backbone {folder.backbone} (fingerprint {given}), but this one is "
                f"{self.origin.get('backbone')} (fingerprint {known})"
            )
        paths = dict(self.backbone.named_modules(remove_duplicate=False))
        lost = [path for path in folder.deltas if path not in paths]
        if lost:
            raise CheckpointError(f"{path} has deltas for modules that this backbone lacks: {lost}")
        for key, tensor in folder.base.items():
            _check_base(f"{path}: {'.base_layer.'.join(key.rsplit('.', 1))}", self.backbone, key, tensor)
        adapter = self.add(
            name, rank=folder.rank, alpha=folder.alpha, dropout=folder.dropout, bias=folder.bias, any_rank=True,
            settings={p: folder.scaling(p) for p in folder.deltas},
            targets=[f"(?:{re.escape(path)})" for path in folder.deltas],  # these paths, and none that ends like one
            plain=[f"(?:{re.escape(path)})" for path in _owners(paths, folder)],
            seed=seed,
        )  # fmt: skip
        try:
            adapter.load_folder(folder)
        except CheckpointError:
            self.remove(name)
            raise
        return adapter

    def remove(self, name: str) -> Adapter:
        """Take an adapter out of the live bank; layers that no other one changes get their plain forward back."""
        if name not in self:
            raise ConfigError(f"there is no adapter {name!r}{did_you_mean(name, self)}")
        adapter = self[name]
        del self._modules[name]
        self._route_layers()
        forget(self)
        assert isinstance(adapter, Adapter)
        return adapter

    def adapters(self) -> Iterator[Adapter]:
        """The adapters, in the order in which they were added."""
        for module in self.values():
            assert isinstance(module, Adapter)
            yield module

    def route(self, names: Sequence[str], *, training: bool = False) -> AbstractContextManager[None]:
        """Within, row i of every batch belongs to adapter ``names[i]``. ``training`` turns the adapters' dropout on."""
        return self.follow(Route.of_rows(names), training=training)

    def follow(self, route: Route, *, training: bool = False) -> AbstractContextManager[None]:
        """As ``route``, for a route made by hand."""
        for name in set(route.names):
            if name not in self:
                raise ConfigError(
                    f"there is no adapter {name!r}{did_you_mean(name, self)} (there are: {', '.join(self)})"
                )
        if training:
            seeds = {name: self._dropout_seed(name) for name in dict.fromkeys(route.names)}
            route = replace(route, seeds=seeds)
        return routed(self, route)

    def bare(self) -> AbstractContextManager[None]:
        """Within, no adapter acts: the backbone alone."""
        return routed(self, None)

    @property
    def backbone_nbytes(self) -> int:
        """Bytes of the backbone's weights, each storage once."""
        return tensor_bytes(self.backbone)

    def delta(self, name: str, path: str) -> Delta | None:
        """The delta of adapter ``name`` on layer ``path``."""
        found: Any = self._adapter(name).deltas._modules.get(_key(path))
        return found  # type: ignore[no-any-return]

    def deltas(self, name: str) -> Iterable[nn.Module]:
        """All deltas of adapter ``name``."""
        found: Any = self._adapter(name).deltas._modules
        return found.values()  # type: ignore[no-any-return]

    def plain_copy(self, name: str, path: str) -> nn.Module | None:
        """The private copy that adapter ``name`` trains of module ``path``."""
        return self._adapter(name).plain._modules.get(_key(path))

    def _adapter(self, name: str) -> Adapter:
        adapter: Any = self._modules[name]
        return adapter  # type: ignore[no-any-return]

    def _check_new_name(self, name: str) -> None:
        check_adapter_name(name)
        if name in self:
            raise ConfigError(f"there is already an adapter {name!r}")
        check_adapter_names([*self, name])
        if hasattr(self, name):  # one that a library added to nn.Module
            raise ConfigError(f"adapter name {name!r} is not allowed: it is an attribute of the bank")
        if self.sole is None and any(name in path.split(".") for path, _ in self.backbone.named_modules()):
            raise ConfigError(f"adapter name {name!r} is the name of a backbone module; '{name}_adapter' would work")

    def _dropout_seed(self, name: str) -> int:
        adapter = self._adapter(name)
        adapter.calls += 1
        return stream_seed(adapter.seed, "dropout", adapter.calls)

    def _new_delta(self, adapter: Adapter, path: str, module: nn.Module, own: Mapping[str, Any]) -> Delta:
        generator = torch.Generator().manual_seed(stream_seed(adapter.seed, "init", path))
        delta: Delta
        if isinstance(module, nn.Embedding):
            delta = LoRAEmbedding(*layer_shape(module), own["rank"], own["alpha"], generator, module.padding_idx)
        else:
            dropout, bias = own.get("dropout", adapter.dropout), own.get("bias", adapter.bias)
            delta = LoRALinear(*layer_shape(module), own["rank"], own["alpha"], dropout, bias, generator)
        return delta.to(next(iter((*module.buffers(), *module.parameters()))).device)

    def _private_copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        private = copy.deepcopy(module, memo)
        for hooks in (private._forward_hooks, private._forward_pre_hooks):  # the routed module has them too
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):  # which make the weight
                    del hooks[key]
        for part in private.modules():
            if is_routed(part):
                unroute_(part)
            conv1d = isinstance(part, QuantizedLinear) and part.conv1d
            if isinstance(part, QuantizedLinear | QuantizedEmbedding):
                dequantize_(part, torch.promote_types(part.quantized.dtype, torch.float32))
            part.finetuna_conv1d = conv1d  # type: ignore[assignment]
            if isinstance(part, _NormBase):  # its statistics are of its parameters' type
                for name, buffer in part.named_buffers(recurse=False):
                    wide = torch.promote_types(buffer.dtype, torch.float32)
                    part._buffers[name] = buffer.to(wide) if buffer.is_floating_point() else buffer
        for parameter in private.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return private.requires_grad_(True)

    def _route_layers(self) -> None:
        """Route exactly the layers that some adapter changes."""
        adapted = {_path(key) for adapter in self.adapters() for key in adapter.deltas}
        plain = {_path(key) for adapter in self.adapters() for key in adapter.plain}
        for path, module in self.backbone.named_modules():
            if is_routed(module):
                unroute_(module)
            if path in adapted or path in plain:
                route_(module, self, path, deltas=path in adapted, plain=path in plain)
        for module in self.backbone.modules():
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
                _take_the_slow_path(module, any(is_routed(part) for part in module.modules()))

    def _short_names(self, targets: dict[str, nn.Module]) -> list[str]:
        """Last components where they name exactly ``targets``, as PEFT's readers expect; else full paths."""
        short = {path.rsplit(".", 1)[-1] for path in targets}
        named = {p for p, m in self.backbone.named_modules() if can_carry_delta(m) and p.rsplit(".", 1)[-1] in short}
        return sorted(short) if named == set(targets) else sorted(targets)


def _owners(paths: Mapping[str, nn.Module], folder: AdapterFolder) -> list[str]:
    """The modules trained in full whose tensors ``folder`` has; PEFT lists endings of their names, and lists more."""
    found: list[str] = []
    for end in folder.plain_modules:
        named = [path for path in paths if path and path.endswith(end)]
        having = [path for path in named if any(key.startswith(path + ".") for key in folder.plain)]
        found += having or [path for path in named if matches(end, path)]  # tensors that are missing
    return found


def _take_the_slow_path(module: nn.Module, slow: bool) -> None:
    """Have torch's own encoder call its layers in evaluation too, where its fast path reads their weights instead."""
    name = "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"
    if slow and not hasattr(module, "finetuna_fast_path"):
        module.finetuna_fast_path = getattr(module, name)
        setattr(module, name, 0)
    elif not slow and hasattr(module, "finetuna_fast_path"):
        setattr(module, name, module.finetuna_fast_path)
        del module.finetuna_fast_path


def _check_base(what: str, backbone: nn.Module, key: str, theirs: Tensor) -> None:
    """Raise when ``theirs`` is not the backbone's own tensor ``key``, but for what 8 bits cost."""
    owner, _, leaf = key.rpartition(".")
    mine = getattr(backbone.get_submodule(owner), leaf, None)
    theirs = theirs.float()
    if mine is None or mine.shape != theirs.shape or (mine.cpu().float() - theirs).norm() > 0.1 * theirs.norm():
        raise CheckpointError(f"{what} is not this backbone's: the adapter was trained over another one, or changed it")


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer or ``Conv1D``; of an embedding, (num_embeddings, dim)."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_conv1d(module):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def check_fit(rank: int, targets: dict[str, nn.Module], plain: dict[str, nn.Module], any_rank: bool = False) -> None:
    """Raise where a delta of ``rank`` does not fit one of ``targets``, or one of them lies in a module trained in
    full."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"adapter.rank must be an integer >= 1, not {rank!r}")
    for path, module in targets.items():
        inside = next((name for name in plain if path == name or path.startswith(name + ".")), None)
        if inside is not None:
            raise TargetError(f"{path!r} is both adapted and trained in full (plain module {inside!r}): choose one")
        if rank > min(layer_shape(module)) and not any_rank:
            features = " x ".join(str(size) for size in layer_shape(module))
            raise ConfigError(
                f"adapter.rank {rank} is larger than layer {path!r} ({features}): use at most "
                f"{min(layer_shape(module))}, or "
                "leave that layer out of target_modules"
            )
