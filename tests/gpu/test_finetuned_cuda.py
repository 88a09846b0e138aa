"""The finetuna API on a CUDA device: one storage there too, bitsandbytes' optimizers, the compiler, mixed precision."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import finetuna_lightning as ft
from finetuna_lightning.finetuned import adapter_of
from tests.helpers.models import excite, tiny_inputs, tiny_model


def inputs() -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tiny_inputs("llama", rows=3, length=8).items()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: Any, steps: int = 8) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        ids = inputs()["input_ids"]
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        model.backward(loss)  # type: ignore[operator]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_models_moved_one_by_one_share_the_base_on_the_device() -> None:
    base = ft.prepare_base_model(tiny_model("llama", hidden_size=256, intermediate_size=1024))
    models = [ft.new_finetuned(base, ["q_proj"], plain_layers=()) for _ in range(3)]
    gc.collect()
    before = torch.cuda.memory_allocated()
    models[0].cuda()
    one = torch.cuda.memory_allocated() - before
    for model in models[1:]:
        model.cuda()
    frozen = ft.get_model_mem_consumption(base)
    own = sum(p.numel() * 4 for model in models for p in model.parameters())
    assert ft.get_model_mem_consumption(*models) == frozen + own
    assert torch.cuda.memory_allocated() - before - one < 4 * own < frozen
    late = ft.new_finetuned(base, ["q_proj"], plain_layers=()).cuda()
    for name, tensor in models[0].named_buffers():
        assert all(dict(model.named_buffers())[name].data_ptr() == tensor.data_ptr() for model in [*models, late])
    assert all(torch.equal(logits(model), logits(late)) for model in models)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit", "AdamW"])
def test_bitsandbytes_optimizers(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = ft.prepare_base_model(tiny_model("llama", hidden_size=128, intermediate_size=256)).cuda()
    before = logits(base)
    model = ft.new_finetuned(base, linear_config=ft.LinearAdapterConfig(r=16, alpha=16))
    rate = 1e-3 if "Lion" in name else 1e-2
    losses = train(model, getattr(bitsandbytes.optim, name)(model.parameters(), lr=rate))
    assert losses[-1] < 0.9 * losses[0] and torch.equal(logits(base), before)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch 2.11 itself calls it
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch 2.11's inductor
def test_compiled_as_eager() -> None:
    torch._dynamo.reset()
    model = ft.new_finetuned(ft.prepare_base_model(tiny_model("llama", scale=3.0, use_cache=False)))
    excite(adapter_of(model))
    model.cuda()
    wanted = model(**inputs()).logits
    model.backward(wanted.square().mean())  # type: ignore[operator]
    eager = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    out = torch.compile(model, fullgraph=True)(**inputs()).logits
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    for parameter, grad in zip(model.parameters(), eager, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_and_casts(dtype: torch.dtype) -> None:
    base = ft.prepare_base_model(tiny_model("llama", scale=2.0)).cuda()
    model = ft.new_finetuned(base)
    wide = logits(model)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, losses = inputs()["input_ids"], []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = model(ids, labels=ids).loss
        model.backward(scaler.scale(loss))  # type: ignore[operator]
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    narrow = logits(ft.new_finetuned(base).to(dtype))
    assert narrow.dtype == dtype and (narrow.float() - wide).abs().max() < 0.05 * wide.abs().max()
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert out.shape[0] == 3
