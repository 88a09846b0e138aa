"""The saved 8-bit form of a backbone: codes, scales and the rest as safetensors, loaded without its 16-bit source."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetuna_lightning.errors import BackboneError
from finetuna_lightning.files import replacing_folder
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, quantizable
from finetuna_lightning.quantizing import fingerprint, put_, quantized_layers
from finetuna_lightning.shards import Entry, TensorStream, read_header

MANIFEST_NAME = "backbone.json"
WEIGHTS_NAME = "backbone.safetensors"


def check_new(model: nn.Module, folder: str, task: str, new: list[str]) -> list[str]:
    """The modules that the checkpoint lacks are a new classification head (and the pooler beneath it), or an error."""
    body = getattr(model, "base_model_prefix", "") + "."
    head = [name for name in new if not name.startswith(body) or "pooler" in name.split(".")]
    lost = [name for name in new if task != "sequence-classification" or name not in head]
    if lost:
        raise BackboneError(f"backbone {folder!r} is not complete: it lacks the weights of {', '.join(lost[:5])}")
    return [name for name in new if not any(name.startswith(other + ".") for other in new)]


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
    with reading(Path(path), manifest["scheme"], manifest["block_size"], [], torch.device(device)) as saved:
        load_saved(model, saved, task="")
    return model.requires_grad_(False)


class Saved:
    """A folder of ``save_backbone`` that is being read, all of it: what else it should have been, the model says."""

    def __init__(self, folder: Path, manifest: dict[str, Any], device: torch.device) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self.header = read_header(folder / WEIGHTS_NAME)
        self.stream = TensorStream(self.header, device)

    def only(self, names: set[str]) -> dict[str, Tensor]:
        """The tensors of ``names``, filled by the time that the stream is finished."""
        if self.header.keys() - names:
            self.stream.close()
            self.stream = TensorStream(
                {name: entry for name, entry in self.header.items() if name in names}, self.device
            )
        return self.stream.tensors


@contextlib.contextmanager
def reading(folder: Path, scheme: str, block_size: int, skip: list[str], device: torch.device) -> Iterator[Saved]:
    """Read ``folder`` straight to ``device`` while a model is made of it; what was read is there when the context ends.

    Raises:
        BackboneError: for another scheme, a skipped module, or a file that lacks a tensor.
    """
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if manifest["scheme"] != scheme or (scheme == "int8-blockwise" and manifest["block_size"] != block_size):
        have = manifest["scheme"] + (f" with block_size {manifest['block_size']}" if scheme == "int8-blockwise" else "")
        raise BackboneError(f"{folder} is stored as {have}, not {scheme}: set backbone.scheme={manifest['scheme']}")
    if skip:
        raise BackboneError(f"{folder} is stored in 8 bits: skip_modules {skip} cannot be had back from it")
    saved = Saved(folder, manifest, device)
    try:
        yield saved
        saved.stream.finish()
    finally:
        saved.stream.close()


def load_saved(model: nn.Module, saved: Saved, task: str) -> list[str]:
    """Fill the skeleton ``model`` with what is being read; the names of its modules that are new.

    Raises:
        BackboneError: for a folder that lacks or misshapes a tensor.
    """
    manifest, header = saved.manifest, saved.header
    modules = dict(model.named_modules(remove_duplicate=False))
    ties = manifest.get("ties", {})
    layers = {path: source for path, source in manifest["layers"].items() if path in modules}  # not another task's head
    for source in layers.values():
        if not {f"{source}.codes", f"{source}.scale"} <= header.keys():
            raise BackboneError(f"backbone '{saved.folder}' is not complete: it lacks the weights of {source}")
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in header}
    parameters = {
        name: ties.get(name, name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] not in layers or not name.endswith(".weight")
    }
    _check_shapes(model, {name: header[stored] for name, stored in parameters.items() if stored in header})
    wanted = {f"{source}.{part}" for source in layers.values() for part in ("codes", "scale")}
    tensors = saved.only(wanted | buffers.keys() | set(parameters.values()))
    matrices = {
        source: QuantizedWeight(
            tensors[f"{source}.codes"], tensors[f"{source}.scale"], manifest["scheme"], manifest["block_size"],
            getattr(torch, manifest["types"][source]),
        )
        for source in dict.fromkeys(layers.values())
    }  # fmt: skip
    for path, source in layers.items():
        if quantizable(modules[path]):
            put_(modules[path], matrices[source], checked=True)
    loaded = {
        name: nn.Parameter(tensors[name], requires_grad=False) for name in set(parameters.values()) & tensors.keys()
    }
    for name, stored in parameters.items():
        if stored in loaded:
            owner, _, leaf = name.rpartition(".")
            modules[owner]._parameters[leaf] = loaded[stored]
    if buffers:
        saved.stream.finish()
    for name, buffer in buffers.items():
        buffer.copy_(tensors[name])
    new = sorted({name.rpartition(".")[0] for name, p in model.named_parameters() if p.device.type == "meta"})
    new = check_new(model, str(saved.folder), task, new)
    _initialise(model, new, saved.device)
    return new


def _check_shapes(model: nn.Module, entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        shape = tuple(model.get_parameter(name).shape)
        if entry.shape != shape:
            raise BackboneError(f"{name} is {entry.shape} in the folder, {shape} in the model")


def _initialise(model: nn.Module, new: list[str], device: torch.device) -> None:
    """Give the modules that the file lacks the architecture's own initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in new:
            module = model.get_submodule(name).to_empty(device="cpu")
            for part in module.modules():
                model._init_weights(part)  # type: ignore[operator]
            module.to(device)
