"""Fine-tuned models of the finetuna API in the LightningModule, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from finetuna_lightning.backbone import quantized_layers
from finetuna_lightning.configs import AdapterConfig
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.finetuned import (
    LinearAdapterConfig,
    get_model_mem_consumption,
    new_finetuned,
    prepare_base_model,
)
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.precision import EightBitPrecision
from tests.helpers.models import tiny_model
from tests.helpers.tiny import tiny_batches, tiny_fit, tiny_llama_folder


def test_finetuned_models_are_trained_in_place_and_come_back(tmp_path: Path) -> None:
    base = prepare_base_model(LlamaForCausalLM.from_pretrained(tiny_llama_folder(tmp_path)))
    linear = LinearAdapterConfig(r=3, alpha=6)
    models = {name: new_finetuned(base, ["q_proj"], linear_config=linear, seed=seed) for seed, name in enumerate("ab")}
    before = {name: [p.detach().clone() for p in model.parameters()] for name, model in models.items()}
    module = MultiAdapterModule(base, dict.fromkeys("abc", AdapterConfig(rank=2, lr=1e-2)), finetuned=models)
    assert [module.adapter_configs[name].rank for name in "abc"] == [3, 3, 2]
    tiny_fit(module, tiny_batches("abc", 3))
    ids = torch.arange(8).view(2, 4)
    for name, model in models.items():
        pairs = zip(model.parameters(), before[name], strict=True)
        assert not any(torch.equal(now, then) for now, then in pairs if now.dim() == 2)
        with module.adapters.route([name] * 2), torch.no_grad():
            wanted = base(ids).logits
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, wanted)
            torch.testing.assert_close(module.finetuned(name)(ids).logits, wanted)
    assert get_model_mem_consumption(base, module.adapters) == get_model_mem_consumption(
        base, module.adapters, *models.values(), module.finetuned("c")
    )


def test_finetuned_models_that_do_not_fit(tmp_path: Path) -> None:
    base, other = (
        prepare_base_model(LlamaForCausalLM.from_pretrained(tiny_llama_folder(tmp_path / str(seed), seed)))
        for seed in (0, 1)
    )
    model = new_finetuned(other, ["q_proj"])
    with pytest.raises(ConfigError, match="no AdapterConfig of that name"):
        MultiAdapterModule(base, {"a": AdapterConfig()}, finetuned={"b": model})
    with pytest.raises(ConfigError, match="not made by new_finetuned"):
        MultiAdapterModule(base, {"a": AdapterConfig()}, finetuned={"a": other})
    with pytest.raises(ConfigError, match="stands over another base"):
        MultiAdapterModule(base, {"a": AdapterConfig()}, finetuned={"a": model}).configure_model()


def test_a_base_prepared_without_quantising_stays_so() -> None:
    base = prepare_base_model(tiny_model("llama"), do_not_quantize=True)
    module = MultiAdapterModule(base, {"a": AdapterConfig(target_modules=["q_proj"])})
    tiny_fit(module, tiny_batches(["a"], 1), plugins=[EightBitPrecision()])
    assert not quantized_layers(base)
