"""A language model of a few thousand random weights, and batches for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from finetuna_lightning.configs import AdapterConfig, BackboneConfig
from finetuna_lightning.training.module import MultiAdapterModule

VOCAB_SIZE = 64


def tiny_llama_folder(path: Path, seed: int = 0) -> str:
    """Save a random two-layer Llama in ``path``; its name, for ``BackboneConfig`` and ``from_pretrained``."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


class Batches:
    """A loader of ready batches. (Lightning takes a bare list for a list of loaders.)"""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)


def tiny_batches(
    names: Sequence[str], steps: int, rows: int | Sequence[int] = 2, length: int = 12, vocab: int = VOCAB_SIZE
) -> Batches:
    """``steps`` joint batches of random tokens without pads, the same at every call; ``rows`` of each adapter."""
    counts = [rows] * len(names) if isinstance(rows, int) else list(rows)
    generator = torch.Generator().manual_seed(0)
    batches: list[dict[str, Any]] = []
    for _ in range(steps):
        ids = torch.randint(vocab, (sum(counts), length), generator=generator)
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids.clone(),
                "adapters": list(names),
                "rows": list(counts),
            }
        )
    return Batches(batches)


def tiny_module(folder: Path, adapters: dict[str, dict[str, Any]], **backbone: Any) -> MultiAdapterModule:
    """A module over ``tiny_llama_folder(folder)``; adapters by the fields of their ``AdapterConfig``."""
    config = BackboneConfig(tiny_llama_folder(folder / "llama"), **backbone)
    return MultiAdapterModule(config, {name: AdapterConfig(**fields) for name, fields in adapters.items()})


def tiny_fit(
    module: LightningModule,
    train: Batches,
    *callbacks: Callback,
    val: Batches | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> Trainer:
    """Fit on the CPU for one epoch, unless ``options`` say otherwise, with nothing around but ``callbacks``."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    if not any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks):
        quiet["enable_progress_bar"] = False
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **options})
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer
