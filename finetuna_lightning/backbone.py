"""The shared, frozen model: what a checkpoint is, and loading it in 8 bits. One door to the rooms beneath:
``quantizing`` (any module), ``loading`` (Hugging Face checkpoints) and ``saved`` (the 8-bit form)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from finetuna_lightning.configs import BackboneConfig
from finetuna_lightning.errors import BackboneError, did_you_mean
from finetuna_lightning.loading import AUTO_CLASSES as AUTO_CLASSES
from finetuna_lightning.loading import EightBitConfig, load_huggingface
from finetuna_lightning.nn.routing import checkpoint_contexts
from finetuna_lightning.quantizing import cast_ as cast_
from finetuna_lightning.quantizing import fingerprint as fingerprint
from finetuna_lightning.quantizing import fingerprints as fingerprints
from finetuna_lightning.quantizing import quantize_model_ as quantize_model_
from finetuna_lightning.quantizing import quantized_layers as quantized_layers
from finetuna_lightning.saved import MANIFEST_NAME as MANIFEST_NAME
from finetuna_lightning.saved import WEIGHTS_NAME as WEIGHTS_NAME
from finetuna_lightning.saved import load_saved
from finetuna_lightning.saved import load_saved_into as load_saved_into
from finetuna_lightning.saved import reading as reading_saved
from finetuna_lightning.saved import save_backbone as save_backbone

QUICKSTART = "quickstart"
QUICKSTART_FOLDER = Path(__file__).parent / "quickstart" / "model"


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
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers draws for nothing
            module._parameters[name] = parameter

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
    with contextlib.ExitStack() as reading:  # which goes on while the model is made, and is done when this ends
        if (Path(folder) / MANIFEST_NAME).is_file():
            saved = reading.enter_context(
                reading_saved(Path(folder), scheme, block_size, list(skip), torch.device(device))
            )
            model = skeleton(config, task, num_labels, trust_remote_code, attn_implementation)
            new = load_saved(model, saved, task)
        else:
            options: dict[str, Any] = {"num_labels": num_labels} if task == "sequence-classification" else {}
            if attn_implementation is not None:
                options["attn_implementation"] = attn_implementation
            model, new = reading.enter_context(
                load_huggingface(
                    folder, task, config, EightBitConfig(scheme, block_size, list(skip), str(device)),
                    revision=revision, trust_remote_code=trust_remote_code, **options,
                )
            )  # fmt: skip
        model = model.to(device).requires_grad_(False).eval()
        model.finetuna_new_modules = new  # type: ignore[assignment]
    return cast_(model, dtype)


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
