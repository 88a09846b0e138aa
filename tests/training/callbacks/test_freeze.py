"""The backbone stays frozen, or the fit raises and names what was touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from finetuna_lightning.errors import ConfigError, FrozenWeightError
from finetuna_lightning.training.callbacks import freeze
from finetuna_lightning.training.callbacks.freeze import FreezeQuantizedWeights
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import build_optimizer
from tests.helpers.tiny import tiny_batches, tiny_fit, tiny_module

ADAPTERS: dict[str, dict[str, Any]] = {"sql": {"rank": 4}, "legal": {"rank": 2, "target_modules": ["q_proj"]}}
STEPS = 3


class At(Callback):
    """Does something once, after a given optimizer step."""

    def __init__(self, step: int, action: Callable[[Trainer, Any], None]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer, pl_module)


def fit(module: pl.LightningModule, *callbacks: Callback, validate: bool = False, **options: Any) -> None:
    val = tiny_batches(list(ADAPTERS), 1) if validate else None
    tiny_fit(module, tiny_batches(list(ADAPTERS), STEPS), *callbacks, val=val, **options)


@pytest.fixture
def module(tmp_path: Path) -> MultiAdapterModule:
    return tiny_module(tmp_path, ADAPTERS)


def test_an_untouched_backbone_passes_and_is_said_to_be_unchanged(
    module: MultiAdapterModule, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(module, FreezeQuantizedWeights(check_every_n_steps=1))
    # 7 matrices in each of 2 layers, the embedding and the head; 2 norms a layer, and the last
    held = module.adapters.backbone_nbytes - sum(
        buffer.nbytes for name, buffer in module.adapters.backbone.named_buffers() if "inv_freq" in name
    )
    assert f"16 8-bit matrices and 5 other frozen tensors unchanged ({held:,} bytes)" in caplog.text


def test_what_was_thawed_before_the_fit_is_frozen_at_its_start(module: MultiAdapterModule) -> None:
    module.configure_model()
    norm = module.get_parameter("backbone.model.norm.weight")
    norm.requires_grad_(True)
    fit(module, FreezeQuantizedWeights())
    assert not norm.requires_grad
    assert all(parameter.requires_grad for parameter in module.adapters.parameters())


@pytest.mark.parametrize(
    ("path", "tensor"),
    [("model.layers.1.mlp.up_proj", "codes"), ("model.layers.0.self_attn.q_proj", "scale"), ("lm_head", "codes")],
)
def test_one_overwritten_value_raises_and_names_the_module(module: MultiAdapterModule, path: str, tensor: str) -> None:
    def overwrite(trainer: Trainer, pl_module: Any) -> None:
        values = getattr(pl_module.backbone.get_submodule(path).quantized, tensor)
        values.view(-1)[5] += 1

    with pytest.raises(FrozenWeightError, match=re.escape(path)) as error:
        fit(module, At(STEPS, overwrite), FreezeQuantizedWeights())
    assert "model.layers.0.mlp" not in str(error.value)


def test_an_overwritten_norm_raises_and_names_it(module: MultiAdapterModule) -> None:
    def overwrite(trainer: Trainer, pl_module: Any) -> None:
        pl_module.get_parameter("backbone.model.norm.weight").data[0] += 0.5

    with pytest.raises(FrozenWeightError, match=r"model\.norm\.weight changed"):
        fit(module, At(1, overwrite), FreezeQuantizedWeights())


def test_a_replaced_matrix_raises(module: MultiAdapterModule) -> None:
    def replace(trainer: Trainer, pl_module: Any) -> None:
        pl_module.backbone.lm_head = nn.Linear(32, 64)

    with pytest.raises(FrozenWeightError, match=r"lm_head.*lm_head\.weight.* changed") as error:
        fit(module, At(1, replace), FreezeQuantizedWeights())
    assert "thawed" in str(error.value)


def test_of_many_changes_the_first_are_named_and_all_counted(module: MultiAdapterModule) -> None:
    def overwrite(trainer: Trainer, pl_module: Any) -> None:
        for name, buffer in pl_module.backbone.named_buffers():
            if name.endswith("codes"):
                buffer.zero_()

    with pytest.raises(FrozenWeightError, match="and 11 more"):
        fit(module, At(1, overwrite), FreezeQuantizedWeights())


def test_a_change_is_found_in_mid_fit_where_that_was_asked_for(module: MultiAdapterModule) -> None:
    reached: list[int] = []

    def overwrite(trainer: Trainer, pl_module: Any) -> None:
        pl_module.backbone.lm_head.quantized.codes.zero_()

    late = At(2, lambda trainer, pl_module: reached.append(2))
    last = At(3, lambda trainer, pl_module: reached.append(3))
    with pytest.raises(FrozenWeightError, match="lm_head"):
        fit(module, At(1, overwrite), late, FreezeQuantizedWeights(check_every_n_steps=2), last)
    assert reached == [2]


def test_fingerprints_are_taken_as_often_as_asked_for(
    module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    original = freeze._fingerprints
    monkeypatch.setattr(freeze, "_fingerprints", lambda model: (taken.append(module.global_step), original(model))[1])
    fit(module, FreezeQuantizedWeights(check_every_n_steps=2), max_epochs=2)
    assert taken == [0, 2, 4, 6, 6]


def thaw(trainer: Trainer, pl_module: Any) -> None:
    pl_module.get_parameter("backbone.model.norm.weight").requires_grad_(True)


@pytest.mark.parametrize("when", ["at the end", "at the next epoch", "at validation"])
def test_a_parameter_thawed_in_mid_fit_raises_and_is_named(module: MultiAdapterModule, when: str) -> None:
    steps: list[int] = []
    noted = [At(step, lambda trainer, pl_module: steps.append(trainer.global_step)) for step in range(1, 7)]
    freezer = FreezeQuantizedWeights()
    at = STEPS if when == "at the next epoch" else 1
    if when == "at validation":
        freezer.on_train_epoch_start = freezer.on_fit_end = lambda *_: None  # type: ignore[method-assign]
    if when == "at the next epoch":
        freezer.on_fit_end = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(FrozenWeightError, match=r"model\.norm\.weight thawed"):
        fit(module, At(at, thaw), freezer, *noted, max_epochs=2 if when == "at the next epoch" else 1,
            validate=when == "at validation")  # fmt: skip
    assert steps == [1, 2, 3]


def test_a_backbone_parameter_in_the_optimizer_raises_before_the_first_step(tmp_path: Path) -> None:
    class Greedy(MultiAdapterModule):
        def configure_optimizers(self) -> Any:
            optimizer = build_optimizer(
                {adapter.name: adapter.parameters() for adapter in self.adapters.adapters()},
                self.adapter_configs,
                self.optim_config,
            )
            norm = self.get_parameter("backbone.model.norm.weight")
            optimizer.add_param_group({"params": [norm], "name": "norm", "max_grad_norm": None})
            return optimizer

    class Started(Callback):
        def on_train_start(self, *_: Any) -> None:
            reached.append("training")

    reached: list[str] = []
    started = Started()
    plain = tiny_module(tmp_path, ADAPTERS)
    assert plain.backbone_config is not None
    module = Greedy(plain.backbone_config, plain.adapter_configs)
    with pytest.raises(FrozenWeightError, match=r"model\.norm\.weight in an optimizer's parameter group"):
        fit(module, FreezeQuantizedWeights(), started)
    assert reached == []


def test_a_fit_that_fails_keeps_its_own_error(module: MultiAdapterModule) -> None:
    def fail(trainer: Trainer, pl_module: Any) -> None:
        pl_module.backbone.lm_head.quantized.codes.zero_()
        raise ZeroDivisionError("the first fault")

    freezer = FreezeQuantizedWeights()
    with pytest.raises(ZeroDivisionError, match="the first fault"):
        fit(module, At(1, fail), freezer)
    fit(module, freezer)  # and the next fit starts afresh


def test_a_backbone_without_8_bit_layers_warns_and_is_guarded_all_the_same(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, ADAPTERS, scheme="none")

    def overwrite(trainer: Trainer, pl_module: Any) -> None:
        pl_module.backbone.lm_head.weight.data[0, 0] += 1

    with (
        pytest.warns(UserWarning, match=r"no 8-bit layer.*EightBitPrecision.*scheme"),
        pytest.raises(FrozenWeightError, match=r"lm_head\.weight"),
    ):
        fit(module, At(1, overwrite), FreezeQuantizedWeights())


def test_a_module_without_a_backbone_is_told_so() -> None:
    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(torch.ones(1, 2)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="Other has none"):
        fit(Other(), FreezeQuantizedWeights())


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_a_bad_interval_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="check_every_n_steps"):
        FreezeQuantizedWeights(value)
