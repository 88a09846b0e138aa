"""The shared, frozen model: loaded straight into 8 bits, or any module quantised in place. The one room that knows
transformers.

A Hugging Face checkpoint is read by transformers itself (shards, renamed keys, merged experts), through a quantiser of
ours that turns each weight into codes as it arrives: the 16-bit model is never whole in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetuna_lightning.adapters import matches
from finetuna_lightning.configs import BackboneConfig
from finetuna_lightning.errors import BackboneError, FinetunaError, TargetError, did_you_mean
from finetuna_lightning.files import replacing_folder
from finetuna_lightning.nn.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    is_conv1d,
    quantizable,
    quantize_embedding_,
    quantize_linear_,
)
from finetuna_lightning.nn.routing import checkpoint_contexts

QUICKSTART = "quickstart"
QUICKSTART_FOLDER = Path(__file__).parent / "quickstart" / "model"
MANIFEST_NAME = "backbone.json"
WEIGHTS_NAME = "backbone.safetensors"
AUTO_CLASSES = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
}
_METHOD = "finetuna_lightning"


@dataclass(frozen=True)
class BackboneInfo:
    """What the data needs to know of the backbone, known before any weight is read.

    Args:
        tokenizer: the backbone's, or None where it has none.
        task: ``causal-lm``, ``sequence-classification`` or ``seq2seq-lm``.
        max_positions: the longest sequence, in tokens; None is unlimited.
        vocab_size: token ids are smaller than this; None is unknown.
        num_labels: classes of a sequence classifier.
    """

    tokenizer: Any
    task: str
    max_positions: int | None
    vocab_size: int | None
    num_labels: int


# ---- any module -----------------------------------------------------------------------------------------------------


def _skipped(model: nn.Module, skip: Iterable[str]) -> set[int]:
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
    BackboneConfig(QUICKSTART, scheme=scheme)  # checks it
    left = _skipped(model, skip)
    done: dict[int, tuple[QuantizedWeight, Tensor]] = {}
    for path, module in list(model.named_modules()):
        if scheme == "none" or id(module) in left or not quantizable(module) or module.weight.dim() != 2:
            continue
        weight: Tensor = module.weight
        try:
            if id(weight) not in done:
                matrix = weight.t() if is_conv1d(module) else weight
                done[id(weight)] = QuantizedWeight.from_weight(matrix, scheme, block_size), weight
            _put(module, done[id(weight)][0])
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


def _put(module: nn.Module, quantized: QuantizedWeight, *, checked: bool = False) -> None:
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


# ---- a checkpoint ---------------------------------------------------------------------------------------------------


def resolve_folder(name_or_path: str) -> str:
    """The folder of ``quickstart``, or the name as given.

    Raises:
        BackboneError: for what looks like a local path and is no folder with a config.json.
    """
    if name_or_path == QUICKSTART:
        return str(QUICKSTART_FOLDER)
    path = Path(name_or_path).expanduser()
    local = path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if not local:
        return name_or_path
    if not path.is_dir():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise BackboneError(f"backbone folder {name_or_path!r} does not exist{near}")
    if not (path / "config.json").is_file():
        raise BackboneError(f"backbone folder {name_or_path!r} has no config.json: it is no Hugging Face model folder")
    return str(path)


def read_config(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint, the backbone's own dropout set to zero (it is frozen).

    Raises:
        BackboneError: when there is no such checkpoint or transformers does not know its architecture.
    """
    folder = resolve_folder(name_or_path)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(f"backbone {name_or_path!r} cannot be read: {reason}") from error
    for key, value in list(vars(config).items()):
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def read_info(name_or_path: str, task: str, num_labels: int = 2, revision: str | None = None,
              trust_remote_code: bool = False) -> BackboneInfo:  # fmt: skip
    """Tokenizer and limits of a checkpoint. Reads its small files only."""
    config = read_config(name_or_path, revision, trust_remote_code)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokenizer = _read_tokenizer(resolve_folder(name_or_path), revision, trust_remote_code)
    limits = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    positions = None if getattr(text, "relative_attention_num_buckets", None) else next((n for n in limits if n), None)
    return BackboneInfo(tokenizer, task, positions, getattr(text, "vocab_size", None), num_labels)


