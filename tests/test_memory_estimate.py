"""The estimate against real steps: standing bytes to the byte, activations and peaks as torch's own counters say."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from benchmarks.common import LLAMA_3_8B
from finetuna_lightning.backbone import enable_checkpointing, quantize_model_, read_config
from finetuna_lightning.configs import OPTIMIZERS, AdapterConfig, BackboneConfig, OptimConfig
from finetuna_lightning.errors import BackboneError
from finetuna_lightning.fused_memory import runs_fused
from finetuna_lightning.memory_estimate import (
    MemoryEstimate,
    Sequences,
    adapters_that_fit,
    estimate_memory,
    optimizer_state_bytes,
    with_one_more,
)
from finetuna_lightning.training.callbacks.memory import SavedForBackward
from finetuna_lightning.training.head import FusedHead
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import optimizer_bytes
from tests.helpers.models import LABELS, task_of, tiny_config, tiny_folder
from tests.helpers.models import VOCAB_SIZE as LETTERS
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit

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


def measured(
    model: nn.Module,
    adapters: dict[str, AdapterConfig] | None = None,
    *,
    packed: bool = False,
    rows: int = ROWS,
    tokens: int = TOKENS,
    vocab: int = VOCAB,
    classes: int = 0,
) -> Meter:
    meter = Meter()
    module = model if isinstance(model, MultiAdapterModule) else MultiAdapterModule(model, adapters or {})
    batches = tiny_batches(module.adapter_names, 2, rows, tokens, vocab).batches
    for batch in batches if packed else ():
        lengths = [tokens] * sum(batch["rows"])
        batch |= {"lengths": lengths, "position_ids": torch.arange(tokens).repeat(len(lengths))[None]}
        batch |= {key: batch[key].view(1, -1) for key in ("input_ids", "labels")}
        del batch["attention_mask"]
    for batch in batches if classes else ():
        batch["labels"] = torch.arange(sum(batch["rows"])) % classes
    tiny_fit(module, Batches(batches), meter)
    return meter


def made_in_a_step(found: MemoryEstimate) -> int:
    """The peak without what stands before the first step."""
    return found.peak - found.backbone - sum(own.weights for own in found.adapters.values())


ADAPTERS = {"a": AdapterConfig(rank=8), "b": AdapterConfig(rank=4, dropout=0.1), "c": AdapterConfig(rank=8)}


@pytest.mark.parametrize(
    ("scheme", "recompute", "packed"),
    [
        ("int8", False, False),
        ("int8", True, False),
        ("int8", False, True),
        ("int8-blockwise", True, True),
        ("none", False, False),
    ],
)
def test_the_peak_of_a_step(scheme: str, recompute: bool, packed: bool) -> None:
    """Two and three of six layers stand for all; the estimate must be within 10% on a GPU and is far nearer here."""
    config = llama()
    backbone = BackboneConfig(scheme=scheme, gradient_checkpointing=recompute)
    found = estimate_memory(config, ADAPTERS, Sequences(ROWS, TOKENS), backbone=backbone, packed=packed)
    meter = measured(real(config, scheme, recompute), ADAPTERS, packed=packed)
    assert made_in_a_step(found) == pytest.approx(meter.peak, rel=0.01)
    if not recompute:  # the checkpoint's own hooks hide what they hold back
        assert found.activations == pytest.approx(meter.saved, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "falcon", "t5", "bert"])
def test_the_peak_of_a_step_of_other_architectures(tmp_path: Path, name: str) -> None:
    layers = {"gpt2": "n_layer", "t5": "num_layers"}.get(name, "num_hidden_layers")
    folder = tiny_folder(tmp_path / "m", name, **{layers: 5})
    backbone = BackboneConfig(folder, task=task_of(name), num_labels=LABELS)
    head = [] if name == "bert" else ["lm_head"]
    adapters = {"a": AdapterConfig(rank=2), "b": AdapterConfig(rank=2, plain_modules=head)}
    found = estimate_memory(read_config(folder), adapters, Sequences(3, 40), backbone=backbone)
    gc.collect()  # what was made without storage can go
    module = MultiAdapterModule(backbone, adapters)
    meter = measured(module, rows=3, tokens=40, vocab=LETTERS, classes=LABELS if name == "bert" else 0)
    assert made_in_a_step(found) == pytest.approx(meter.peak, rel=0.01)
    assert found.activations == pytest.approx(meter.saved, rel=1e-3)
    assert found.backbone == module.adapters.backbone_nbytes


def test_a_model_that_needs_values_is_refused_in_one_line() -> None:
    config = tiny_config("mixtral")
    with pytest.raises(BackboneError, match="cannot be told without running it") as caught:
        estimate_memory(config, {"a": AdapterConfig(rank=2, target_modules=["q_proj"])}, Sequences(1, 8))
    assert "\n" not in str(caught.value)


# ---- what stands: to the byte ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_weights_gradients_and_optimizer_state_are_exact(kind: str) -> None:
    config, optim = llama(2, tie_word_embeddings=True), OptimConfig(kind, momentum=0.5)
    adapters = {
        "a": AdapterConfig(rank=16, target_modules=["all-linear", "embed_tokens"], bias=True),
        "b": AdapterConfig(rank=48, target_modules=["q_proj"], plain_modules=["lm_head"], optimizer="sgd"),
    }
    found = estimate_memory(config, adapters, Sequences(ROWS, TOKENS), optim=optim)
    model = real(config)
    module = MultiAdapterModule(model, adapters, optim)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        meter = measured(module)
    assert found.backbone == module.adapters.backbone_nbytes
    for name, own in found.adapters.items():
        adapter = module.adapters[name]
        assert own.weights == adapter.nbytes
        assert own.gradients == sum(p.numel() * 4 for p in adapter.parameters())
        assert own.optimizer == meter.optimizer[name]
        assert own.standing == own.weights + own.optimizer


def test_paged_state_is_not_on_the_gpu() -> None:
    large, small = torch.empty(1000, 200, device="meta"), torch.empty(100, 100, device="meta")
    assert optimizer_state_bytes("paged_adamw8bit", [large, small], {}, gpu=False) == optimizer_state_bytes(
        "adamw8bit", [large, small], {}, gpu=True
    )
    only = optimizer_state_bytes("adamw8bit", [large, small], {}, gpu=True) - 2 * large.numel()
    assert optimizer_state_bytes("paged_adamw8bit", [large, small], {}, gpu=True) == only


def test_skipped_modules_and_the_type_of_the_rest_count() -> None:
    config, own = llama(1), {"a": AdapterConfig(rank=2)}
    sizes = [
        estimate_memory(config, own, Sequences(1, 8), backbone=BackboneConfig(skip_modules=skip), dtype=dtype).backbone
        for skip in ([], ["lm_head"])
        for dtype in (torch.float32, torch.bfloat16)
    ]
    head = VOCAB * 96
    assert sizes[2] - sizes[0] == 4 * head - (head + 4 * VOCAB)
    assert sizes[3] - sizes[1] == 2 * head - (head + 4 * VOCAB)


# ---- how it grows ----------------------------------------------------------------------------------------------------


def test_an_adapter_that_accumulates_keeps_its_gradients() -> None:
    config = llama(4)
    phases = [
        estimate_memory(config, {"a": AdapterConfig(rank=2, accumulate=n)}, Sequences(1, 64)).step.phases
        for n in (1, 2)
    ]
    once, twice = (phase["backward pass of the head"].gradients for phase in phases)
    assert once == 0
    assert twice == phases[1]["optimizer step"].gradients > 0


def test_targets_of_some_layers_only() -> None:
    """Layers that are not alike do not stand for one another."""
    config = llama(5)
    some = AdapterConfig(rank=8, target_modules=["layers.0.mlp.up_proj", "layers.4.mlp.up_proj"])
    found = estimate_memory(config, {"a": some}, Sequences(ROWS, TOKENS))
    assert made_in_a_step(found) == pytest.approx(measured(real(config), {"a": some}).peak, rel=0.01)


def test_adapters_that_fit_are_those_whose_own_estimate_fits() -> None:
    config, one, each = llama(4), AdapterConfig(rank=4, target_modules=["q_proj", "up_proj"]), Sequences(1, 64)

    def needed(count: int) -> int:
        return estimate_memory(config, {f"a{i}": one for i in range(count)}, each).needed

    given: dict[str, Any] = {
        "architecture": config,
        "adapters": {"a": one, "b": one},
        "sequences": {"a": each, "b": each},
    }
    found = estimate_memory(**given)
    like, more = with_one_more(**given)
    assert like in given["adapters"] and len(more.adapters) == 3
    four, five = needed(4), needed(5)
    for part in (0.02, 0.98):
        assert adapters_that_fit(found, more, round(four + part * (five - four))) == 4
    assert adapters_that_fit(found, more, found.backbone) == 0
    assert adapters_that_fit(found, more, round(1.02 * needed(1))) == 1


def test_on_a_gpu_activations_have_16_bits_and_scores_are_not_kept() -> None:
    config, own = llama(2), {"a": AdapterConfig(rank=2)}
    cpu, gpu = (estimate_memory(config, own, Sequences(2, 128), device=device) for device in ("cpu", "cuda"))
    assert gpu.activations < 0.75 * cpu.activations
    assert gpu.needed - gpu.peak > cpu.needed - cpu.peak == 0
    eager = BackboneConfig(attn_implementation="eager")
    assert estimate_memory(config, own, Sequences(2, 128), device="cuda", backbone=eager).activations > gpu.activations


def test_llama_3_8b_as_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight adapters x 1 x 1,024 tokens on one H200: 62.8 GiB, and 19.2 with recomputation (README of commit 683648d).
    The layers were not fused then, nor was the loss with the head; gradients stood until the next loss was there, as
    those of adapters that accumulate do still."""
    config = transformers.LlamaConfig(**LLAMA_3_8B)
    adapters = {f"a{index}": AdapterConfig(rank=16, alpha=32, accumulate=2) for index in range(8)}
    monkeypatch.setattr(FusedHead, "obstacle", lambda self: "as it was")
    for recompute, gib in ((False, 62.8), (True, 19.2)):
        found = estimate_memory(
            config, adapters, Sequences(1, 1024), optim=OptimConfig("adamw8bit"), device="cuda", fused=False,
            backbone=BackboneConfig(gradient_checkpointing=recompute),
        )  # fmt: skip
        assert found.peak / 2**30 == pytest.approx(gib, rel=0.01)


