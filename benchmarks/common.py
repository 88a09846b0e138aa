"""Shared by the benchmarks: random backbones of real shapes, joint batches of random tokens, a table that names the
machine."""

from __future__ import annotations

import gc
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from finetuna_lightning.backbone import skeleton
from finetuna_lightning.nn.quantized import QuantizedWeight, quantizable, quantize_embedding_, quantize_linear_
from finetuna_lightning.nn.routing import is_routed, unroute_
from finetuna_lightning.training.batches import collate
from finetuna_lightning.training.tokenizing import Example

LLAMA_3_8B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
)  # fmt: skip
TINY: dict[str, Any] = LLAMA_3_8B | dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512,  # rank 64 fits
)  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Of activations: bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def llama_config(shape: Mapping[str, Any], layers: int | None = None) -> transformers.LlamaConfig:
    """A configuration of its own each time: a model writes into its own, packing the attention for one."""
    return transformers.LlamaConfig(**{**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]})


def random_backbone(config: Any, scheme: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal language model of ``config``'s shape with random weights, made in 8 bits matrix by matrix."""
    model = skeleton(config, "causal-lm")
    generator = torch.Generator(device).manual_seed(0)
    for module in list(model.modules()):
        if quantizable(module):
            shape = (module.weight.shape[0], module.weight.shape[1])
            weight = torch.randn(shape, generator=generator, device=device, dtype=dtype) * 0.02
            quantized = QuantizedWeight.from_weight(weight, scheme)
            if isinstance(module, nn.Embedding):
                quantize_embedding_(module, quantized)
            else:
                quantize_linear_(module, quantized, checked=True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(
                torch.ones(parameter.shape, dtype=dtype, device=device), requires_grad=False
            )
    return model.to(device)


class SharedBackbone:
    """One random backbone for several fits, made when it is first asked for.

    Args:
        shape: as ``LLAMA_3_8B``.
        scheme: of the storage.
        device: where it stands.
        layers: other than the shape's.
    """

    def __init__(self, shape: Mapping[str, Any], scheme: str, device: torch.device, layers: int | None = None) -> None:
        self.shape, self.scheme, self.device = dict(shape), scheme, device
        self.layers = layers or self.shape["num_hidden_layers"]
        self.dtype = default_dtype(device)
        self._model: nn.Module | None = None

    def model(self) -> nn.Module:
        """The backbone as it was made: without deltas, nothing recomputed."""
        if self._model is None or next(self._model.parameters()).device.type != self.device.type:
            self._model = None  # a fit that failed left it on the CPU
            self._model = random_backbone(llama_config(self.shape, self.layers), self.scheme, self.device, self.dtype)
        for module in self._model.modules():
            if is_routed(module):
                unroute_(module)
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        return self._model.eval()

    def free(self) -> None:
        """Give its memory back."""
        self._model = None
        release_memory()


def release_memory() -> None:
    """Collect what nobody refers to, and give the device's cached blocks back; nothing where there is no GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def joint_batches(
    lengths: Sequence[Mapping[str, Sequence[int]]], vocab_size: int, packed: bool = True, seed: int = 1
) -> list[Any]:
    """A batch for each step: for each adapter sequences of random tokens, of ``lengths[step][adapter]``."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in lengths:
        groups = {}
        for name, own in step.items():
            rows = [torch.randint(0, vocab_size, (length,), generator=generator) for length in own]
            groups[name] = [Example(row, row.clone()) for row in rows]
        batches.append(collate(groups, packed=packed))
    return batches


def loader_of(batches: list[Any]) -> Any:
    """A loader of ready batches, pinned where there is a GPU."""
    pinned = torch.cuda.is_available()
    return torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=pinned)  # type: ignore[arg-type]


def machine() -> str:
    """The device and the versions that a figure belongs to."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = f"lightning {lightning.__version__}, transformers {transformers.__version__}"
    return f"{device}; torch {torch.__version__}, {versions}"


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table, headed by the machine."""
    table = Table(title=f"{title}\n{machine()}", title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
