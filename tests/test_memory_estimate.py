"""The estimate against real steps: standing bytes to the byte, activations and peaks as torch's own counters say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from finetuna_lightning.backbone import enable_checkpointing, quantize_model_
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, OptimConfig
from finetuna_lightning.memory_estimate import (
    MemoryEstimate,
    Sequences,
    estimate_memory,
)
from finetuna_lightning.training.callbacks.memory import SavedForBackward
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import optimizer_bytes
from tests.helpers.tiny import tiny_batches, tiny_fit

VOCAB = 256
ROWS, TOKENS = 2, 96


def llama(layers: int = 6, **changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **changes,
    )  # fmt: skip


def real(config: Any, scheme: str = "int8", recompute: bool = False) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    quantize_model_(model.eval(), scheme)
    if recompute:
        enable_checkpointing(model)
    return model


class Meter(Callback):
    """Over two steps: the most that torch's CPU allocator had given out since the first began (it forgets what is freed
    of older memory); of the second, what its forward pass saved for the backward pass; at the end, the optimizer's
    state."""

    def __init__(self) -> None:
        self.peak = self.saved = 0
        self.optimizer: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._profile = torch.autograd.profiler.profile(profile_memory=True)
            self._profile.__enter__()
        self._saved = SavedForBackward(pl_module)
        self._saved.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._saved.stop()
        self.saved = self._saved.total

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self._profile.__exit__(None, None, None)
            events = [event for event in self._profile.kineto_results.events() if event.name() == "[memory]"]
            now = 0
            for event in sorted(events, key=lambda event: event.start_ns()):
                now += event.nbytes()
                self.peak = max(self.peak, now)
            assert isinstance(pl_module, MultiAdapterModule)
            self.optimizer = optimizer_bytes(pl_module.optimizer)


def measured(model: nn.Module, adapters: dict[str, AdapterConfig], optim: OptimConfig | None = None) -> Meter:
    meter = Meter()
    tiny_fit(MultiAdapterModule(model, adapters, optim), tiny_batches(list(adapters), 2, ROWS, TOKENS, VOCAB), meter)
    return meter


def made_in_a_step(found: MemoryEstimate) -> int:
    """The peak without what stands before the first step."""
    return found.peak - found.backbone - sum(own.weights for own in found.adapters.values())


ADAPTERS = {"a": AdapterConfig(rank=8), "b": AdapterConfig(rank=4, dropout=0.1), "c": AdapterConfig(rank=8)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "none"])
def test_the_peak_of_a_step(recompute: bool, scheme: str) -> None:
    config = llama()
    found = estimate_memory(
        config, ADAPTERS, Sequences(ROWS, TOKENS),
        backbone=BackboneConfig(scheme=scheme, gradient_checkpointing=recompute),
    )  # fmt: skip
    print(made_in_a_step(found), found.activations)
    meter = measured(real(config, scheme, recompute), ADAPTERS)
    print(meter.peak, meter.saved)
    assert made_in_a_step(found) == pytest.approx(meter.peak, rel=0.02)
    if not recompute:
        assert found.activations == pytest.approx(meter.saved, rel=0.001)
