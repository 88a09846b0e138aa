"""Dataclasses shared by scripts, Hydra and LightningCLI. Standard library only; every field is a plain type that both
OmegaConf and jsonargparse accept. Values are checked at construction, so that a mistake is reported before any
loading."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from finetuna_lightning.errors import ConfigError, did_you_mean, one_of

SCHEMES = ("int8", "int8-blockwise", "fp8", "none")
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
TASKS = ("causal-lm", "sequence-classification", "seq2seq-lm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("constant", "linear", "cosine")
# each with what it takes besides a learning rate and a weight decay
OPTIMIZERS = {
    "adamw": ("betas", "eps"), "adamw8bit": ("betas", "eps"), "paged_adamw8bit": ("betas", "eps"),
    "lion": ("betas",), "lion8bit": ("betas",), "paged_lion8bit": ("betas",),
    "sgd": ("momentum",), "adafactor": (),
}  # fmt: skip
DATA_KINDS = ("auto", "text", "prompt", "chat", "classification")
ALL_LINEAR = "all-linear"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RESERVED = frozenset(
    # attributes of the adapter bank, an nn.ModuleDict in which an adapter is a child: such a name would shadow a method
    "adapters add add_module adopt apply attach backbone backbone_nbytes bare bfloat16 buffers call_super_init "
    "children clear compile cpu cuda delta detach double dump_patches eval extra_repr float follow forward get_buffer "
    "get_extra_state get_parameter get_submodule grad_wanted half ipu items keys load load_state_dict modules mtia "
    "named_buffers named_children named_modules named_parameters names origin parameters plain_copy pop "
    "register_backward_hook register_buffer register_forward_hook register_forward_pre_hook "
    "register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook "
    "register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook "
    "register_state_dict_pre_hook remove requires_grad_ route set_extra_state set_submodule share_memory sole "
    "state_dict T_destination to to_empty train training type update values xpu zero_grad".split()
)


def check_adapter_name(name: str) -> str:
    """Return ``name`` if it can name an adapter: a letter or digit first, then letters, digits, ``_`` and ``-``.

    The name becomes a key of a ``ModuleDict``, a folder and a log prefix, so it is checked once, here.

    Raises:
        ConfigError: for an empty name, a path-like or dotted name, or one that shadows a module attribute.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        fixed = re.sub(r"[^A-Za-z0-9_-]+", "_", str(name)).strip("_-")
        hint = f"; {fixed!r} would work" if fixed and fixed not in _RESERVED else ""
        raise ConfigError(
            f"adapter name {name!r} is not allowed: a letter or digit first, then letters, digits, '_' and '-'{hint}"
        )
    if name in _RESERVED:
        raise ConfigError(
            f"adapter name {name!r} is not allowed: it is an attribute of the bank; '{name}_adapter' would work"
        )
    return name


def check_adapter_names(names: list[str]) -> list[str]:
    """Check every name (see ``check_adapter_name``) and that none differs from another only by case: on some file
    systems the two would share a folder."""
    seen: dict[str, str] = {}
    for name in names:
        check_adapter_name(name)
        if name.lower() in seen:
            raise ConfigError(f"adapter name {name!r} is a duplicate of {seen[name.lower()]!r}: names must differ")
        seen[name.lower()] = name
    return names


_Config = TypeVar("_Config")


def as_config(kind: type[_Config], value: Any, what: str = "") -> _Config:
    """``value`` as a ``kind``: a dataclass as it is, a mapping (from YAML or a checkpoint) by its fields.

    Raises:
        ConfigError: for a field that ``kind`` lacks, naming the nearest one; ``what`` says where it was met.
    """
    if isinstance(value, kind):
        return value
    assert is_dataclass(kind)
    names = [f.name for f in fields(kind)]
    where = what or kind.__name__
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a {kind.__name__} or a mapping of its fields, not {value!r}")
    for key in value:
        if key not in names:
            raise ConfigError(
                f"{where} has no field {key!r}{did_you_mean(str(key), names)} (fields: {', '.join(names)})"
            )
    return kind(**value)