def test_the_fused_layers_of_a_gpu_as_they_were_measured() -> None:
    """Peaks of `python -m benchmarks.gpu w1 w2 w5` on one H200 (benchmarks/LOG.md, 2026-11-26)."""
    config = transformers.LlamaConfig(**LLAMA_3_8B)
    for count, sequences, recompute, compute, gib, bound in (
        (8, Sequences(1, 1024), False, "auto", 35.93, 0.02),
        (8, Sequences(1, 1024), False, "16bit", 37.92, 0.02),
        (1, Sequences(8, 1024), False, "auto", 34.27, 0.02),
        (1, Sequences(8, 1024), True, "auto", 11.43, 0.05),
        (1, Sequences(1, 1024), False, "auto", 12.20, 0.02),
        (8, Sequences(1, 128), False, "int8", 13.87, 0.02),
    ):
        found = estimate_memory(
            config, {f"a{i}": AdapterConfig(rank=16) for i in range(count)}, sequences, packed=True, device="cuda",
            optim=OptimConfig("adamw8bit"), backbone=BackboneConfig(gradient_checkpointing=recompute), fused=True,
            compute=compute,
        )  # fmt: skip
        assert found.peak / 2**30 == pytest.approx(gib, rel=bound)


@pytest.mark.parametrize(
    ("adapter", "backbone", "dtype"),
    [
        ({"dropout": 0.1}, {}, torch.bfloat16),
        ({"bias": True}, {}, torch.bfloat16),
        ({}, {"scheme": "fp8"}, torch.bfloat16),
        ({}, {"attn_implementation": "eager"}, torch.bfloat16),
        ({}, {"skip_modules": ["lm_head"]}, torch.bfloat16),
        ({}, {}, torch.float32),
    ],
)
def test_what_is_not_fused_is_not_counted_so(adapter: Any, backbone: Any, dtype: torch.dtype) -> None:
    given = llama(4), BackboneConfig(**backbone), [AdapterConfig(rank=2, **adapter)], dtype
    assert not runs_fused(*given, gpu=True)
    if torch.cuda.is_available():
        return
    assert runs_fused(llama(4), BackboneConfig(), [AdapterConfig(rank=2)], torch.bfloat16, gpu=True)
    assert not runs_fused(llama(4), BackboneConfig(), [AdapterConfig(rank=2)], torch.bfloat16, gpu=False)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_loss_is_counted_with_its_head_where_only_a_scale_follows_it(softcap: float | None) -> None:
    """Whole logits of 512 tokens beside those of a chunk, all of which a soft cap keeps."""
    wide = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = tiny_config("gemma3", **wide, final_logit_softcapping=softcap)
    sizes = [
        estimate_memory(config, {"a": AdapterConfig(rank=2)}, Sequences(count, 64)).activations for count in (4, 8)
    ]
    logits = 4 * 64 * 4 * 1024
    assert (sizes[1] - sizes[0] > logits) == (softcap is not None)
