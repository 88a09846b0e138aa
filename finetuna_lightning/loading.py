"""Hugging Face checkpoints, straight into 8 bits.

transformers' own loader finds the files and says which tensor becomes which parameter (shards, renamed keys, merged
experts, ties, heads that are new). Two things of ours stand in it: a quantiser, which it hands each weight, and the
reading of the files. For a GPU, a matrix that is in the file as it is in the model is not read by transformers at all:
it gets a tensor without values (``_Unread``), and the quantiser gives codes for it that are still being made, by the
threads that read. These start before the model is made, with what its names say will be quantised, and are done last.
Whatever is renamed, transposed or merged is read as transformers does it, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetuna_lightning.adapters import matches
from finetuna_lightning.errors import BackboneError, FinetunaError
from finetuna_lightning.nn.quantized import QuantizedWeight, is_conv1d, quantizable
from finetuna_lightning.quantizing import put_, skipped
from finetuna_lightning.saved import check_new
from finetuna_lightning.shards import Entry, QuantizingStream, read_header

AUTO_CLASSES = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
}
STREAMED = ("cuda",)
"""Devices for which reading ahead pays. A CPU quantises from the mapped file: reading ahead costs it cores and a copy
(1.2 GiB on two idle cores: 0.8 s mapped, 1.4 s read ahead)."""
_METHOD = "finetuna_lightning"
_log = logging.getLogger(__name__)


class _Unread(torch.Tensor):
    """A tensor of a file: shape and type for nothing, the values only to an operation that uses them."""

    slice: Any
    key: str

    @staticmethod
    def __new__(cls, entry: Entry, key: str, slice: Any) -> _Unread:
        unread: _Unread = torch.Tensor._make_wrapper_subclass(cls, entry.shape, dtype=entry.dtype)
        unread.key, unread.slice = key, slice
        return unread

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(
            _Unread, lambda unread: unread.slice[...], (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<{self.key}, {tuple(self.shape)}, not read yet>"


class _Slice:
    """Stands for safetensors' slice of one tensor; without values where the tensor will be streamed."""

    def __init__(self, files: _Files, key: str, slice: Any) -> None:
        self.files, self.key, self.slice = files, key, slice

    def __getitem__(self, index: Any) -> Tensor:
        entry = self.files.streamed(self.key) if index is Ellipsis else None
        tensor: Tensor = self.slice[index] if entry is None else _Unread(entry, self.key, self.slice)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slice, name)


