"""PEFT's file format, out and in: a codec over plain tensors and dictionaries. It imports no peft.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT 0.21, ``peft/utils/save_and_load.py``):

``base_model.model.<path>.lora_A.weight``          [r, in]
``base_model.model.<path>.lora_B.weight``          [out, r], with ``lora_B.bias`` [out] under ``lora_bias``
``base_model.model.<path>.lora_embedding_A``       [r, vocabulary]
``base_model.model.<path>.lora_embedding_B``       [dim, r]
``base_model.model.<path>.<parameter>``            a parameter of a module trained in full
``base_model.model.<path>.base_layer.<parameter>``  the backbone's own table, which PEFT writes beside an embedding's
delta
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetuna_lightning.errors import CheckpointError
from finetuna_lightning.files import replacing_folder

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS", "seq2seq-lm": "SEQ_2_SEQ_LM"}
_BASE = ".base_layer."
_KINDS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}
_SUFFIXES = {kind: suffix for suffix, kind in _KINDS.items()}


@dataclass
class AdapterFolder:
    """One adapter as files hold it.

    Args:
        rank, alpha, dropout, bias: as in ``AdapterConfig``.
        target_modules, plain_modules: suffixes or full paths.
        deltas: by path, the delta's tensors by parameter name (``lora_A``, ``lora_B``, ...).
        plain: by path and parameter (``lm_head.weight``), the tensors of modules trained in full.
        base: by path and parameter, copies of the backbone's own tensors: read, to be compared, and never written.
        task: of the backbone.
        backbone, revision: what the adapter was trained over.
        fingerprint: of the backbone's codes and scales; kept in the safetensors metadata, where PEFT does not look.
        fan_in_fan_out: the targets keep their weight transposed (``Conv1D``).
        ranks, alphas: by path, of the deltas whose rank or alpha is another than ``rank``, ``alpha``.
    """

    rank: int
    alpha: float
    dropout: float
    bias: bool
    target_modules: list[str]
    plain_modules: list[str]
    deltas: dict[str, dict[str, Tensor]]
    plain: dict[str, Tensor]
    task: str | None = None
    backbone: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    fan_in_fan_out: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def scaling(self, path: str) -> dict[str, Any]:
        """``rank`` and ``alpha`` of the delta at ``path``."""
        return {"rank": self.ranks.get(path, self.rank), "alpha": self.alphas.get(path, self.alpha)}


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _config(folder: AdapterFolder) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(folder.task or ""),
        "base_model_name_or_path": folder.backbone,
        "revision": folder.revision,
        "r": folder.rank,
        "lora_alpha": _whole(folder.alpha),
        "lora_dropout": folder.dropout,
        "target_modules": folder.target_modules,
        "bias": "none",
        "lora_bias": folder.bias,
        "fan_in_fan_out": folder.fan_in_fan_out,
        "modules_to_save": folder.plain_modules or None,
        "rank_pattern": {re.escape(path): rank for path, rank in folder.ranks.items()},
        "alpha_pattern": {re.escape(path): _whole(alpha) for path, alpha in folder.alphas.items()},
        "use_rslora": False,
        "inference_mode": True,
        **folder.extra,
    }


def save_folder(path: str | Path, folder: AdapterFolder) -> Path:
    """Write ``folder`` to ``path``, beside and renamed: a reader sees the old folder or the new one, whole. Other files
    that lie there stay."""
    if Path(path).resolve() == Path.cwd():
        raise CheckpointError(
            f"an adapter needs a folder of its own, not the working directory: '{path}/adapter' would do"
        )
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in folder.plain.items()}
    for module, parts in folder.deltas.items():
        for kind, tensor in parts.items():
            tensors[f"{PREFIX}{module}{_SUFFIXES[kind]}"] = tensor
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({"backbone_fingerprint": folder.fingerprint} if folder.fingerprint else {})
    with replacing_folder(path) as beside:
        if Path(path).is_dir():
            ours = shutil.ignore_patterns(CONFIG_NAME, WEIGHTS_NAME)
            shutil.copytree(path, beside, ignore=ours, copy_function=_link, dirs_exist_ok=True)
        save_file(tensors, beside / WEIGHTS_NAME, metadata=metadata)
        _sort_metadata(beside / WEIGHTS_NAME)
        (beside / CONFIG_NAME).write_text(json.dumps(_config(folder), indent=2) + "\n")
    return Path(path)


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy, where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the metadata in an order of the moment; the same adapter is to be the same bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def load_folder(path: str | Path) -> AdapterFolder:
    """Read a PEFT LoRA folder.

    Raises:
        CheckpointError: a file is missing or unreadable, the adapter is of a kind that cannot be represented, or a
            tensor holds NaN or infinity.
    """
    path = Path(path)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is no PEFT adapter folder: {name} is missing")
    try:
        config = dict(json.loads((path / CONFIG_NAME).read_text()))
        with safe_open(path / WEIGHTS_NAME, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _refuse_unsupported(path, config)
    deltas: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{path / WEIGHTS_NAME}: unexpected key {key!r}; keys start with {PREFIX!r}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path / WEIGHTS_NAME}: {key!r} holds NaN or infinity")
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _KINDS if name.endswith(suffix)), None)
        if suffix is None:
            plain[name] = tensor
        else:
            deltas.setdefault(name.removesuffix(suffix), {})[_KINDS[suffix]] = tensor
    copies = [name for name in plain if name.rpartition(_BASE)[0] in deltas]
    base = {name.replace(_BASE, "."): plain.pop(name) for name in copies}
    targets = config.get("target_modules") or []
    ranks = {p: _by_pattern(config.get("rank_pattern"), p, config["r"]) for p in deltas}
    alphas = {
        p: _by_pattern(config.get("alpha_pattern"), p, config["lora_alpha"])
        * (ranks[p] ** 0.5 if config.get("use_rslora") else 1)
        for p in deltas
    }
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1)
    return AdapterFolder(
        rank=config["r"],
        alpha=alpha,
        ranks={p: rank for p, rank in ranks.items() if rank != config["r"]},
        alphas={p: own for p, own in alphas.items() if own != alpha},
        dropout=config.get("lora_dropout", 0.0),
        bias=bool(config.get("lora_bias")),
        target_modules=[targets] if isinstance(targets, str) else list(targets),
        plain_modules=list(config.get("modules_to_save") or []),
        deltas=deltas,
        plain=plain,
        base=base,
        task=next((task for task, name in TASK_TYPES.items() if name == config.get("task_type")), None),
        backbone=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        fingerprint=metadata.get("backbone_fingerprint"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} holds a {config.get('peft_type')} adapter; only LORA can be loaded")
    nothing: dict[str, tuple[Any, ...]] = {
        "bias": ("none", None), "use_dora": (False, None),
        "trainable_token_indices": (None, [], {}), "target_parameters": (None, []),
    }  # fmt: skip
    for key, allowed in nothing.items():
        if config.get(key) not in allowed:
            raise CheckpointError(f"{path}: {key}={config[key]!r} is not supported; expected {allowed[0]!r}")
    for pattern in _PATTERNS.values():
        if not isinstance(config.get(pattern) or {}, dict):
            raise CheckpointError(f"{path}: {pattern}={config[pattern]!r} is no mapping")
    ranks, alphas = ({"": config.get(key)} | (config.get(pattern) or {}) for key, pattern in _PATTERNS.items())
    for where in {*ranks, *alphas}:
        try:
            re.compile(where)
        except re.error as error:
            raise CheckpointError(f"{path}: {where!r} is no regular expression: {error}") from None
    for where, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{path}: r={rank!r}{f' of {where}' if where else ''} is not an integer >= 1")
    for where, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(f"{path}: lora_alpha={alpha!r}{f' of {where}' if where else ''} is not a number")


_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def _by_pattern(patterns: dict[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value of the first pattern that names ``path``, as PEFT's ``get_pattern_key`` finds it."""
    named = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(named, otherwise)
