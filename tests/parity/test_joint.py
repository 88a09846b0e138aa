"""One adapter of a joint run against the same adapter trained alone with peft and plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig
from finetuna_lightning.peft_io import WEIGHTS_NAME
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.runs import language_model, text_file
from tests.helpers.tiny import tiny_fit
from tests.helpers.tokenizer import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # what peft asks transformers
STEPS = 50
NAMES = ("sql", "legal", "chat")
RATE, DECAY, NORM = 3e-3, 0.01, 1.0


def data_of(folder: Path, names: tuple[str, ...], packing: bool) -> AdapterDataModule:
    sources = {}
    for index, name in enumerate(NAMES):
        path = text_file(folder / f"{name}.txt", word=name, lines=30 + 9 * index)
        sources[name] = DataConfig(path, max_length=(24, 16, 31)[index], batch_size=(3, 5, 2)[index])
    wanted = {name: sources[name] for name in names}
    return AdapterDataModule(wanted, seed=3, tokenizer=byte_tokenizer(), packing=packing)


def trained_jointly(folder: Path, model: str, packing: bool) -> dict[str, Tensor]:
    """The weights of ``sql`` after a joint run; those before it are in ``folder / "start"``."""
    one: dict[str, Any] = dict(lr=RATE, weight_decay=DECAY, max_grad_norm=NORM, schedule="constant")
    adapters = {
        "sql": AdapterConfig(rank=4, alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], bias=False, **one),
        "legal": AdapterConfig(rank=2, dropout=0.3, plain_modules=["lm_head"], lr=1e-2, accumulate=2),
        "chat": AdapterConfig(rank=8, optimizer="sgd", lr=0.1, max_steps=20, target_modules=["embed_tokens", "o_proj"]),
    }
    module = MultiAdapterModule(BackboneConfig(model, scheme="none", dtype="float32"), adapters)
    module.adapters["sql"].save_pretrained(folder / "start")  # type: ignore[operator]
    data = data_of(folder, NAMES, packing)
    tiny_fit(module, data, max_epochs=-1, max_steps=STEPS, limit_val_batches=0)  # type: ignore[arg-type]
    assert module.adapter_report()["sql"]["steps"] == STEPS and module.adapter_report()["chat"]["steps"] == 20
    module.adapters["sql"].save_pretrained(folder / "end")  # type: ignore[operator]
    return load_file(folder / "end" / WEIGHTS_NAME)


def trained_with_peft(folder: Path, model: str) -> dict[str, Tensor]:
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)
    own = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=RATE, weight_decay=DECAY)
    data = data_of(folder, ("sql",), packing=False)
    data.setup()
    loader, done = data.train_dataloader(), 0
    while done < STEPS:
        for batch in loader:
            logits = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(own, NORM)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == STEPS:
                break
    return dict(peft.get_peft_model_state_dict(tuned))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_fifty_steps_in_company_are_fifty_steps_with_peft(tmp_path: Path, packing: bool) -> None:
    model = language_model(tmp_path / "model", initializer_range=0.3)
    ours, theirs = trained_jointly(tmp_path, model, packing), trained_with_peft(tmp_path, model)
    start = load_file(tmp_path / "start" / WEIGHTS_NAME)
    assert ours.keys() == theirs.keys() == start.keys() and len(ours) == 12
    for name, tensor in theirs.items():
        assert float((tensor - start[name]).norm()) > 1e-2 * float(tensor.norm()), name
        assert float((ours[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