def _read_tokenizer(folder: str, revision: str | None, trust_remote_code: bool) -> Any:
    files = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
    if Path(folder).is_dir() and not any(any(Path(folder).glob(pattern)) for pattern in files):
        return None  # transformers would make an empty one, of the class that fits the model
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, new parameters take no memory; buffers are real, since no checkpoint holds the non-persistent ones."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(config: Any, task: str, num_labels: int = 2, trust_remote_code: bool = False,
             attn_implementation: str | None = None) -> nn.Module:  # fmt: skip
    """The model of ``config`` with its parameters on the meta device: enough to resolve names and shapes.

    Raises:
        BackboneError: when the architecture has no model for ``task``.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if task == "sequence-classification":
        config.num_labels = num_labels
    try:
        with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            model: nn.Module = AUTO_CLASSES[task].from_config(config, **options)
    except ValueError as error:
        raise BackboneError(
            f"{type(config).__name__} cannot be loaded for {task}: {str(error).splitlines()[0]}"
        ) from error
    return model.eval()


class _EightBitConfig(QuantizationConfigMixin):
    """What transformers' loader is handed: the scheme, and which layers to leave alone."""

    def __init__(self, scheme: str = "int8", block_size: int = 64, skip: list[str] | None = None, device: str = "cpu",
                 **_: Any) -> None:  # fmt: skip
        self.quant_method: Any = _METHOD
        self.scheme, self.block_size, self.skip, self.device = scheme, block_size, list(skip or ()), device
        self.fault = ""  # why a weight could not be quantised; transformers raises an error of its own instead