class _File:
    """Stands for one file that safetensors has opened (and found whole)."""

    def __init__(self, files: _Files, opened: Any) -> None:
        self.files, self.opened = files, opened

    def get_slice(self, key: str) -> _Slice:
        return _Slice(self.files, key, self.opened.get_slice(key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.__exit__(*error)


class _Files:
    """The safetensors files of one load, and the stream of those matrices that need nothing but quantising.

    The stream starts with a guess, before there is a model to ask; ``streamed`` finds out what it should have been, and
    begins it anew where that is something else.
    """

    def __init__(self, config: EightBitConfig) -> None:
        self.config = config
        self.dtype: torch.dtype | None = None  # in which transformers wants the weights
        self.prefix = ""  # which a checkpoint of the body alone leaves out
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the parameters to quantise
        self.order: dict[str, None] = {}  # their names, as they will be asked for
        self.entries: dict[str, Entry] = {}
        self.stream: QuantizingStream | None = None
        self.guessed = False
        self.one_by_one = 0
        self.safe_open: Any = getattr(modeling_utils, "safe_open", None)  # transformers' own; None in a later version

    def __deepcopy__(self, memo: Any) -> _Files:
        return self  # transformers copies a model's configuration; there is one load

    def open(self, path: Any, *args: Any, **options: Any) -> _File:
        self.entries |= read_header(path)  # first: its errors name the file
        return _File(self, self.safe_open(path, *args, **options))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within, transformers opens safetensors files through this."""
        loader: Any = modeling_utils
        if self.safe_open is not None:
            loader.safe_open = self.open
        try:
            yield
        finally:
            if self.safe_open is not None:
                loader.safe_open = self.safe_open
            if self.stream is not None:
                self.stream.close()

    def guess(self, folder: str, dtype: torch.dtype | None) -> None:
        """Start reading what is likely to be streamed from a folder whose model has ``dtype``."""
        config = self.config
        if config.scheme == "none" or torch.device(config.device).type not in STREAMED or self.safe_open is None:
            return
        likely = {
            key: entry
            for path in _files_of(Path(folder))
            for key, entry in read_header(path).items()
            if key.endswith(".weight") and len(entry.shape) == 2 and entry.dtype == dtype
            if not any(matches(pattern, key.removesuffix(".weight")) for pattern in config.skip)
        }
        if likely:
            self._start(likely)
            self.guessed = True

    def _start(self, entries: dict[str, Entry]) -> None:
        config = self.config
        self.stream = QuantizingStream(entries, config.scheme, config.block_size, torch.device(config.device))

    def _stop(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream, self.guessed = None, False

    def streamed(self, key: str) -> Entry | None:
        """The entry of ``key`` if it is streamed. By the first call the order is known, and what the stream is of."""
        if torch.device(self.config.device).type not in STREAMED or not self.order:
            return None
        if self.stream is None or self.guessed:
            chosen = {}
            for name in self.order:
                for key_of in (name, name.removeprefix(self.prefix + "."), f"{self.prefix}.{name}"):
                    entry = self.entries.get(key_of)
                    if entry is not None and entry.shape == self.shapes.get(name) and entry.dtype == self.dtype:
                        chosen[key_of] = entry
                        break
            if self.stream is None or self.stream.entries != chosen:
                self._stop()
                self._start(chosen)
            self.guessed = False
        assert self.stream is not None
        return self.stream.entries.get(key)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Codes and scale of a streamed weight, to be filled by the time of ``check``; None for one that has to be
        quantised from its values."""
        if self.guessed:
            self._stop()  # nobody asked what is streamed
        if isinstance(weight, _Unread) and self.stream is not None:
            got = self.stream.take(weight.key)
            if got is not None:
                return got
        self.one_by_one += 1
        return None

    def check(self) -> None:
        """Wait for the stream. Raise ValueError for a weight of it that was not finite; say how many were not of it."""
        if self.guessed:
            self._stop()
        if self.stream is not None:
            self.stream.finish()
            name = self.stream.not_finite()
            if name is not None:
                raise ValueError(f"cannot quantise {name!r}: the weight holds NaN or infinity")
        if self.one_by_one and torch.device(self.config.device).type in STREAMED:
            total = self.one_by_one + (len(self.stream.taken) if self.stream is not None else 0)
            _log.info(
                "%d of %d matrices were read one at a time, not ahead: not in safetensors as they are in the model",
                self.one_by_one, total,
            )  # fmt: skip


def _files_of(folder: Path) -> Iterable[Path]:
    """The safetensors files that transformers will open in a folder; none where that is less than certain."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    try:
        names = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
        paths = [folder / name for name in sorted(names)]
        return paths if all(path.is_file() for path in paths) else []
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []  # transformers says what is wrong with it


class EightBitConfig(QuantizationConfigMixin):
    """What transformers' loader is handed: the scheme, and which layers to leave alone."""

    def __init__(self, scheme: str = "int8", block_size: int = 64, skip: list[str] | None = None, device: str = "cpu",
                 **_: Any) -> None:  # fmt: skip
        self.quant_method: Any = _METHOD
        self.scheme, self.block_size, self.skip, self.device = scheme, block_size, list(skip or ()), device
        self.fault = ""  # why a weight could not be quantised; transformers raises an error of its own instead
        self.files = _Files(self)


class _EightBitQuantizer(HfQuantizer):
    """Turns each weight into codes as transformers materialises it.

    The codes travel through the loader as an integer parameter in the weight's place, with the ``QuantizedWeight`` they
    belong to as an attribute; ``load_backbone`` then makes the layers of it. So tying works as for any parameter.
    """

    requires_calibration = False
    quantization_config: EightBitConfig

    def __init__(self, quantization_config: EightBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.chosen: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def update_dtype(self, dtype: Any) -> Any:
        self.quantization_config.files.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        skip = [pattern for pattern in self.quantization_config.skip]
        tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        left = skipped(model, skip)
        layers = dict(model.named_modules())
        kept = {f"{path}.weight" for path, module in layers.items() if id(module) in left}
        kept |= {k for pair in tied.items() if kept & set(pair) for k in pair}
        self.chosen = {
            f"{path}.weight"
            for path, module in layers.items()
            if quantizable(module) and module.weight.dim() == 2 and f"{path}.weight" not in kept
        }
        files = self.quantization_config.files
        files.prefix = getattr(model, "base_model_prefix", "")
        files.shapes = {
            name: tuple(layers[name.removesuffix(".weight")].weight.shape)
            for name in self.chosen
            if not is_conv1d(layers[name.removesuffix(".weight")])  # its rows are the file's columns
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if param_name in self.chosen:
            self.quantization_config.files.order.setdefault(param_name)  # first asked in the order of loading
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

    def __init__(self, config: EightBitConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **_: Any) -> Any:
        out = {}
        for name, value in input_dict.items():
            try:
                quantized = self._quantize(name, value[0] if isinstance(value, list) else value, model)
            except (ValueError, RuntimeError) as error:
                self.config.fault = self.config.fault or f"cannot quantise {name!r}: {error}".splitlines()[0]
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
        scheme, block_size = self.config.scheme, self.config.block_size
        streamed = self.config.files.quantize(weight)
        if streamed is not None:
            return QuantizedWeight(*streamed, scheme, block_size, weight.dtype)
        matrix = weight.to(self.config.device)
        return QuantizedWeight.from_weight(matrix.t() if is_conv1d(layer) else matrix, scheme, block_size)


register_quantization_config(_METHOD)(EightBitConfig)
register_quantizer(_METHOD)(_EightBitQuantizer)


@contextlib.contextmanager
def load_huggingface(
    folder: str, task: str, config: Any, quantization: EightBitConfig, **options: Any
) -> Iterator[tuple[nn.Module, list[str]]]:
    """The model of a Hugging Face folder or hub name, quantised, and the names of its modules that are new.

    What is not quantised lies on the CPU, in memory of its own. The codes are filled when the context ends; until then
    nothing may look at them.

    Raises:
        BackboneError: when it is missing, incomplete, of another shape, or holds what cannot be quantised.
    """
    if "num_labels" in options:
        config.num_labels = options.pop("num_labels")
    if quantization.scheme != "none":
        options["quantization_config"] = quantization
    with quantization.files.reading():
        with _named(folder, quantization), _one_at_a_time(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            quantization.files.guess(folder, getattr(config, "dtype", None))
            model, info = AUTO_CLASSES[task].from_pretrained(
                folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        yield _with_layers(model, info, folder, task)
        with _named(folder, quantization):
            quantization.files.check()


@contextlib.contextmanager
def _named(folder: str, quantization: EightBitConfig) -> Iterator[None]:
    """Within, what goes wrong is said of ``folder``, in one line."""
    try:
        yield
    except FinetunaError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = quantization.fault or str(error).strip().splitlines()[0]
        raise BackboneError(f"backbone {folder!r} cannot be loaded: {reason}") from error


def _with_layers(model: nn.Module, info: dict[str, Any], folder: str, task: str) -> tuple[nn.Module, list[str]]:
    """What transformers has loaded, its codes put into layers of ours, and the names of its modules that are new."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for module in list(model.modules()):
        quantized = getattr(module._parameters.get("weight"), "finetuna_quantized", None)
        if quantized is not None:
            put_(module, quantized, checked=_known_linear(module))
    _own_memory(model)
    if info.get("mismatched_keys"):
        raise BackboneError(
            f"backbone {folder!r}: shapes differ for {sorted(str(k) for k in info['mismatched_keys'])[:3]}"
        )
    new = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
    return model, check_new(model, folder, task, new)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Within, transformers reads one tensor after another, or several would stand in 16 bits at once."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if before is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def _known_linear(module: nn.Module) -> bool:
    """Linear subclasses whose forward is that of ``nn.Linear``, by another road."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ in ("FalconLinear", "Conv1D")


def _own_memory(model: nn.Module) -> None:
    """Copy what is not quantised out of the mapped checkpoint file, so that the file can be let go."""
    done: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = done.setdefault(id(parameter), parameter.data.clone())
