"""Shared by the benchmarks: random backbones of real shapes, batches of random tokens, a table that names the
machine."""

from __future__ import annotations

import platform
import time
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn

from finetuna_lightning.backbone import skeleton
from finetuna_lightning.nn.quantized import QuantizedWeight, quantizable, quantize_embedding_, quantize_linear_

LLAMA_3_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
)  # fmt: skip


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


def random_batches(adapters: list[str], steps: int, rows: int, tokens: int, vocab_size: int) -> Any:
    """A loader of ``steps`` joint batches: ``rows`` sequences of ``tokens`` random tokens for each adapter."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        ids = torch.randint(0, vocab_size, (rows * len(adapters), tokens), generator=generator)
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids.clone(),
                "adapters": list(adapters),
                "rows": [rows] * len(adapters),
            }
        )
    return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class StepTimer(Callback):
    """Seconds of each training step, from batch start to batch start, synchronised."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def median(self, skip: int = 3) -> float:
        """The median step, the first ``skip`` left out."""
        steps = sorted(b - a for a, b in zip(self.marks[skip:], self.marks[skip + 1 :], strict=False))
        return steps[len(steps) // 2]


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