class _EightBitQuantizer(HfQuantizer):
    """Turns each weight into codes as transformers materialises it.

    The codes travel through the loader as an integer parameter in the weight's place, with the ``QuantizedWeight`` they
    belong to as an attribute; ``load_backbone`` then makes the layers of it. So tying works as for any parameter.
    """

    requires_calibration = False
    quantization_config: _EightBitConfig

    def __init__(self, quantization_config: _EightBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.chosen: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def update_dtype(self, dtype: Any) -> Any:
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        skip = [pattern for pattern in self.quantization_config.skip]
        tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        left = _skipped(model, skip)
        layers = dict(model.named_modules())
        kept = {f"{path}.weight" for path, module in layers.items() if id(module) in left}
        kept |= {k for pair in tied.items() if kept & set(pair) for k in pair}
        self.chosen = {
            f"{path}.weight"
            for path, module in layers.items()
            if quantizable(module) and module.weight.dim() == 2 and f"{path}.weight" not in kept
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.chosen

    def get_quantize_ops(self) -> Any:
        return _Quantize(self.quantization_config)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize:
    """The loader's conversion step (transformers' ``ConversionOps`` protocol)."""

    def __init__(self, config: _EightBitConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **_: Any) -> Any:
        out = {}
        for name, value in input_dict.items():
            try:
                quantized = self._quantize(name, value[0] if isinstance(value, list) else value, model)
            except ValueError as error:
                self.config.fault = self.config.fault or f"cannot quantise {name!r}: {error}"
                raise
            codes = nn.Parameter(quantized.codes, requires_grad=False)
            codes.finetuna_quantized = quantized  # type: ignore[attr-defined]
            out[name] = codes
            if missing_keys is not None:
                missing_keys.discard(name)
        return out

    def _quantize(self, name: str, weight: Tensor, model: Any) -> QuantizedWeight:
        layer = model.get_submodule(name.rpartition(".")[0])
        if weight.shape != layer.weight.shape:
            raise ValueError(f"it is {tuple(weight.shape)} in the checkpoint, {tuple(layer.weight.shape)} in the model")
        matrix = weight.to(self.config.device)
        matrix = matrix.t() if is_conv1d(layer) else matrix
        return QuantizedWeight.from_weight(matrix, self.config.scheme, self.config.block_size)


register_quantization_config(_METHOD)(_EightBitConfig)
register_quantizer(_METHOD)(_EightBitQuantizer)


def load_backbone(
    name_or_path: str,
    *,
    scheme: str = "int8",
    block_size: int = 64,
    task: str = "causal-lm",
    num_labels: int = 2,
    dtype: torch.dtype = torch.float32,
    skip: Iterable[str] = (),
    device: str | torch.device = "cpu",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a checkpoint into 8 bits, frozen, in evaluation mode.

    Args:
        name_or_path: a hub name, a Hugging Face folder, a folder saved by ``save_backbone``, or ``quickstart``.
        scheme, block_size: the 8-bit storage; a saved 8-bit folder has its own, which must be this one.
        task, num_labels: which head stands on it. Names of modules that the checkpoint lacks (a new classification
            head) are in the result's ``finetuna_new_modules``.
        dtype: of what is not quantised.
        skip: modules to leave in ``dtype``.
        device: where each weight is quantised as it arrives, and stays.

    Raises:
        BackboneError: the checkpoint is missing, incomplete, or of another architecture or scheme.
    """
    BackboneConfig(name_or_path, scheme=scheme, block_size=block_size, task=task)  # checks them
    folder = resolve_folder(name_or_path)
    config = read_config(name_or_path, revision, trust_remote_code)
    if (Path(folder) / MANIFEST_NAME).is_file():
        model = skeleton(config, task, num_labels, trust_remote_code, attn_implementation)
        new = _load_saved(model, Path(folder), scheme, block_size, list(skip), torch.device(device), task)
    else:
        options: dict[str, Any] = {"num_labels": num_labels} if task == "sequence-classification" else {}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        model, new = _load_huggingface(
            folder, task, config, _EightBitConfig(scheme, block_size, list(skip), str(device)),
            revision=revision, trust_remote_code=trust_remote_code, **options,
        )  # fmt: skip
    model.finetuna_new_modules = new  # type: ignore[assignment]
    return cast_(model.to(device), dtype).requires_grad_(False).eval()


def _load_huggingface(
    folder: str, task: str, config: Any, quantization: _EightBitConfig, **options: Any
) -> tuple[nn.Module, list[str]]:
    if "num_labels" in options:
        config.num_labels = options.pop("num_labels")
    if quantization.scheme != "none":
        options["quantization_config"] = quantization
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # one tensor at a time, or several stand in 16 bits at once
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, info = AUTO_CLASSES[task].from_pretrained(
                folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except FinetunaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = quantization.fault or str(error).strip().splitlines()[0]
        raise BackboneError(f"backbone {folder!r} cannot be loaded: {reason}") from error
    finally:
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if before is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for module in list(model.modules()):
        quantized = getattr(module._parameters.get("weight"), "finetuna_quantized", None)
        if quantized is not None:
            _put(module, quantized, checked=_known_linear(module))
    _own_memory(model)
    if info.get("mismatched_keys"):
        raise BackboneError(
            f"backbone {folder!r}: shapes differ for {sorted(str(k) for k in info['mismatched_keys'])[:3]}"
        )
    new = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
    return model, _check_new(model, folder, task, new)


def _known_linear(module: nn.Module) -> bool:
    """Linear subclasses whose forward is that of ``nn.Linear``, by another road."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ in ("FalconLinear", "Conv1D")


def _own_memory(model: nn.Module) -> None:
    """Copy what is not quantised out of the mapped checkpoint file, so that the file can be let go."""
    done: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = done.setdefault(id(parameter), parameter.data.clone())


def _check_new(model: nn.Module, folder: str, task: str, new: list[str]) -> list[str]:
    """The modules that the checkpoint lacks are a new classification head (and the pooler beneath it), or an error."""
    body = getattr(model, "base_model_prefix", "") + "."
    head = [name for name in new if not name.startswith(body) or "pooler" in name.split(".")]
    lost = [name for name in new if task != "sequence-classification" or name not in head]
    if lost:
        raise BackboneError(f"backbone {folder!r} is not complete: it lacks the weights of {', '.join(lost[:5])}")
    return [name for name in new if not any(name.startswith(other + ".") for other in new)]


# ---- the saved 8-bit form -------------------------------------------------------------------------------------------


def save_backbone(model: nn.Module, path: str | Path, tokenizer: Any = None) -> Path:
    """Write a quantised backbone as safetensors and a small JSON, to be loaded without its 16-bit source.

    The folder holds ``backbone.safetensors`` (codes, scales, and what is not quantised), ``backbone.json`` (scheme,
    types, ties, fingerprint), the transformers ``config.json`` and the tokenizer's files. Written beside and renamed.
    """
    layers = {p: m for p, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    matrices = quantized_layers(model)
    owner = {id(quantized): name for name, quantized in matrices.items()}
    tensors: dict[str, Tensor] = {}
    for name, quantized in matrices.items():
        tensors |= {f"{name}.codes": quantized.codes, f"{name}.scale": quantized.scale}
    shared = {id(q.codes) for q in matrices.values()} | {id(q.scale) for q in matrices.values()}
    keep = {name: t for name, t in model.state_dict().items() if id(t) not in shared}
    ties = _ties(keep)
    tensors |= {name: tensor for name, tensor in keep.items() if name not in ties}
    first = next(iter(matrices.values()), None)
    manifest = {
        "format": 1,
        "scheme": first.scheme if first else "none",
        "block_size": first.block_size if first else 64,
        "layers": {path: owner[id(layer.quantized)] for path, layer in layers.items()},
        "ties": ties,
        "types": {name: str(quantized.dtype).removeprefix("torch.") for name, quantized in matrices.items()},
        "fingerprint": fingerprint(model),
    }
    with replacing_folder(path) as beside:
        save_file(
            {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, beside / WEIGHTS_NAME, {"format": "pt"}
        )
        (beside / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n")
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(beside)
    return Path(path)


def _ties(tensors: dict[str, Tensor]) -> dict[str, str]:
    """By name, the name of an earlier tensor that is the same one."""
    first: dict[Any, str] = {}
    owners = {name: first.setdefault((t.data_ptr(), t.shape, t.stride()), name) for name, t in tensors.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def load_saved_into(model: nn.Module, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Fill ``model``, which has the architecture but not the weights, from a folder of ``save_backbone``."""
    manifest = json.loads((Path(path) / MANIFEST_NAME).read_text())
    _load_saved(model, Path(path), manifest["scheme"], manifest["block_size"], [], torch.device(device), task="")
    return model.requires_grad_(False)


def _load_saved(
    model: nn.Module, folder: Path, scheme: str, block_size: int, skip: list[str], device: torch.device, task: str
) -> list[str]:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if manifest["scheme"] != scheme or (scheme == "int8-blockwise" and manifest["block_size"] != block_size):
        have = manifest["scheme"] + (f" with block_size {manifest['block_size']}" if scheme == "int8-blockwise" else "")
        raise BackboneError(f"{folder} is stored as {have}, not {scheme}: set backbone.scheme={manifest['scheme']}")
    if skip:
        raise BackboneError(f"{folder} is stored in 8 bits: skip_modules {skip} cannot be had back from it")
    modules = dict(model.named_modules(remove_duplicate=False))
    with safe_open(folder / WEIGHTS_NAME, framework="pt", device=str(device)) as file:
        names = set(file.keys())
        matrices: dict[str, QuantizedWeight] = {}
        for path, source in manifest["layers"].items():
            if path not in modules:
                continue  # the head of another task
            if not {f"{source}.codes", f"{source}.scale"} <= names:
                raise BackboneError(f"backbone '{folder}' is not complete: it lacks the weights of {source}")
            if source not in matrices:
                dtype = getattr(torch, manifest["types"][source])
                codes, scale = file.get_tensor(f"{source}.codes"), file.get_tensor(f"{source}.scale")
                matrices[source] = QuantizedWeight(codes.clone(), scale.clone(), scheme, manifest["block_size"], dtype)
            if quantizable(modules[path]):
                _put(modules[path], matrices[source], checked=True)
        _load_parameters(model, modules, file, manifest.get("ties", {}))
        for name, buffer in model.named_buffers():
            if name in names:
                buffer.copy_(file.get_tensor(name))
    new = sorted({name.rpartition(".")[0] for name, p in model.named_parameters() if p.device.type == "meta"})
    new = _check_new(model, str(folder), task, new)
    _initialise(model, new, device)
    return new


def _load_parameters(model: nn.Module, modules: dict[str, nn.Module], file: Any, ties: dict[str, str]) -> None:
    """Give the parameters of ``model`` that are not quantised their tensors, tied ones the same."""
    names = set(file.keys())
    loaded: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        stored = ties.get(name, name)
        if stored not in names:
            continue
        if stored not in loaded:
            loaded[stored] = nn.Parameter(file.get_tensor(stored).clone(), requires_grad=False)
        if loaded[stored].shape != parameter.shape:
            raise BackboneError(
                f"{name} is {tuple(loaded[stored].shape)} in the folder, {tuple(parameter.shape)} in the model"
            )
        modules[owner]._parameters[leaf] = loaded[stored]


def _initialise(model: nn.Module, new: list[str], device: torch.device) -> None:
    """Give the modules that the file lacks the architecture's own initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in new:
            module = model.get_submodule(name).to_empty(device="cpu")
            for part in module.modules():
                model._init_weights(part)  # type: ignore[operator]
            module.to(device)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute each layer in the backward pass (non-reentrant, routes kept).

    Raises:
        BackboneError: when the model does not support it.
    """
    older = getattr(model, "gradient_checkpointing_enable", None)  # the name before transformers 5.20 or so
    enable = getattr(model, "activation_checkpointing_enable", older)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise BackboneError(
            f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing=false"
        )
    enable({"use_reentrant": False, "context_fn": checkpoint_contexts})


def recompute_in_training(model: nn.Module, training: bool) -> None:
    """Switch an enabled recomputation on or off. transformers recomputes only the layers that are in training mode,
    which their frozen, dropout-free contents are not."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = training