def _choice(what: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigError(one_of(what, value, options))


def _number(what: str, value: object, low: float, high: float | None = None, *, integer: bool = False) -> None:
    kinds = (int,) if integer else (int, float)
    above = low if integer else f"{low:g}"
    wanted = f"{'an integer' if integer else 'a number'} >= {above}" + (f" and < {high:g}" if high is not None else "")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{what} must be {wanted}, not {value!r}")
    if not (value >= low and value < (math.inf if high is None else high)):  # NaN is in no range
        raise ConfigError(f"{what} must be {wanted}, not {value!r}")


def _names(what: str, value: Any) -> list[str]:
    """A single name stands for a list of one."""
    names: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [None]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{what} must be a list of module names, suffixes or regular expressions, not {value!r}")
    return names


@dataclass
class BackboneConfig:
    """The shared, frozen model.

    Args:
        name_or_path: a Hugging Face hub name, a local folder, a folder saved by ``save_backbone``, or ``"quickstart"``.
        scheme: 8-bit storage: ``int8`` (one scale per output row), ``int8-blockwise`` (bitsandbytes' dynamic tree, one
            scale per block), ``fp8`` (e4m3, one scale per row), or ``none``.
        block_size: elements per scale of ``int8-blockwise``: 64 to 4096, a power of two.
        task: ``causal-lm``, ``sequence-classification`` or ``seq2seq-lm``.
        num_labels: classes of a sequence classifier.
        dtype: of what is not quantised, and of the activations: ``auto`` is float32 on the CPU, bfloat16 on a GPU.
        skip_modules: modules kept in 16 or 32 bits, by suffix, full path or regular expression.
        revision: the hub revision.
        attn_implementation: passed to transformers (``sdpa``, ``eager``, ...); None lets it choose.
        trust_remote_code: allow code from the checkpoint's repository to run.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    name_or_path: str = "quickstart"
    scheme: str = "int8"
    block_size: int = 64
    task: str = "causal-lm"
    num_labels: int = 2
    dtype: str = "auto"
    skip_modules: list[str] = field(default_factory=list)
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name_or_path, str) or not self.name_or_path:
            raise ConfigError(f"backbone.name_or_path must be a hub name or a folder, not {self.name_or_path!r}")
        _choice("backbone.scheme", self.scheme, SCHEMES)
        _choice("backbone.task", self.task, TASKS)
        _choice("backbone.dtype", self.dtype, DTYPES)
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"backbone.block_size must be one of {BLOCK_SIZES}, not {self.block_size!r}")
        _number("backbone.num_labels", self.num_labels, 2, integer=True)
        self.skip_modules = _names("backbone.skip_modules", self.skip_modules)


@dataclass
class AdapterConfig:
    """One fine-tune: its low-rank deltas, the modules that it trains in full, and how it is trained.

    Args:
        rank: of every delta (arXiv 2106.09685).
        alpha: a delta is scaled by ``alpha / rank``.
        dropout: probability on the input of the deltas, in training.
        bias: give each linear delta a trained bias (inside the scaling, as PEFT's ``lora_bias``).
        target_modules: modules that carry a delta, by suffix (``q_proj``), full path or regular expression;
            ``all-linear`` is every linear layer but the output head.
        plain_modules: modules of which this adapter trains a private copy in full, named the same way.
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        schedule: ``constant``, ``linear`` or ``cosine`` (both decay to zero at ``max_steps``).
        warmup_steps: optimizer steps of linear warm-up.
        max_steps: optimizer steps of this adapter; None trains as long as the trainer does.
        max_grad_norm: clip this adapter's own gradient norm; None does not clip.
        accumulate: batches of this adapter in one optimizer step of it, whose gradient is the mean of theirs. It counts
            on across epochs; steps, schedule, warm-up and ``max_steps`` count this adapter's own optimizer steps.
        optimizer: another one than ``OptimConfig.name``, of the same choices.
        betas, eps, momentum: of this adapter's optimizer. Empty or None: those of ``OptimConfig`` where the
            optimizer is that one, else the optimizer's own defaults.
        max_bad_steps: a step whose loss or gradient is not finite is skipped; after so many in a row the adapter leaves
            the training, with its weights as before the first of them.
        seed: of this adapter's initialisation, dropout and data order; None derives it from the run's seed.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    bias: bool = False
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    plain_modules: list[str] = field(default_factory=list)
    lr: float = 2e-4
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_steps: int = 0
    max_steps: int | None = None
    max_grad_norm: float | None = 1.0
    accumulate: int = 1
    optimizer: str | None = None
    betas: list[float] = field(default_factory=list)
    eps: float | None = None
    momentum: float | None = None
    max_bad_steps: int = 3
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("adapter.rank", self.rank, 1, integer=True)
        _number("adapter.alpha", self.alpha, 0)
        _number("adapter.dropout", self.dropout, 0, 1)
        _number("adapter.lr", self.lr, 0)
        _number("adapter.weight_decay", self.weight_decay, 0)
        _number("adapter.warmup_steps", self.warmup_steps, 0, integer=True)
        _choice("adapter.schedule", self.schedule, SCHEDULES)
        if self.max_steps is not None:
            _number("adapter.max_steps", self.max_steps, 1, integer=True)
        if self.max_grad_norm is not None:
            _number("adapter.max_grad_norm", self.max_grad_norm, 0)
        _number("adapter.accumulate", self.accumulate, 1, integer=True)
        _number("adapter.max_bad_steps", self.max_bad_steps, 1, integer=True)
        if self.optimizer is not None:
            _choice("adapter.optimizer", self.optimizer, tuple(OPTIMIZERS))
        _optimizer_settings("adapter", self.betas or None, self.eps, self.momentum)
        if self.seed is not None:
            _number("adapter.seed", self.seed, 0, integer=True)
        self.target_modules = _names("adapter.target_modules", self.target_modules)
        self.plain_modules = _names("adapter.plain_modules", self.plain_modules)
        if not self.target_modules and not self.plain_modules:
            raise ConfigError(
                "adapter.target_modules and adapter.plain_modules are both empty: nothing would be trained"
            )


@dataclass
class OptimConfig:
    """The optimizer of every adapter that names none; learning rate, decay and schedule belong to each adapter.

    Args:
        name: ``adamw``, ``sgd`` or ``adafactor`` (torch), ``lion``, or with state in 8 bits ``adamw8bit`` and
            ``lion8bit``, and these with state that is paged to the host, ``paged_adamw8bit`` and ``paged_lion8bit``
            (bitsandbytes).
        betas, eps: of AdamW and, without eps, of Lion.
        momentum: of SGD.
    """

    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _choice("optim.name", self.name, tuple(OPTIMIZERS))
        _optimizer_settings("optim", self.betas or [], self.eps, self.momentum)


def _optimizer_settings(where: str, betas: Any, eps: float | None, momentum: float | None) -> None:
    if betas is not None:
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ConfigError(f"{where}.betas must be two numbers, not {betas!r}")
        for beta in betas:
            _number(f"{where}.betas", beta, 0, 1)
    if eps is not None:
        _number(f"{where}.eps", eps, 0)
    if momentum is not None:
        _number(f"{where}.momentum", momentum, 0, 1)


def optimizer_settings(adapter: AdapterConfig, optim: OptimConfig) -> tuple[str, dict[str, Any]]:
    """The optimizer of one adapter and its settings: the adapter's own; else the shared ones, where it is the shared
    optimizer; else none, which leaves the optimizer's defaults.

    Raises:
        ConfigError: for a setting of the adapter that its optimizer does not take.
    """
    kind = adapter.optimizer or optim.name
    settings: dict[str, Any] = {}
    for what in ("betas", "eps", "momentum"):
        own = getattr(adapter, what)
        own = None if own == [] else own
        if what not in OPTIMIZERS[kind]:
            if own is not None:
                takes = " and ".join(OPTIMIZERS[kind]) or "none of its own"
                raise ConfigError(f"adapter.{what} is set, but {kind} does not take it (its settings: {takes})")
        elif own is not None or kind == optim.name:
            settings[what] = getattr(optim, what) if own is None else own
    return kind, settings


@dataclass
class DataConfig:
    """Where one adapter's examples come from, and how they are cut.

    Args:
        path: a .txt, .jsonl or .parquet file, or ``quickstart:<domain>``.
        kind: ``text`` (a text field, or a .txt file), ``prompt`` (prompt and completion; loss on the completion),
            ``chat`` (a list of messages; loss on the assistant's turns), ``classification`` (a text and a label), or
            ``auto``: told by the fields of the first line.
        val_path, test_path: files of their own for validation and test; without one, a part of ``path`` is held out.
        val_fraction, test_fraction: the part of ``path`` held out, split by document.
        max_length: tokens per sequence; longer examples are cut (plain text is chunked). None: the model's positions,
            1,024 at most.
        batch_size: sequences of this adapter in a step; None takes the data module's.
        max_tokens: instead of a batch size, as many sequences in a step as have at most so many tokens together; None
            takes the data module's.
        shuffle: draw a new order each epoch from the adapter's own seed.
        limit: use only the first so many documents.
        text_field, prompt_field, completion_field, messages_field, label_field: names of the fields.
        labels: the class names, in order; empty: as met in the data, sorted.
    """

    path: str = ""
    kind: str = "auto"
    val_path: str | None = None
    test_path: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    max_length: int | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    shuffle: bool = True
    limit: int | None = None
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    label_field: str = "label"
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"data.path must name a .txt, .jsonl or .parquet file, not {self.path!r}")
        _choice("data.kind", self.kind, DATA_KINDS)
        _number("data.val_fraction", self.val_fraction, 0, 1)
        _number("data.test_fraction", self.test_fraction, 0, 1)
        if self.val_fraction + self.test_fraction >= 1:
            raise ConfigError("data.val_fraction and data.test_fraction together leave nothing to train on")
        for what in ("max_length", "batch_size", "max_tokens", "limit"):
            value = getattr(self, what)
            if value is not None:
                _number(f"data.{what}", value, 2 if what.startswith("max_") else 1, integer=True)
        if self.batch_size is not None and self.max_tokens is not None:
            raise ConfigError("a source has data.batch_size or data.max_tokens, not both: the budget says how many")
