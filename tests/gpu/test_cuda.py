"""What must hold on a CUDA device: operators against float64 on the CPU, routing, and whole runs of the quickstart."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import finetuna_lightning as ft
from finetuna_lightning.backbone import enable_checkpointing, fingerprints, load_backbone
from finetuna_lightning.nn.quantized import QuantizedLinear, quantize_
from finetuna_lightning.ops import library, reference

SCHEMES = ("int8", "int8-blockwise", "fp8")


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm())


def quantized_pair(scheme: str, out: int, into: int, dtype: torch.dtype) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer on the GPU, and its exact weight in float64 on the CPU."""
    torch.manual_seed(0)
    layer = nn.Linear(into, out).cuda().to(dtype)
    quantize_(layer, scheme)
    assert isinstance(layer, QuantizedLinear)
    cpu = copy.deepcopy(layer.quantized).cpu()
    return layer, cpu.dequantize(torch.float64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("out", "into"), [(96, 64), (33, 57)])
def test_linear_agrees_with_float64(scheme: str, dtype: torch.dtype, bound: float, out: int, into: int) -> None:
    layer, weight = quantized_pair(scheme, out, into, dtype)
    x = torch.randn(3, 17, into, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 17, out, device="cuda", dtype=dtype)
    y = layer(x)
    y.backward(grad)
    assert relative(y, x.detach().double().cpu() @ weight.t() + layer.bias.double().cpu()) < bound
    assert x.grad is not None
    assert relative(x.grad, grad.double().cpu() @ weight) < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantising_on_the_gpu_gives_the_same_matrix(scheme: str) -> None:
    weight = torch.randn(129, 131)
    codes, scale = reference.quantize(weight, scheme)
    codes_gpu, scale_gpu = reference.quantize(weight.cuda(), scheme)
    assert torch.allclose(scale_gpu.cpu(), scale, rtol=1e-6)
    close = (codes_gpu.cpu().int() - codes.int()).abs()
    assert close.max() <= 1 and (close > 0).float().mean() < 1e-3  # a quotient on the very edge of two codes
    assert reference.fingerprint(codes.cuda()) == reference.fingerprint(codes)


def test_fp8_compute_forward_and_backward() -> None:
    layer, weight = quantized_pair("fp8", 256, 128, torch.bfloat16)
    layer.quantized.compute = "fp8"
    x = torch.randn(5, 33, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 33, 256, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    # e4m3 keeps 3 bits of mantissa: 2.6% an element for a Gaussian operand, and one operand is exact here
    assert 1e-3 < relative(y - layer.bias, x.detach().double().cpu() @ weight.t()) < 0.04
    assert x.grad is not None
    assert 1e-3 < relative(x.grad, grad.double().cpu() @ weight) < 0.04


def test_fp8_compute_says_once_where_it_cannot() -> None:
    library._say_not_8bit.cache_clear()
    layer, weight = quantized_pair("fp8", 40, 24, torch.bfloat16)
    layer.quantized.compute = "fp8"
    x = torch.randn(4, 24, device="cuda", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="multiples of 16"):
        y = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    assert relative(y - layer.bias, x.double().cpu() @ weight.t()) < 0.02


def test_tied_storage_and_fingerprints_survive_the_move() -> None:
    model = load_backbone("quickstart")
    before = fingerprints(model)
    model.cuda()
    assert model.lm_head.quantized.codes.data_ptr() == model.model.embed_tokens.quantized.codes.data_ptr()
    assert fingerprints(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_joint_gradients_are_those_of_each_alone(checkpointing: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_backbone("quickstart", device="cuda")
    if checkpointing:
        enable_checkpointing(model)
        from finetuna_lightning.backbone import recompute_in_training

        recompute_in_training(model, True)
    bank = ft.AdapterBank(model)
    bank.add("one", rank=4, dropout=0.1, seed=1)
    bank.add("two", rank=7, targets=["q_proj", "down_proj"], plain=["lm_head"], seed=2)
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, 4096, (5, 64), device="cuda")

    def gradients(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bank.zero_grad()
        for adapter in bank.adapters():
            adapter.calls = 0
        names = [name for name, part in rows.items() for _ in range(len(part))]
        with bank.route(names, training=True):
            logits = model(torch.cat(list(rows.values())), use_cache=False).logits.float()
        loss = torch.zeros((), device="cuda")
        for piece, part in zip(logits.split([len(p) for p in rows.values()]), rows.values(), strict=True):
            loss = loss + nn.functional.cross_entropy(piece[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        loss.backward()
        return {name: p.grad.clone() for name, p in bank.named_parameters() if p.grad is not None}

    joint = gradients({"one": ids[:2], "two": ids[2:]})
    alone = gradients({"one": ids[:2]}) | gradients({"two": ids[2:]})
    assert joint.keys() == alone.keys() == dict(bank.named_parameters()).keys()
    for name, gradient in joint.items():
        assert relative(gradient, alone[name]) < 1e-4, name


class _Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_the_quickstart_trains(optim: str, tmp_path: Path) -> None:
    if optim != "adamw":
        pytest.importorskip("bitsandbytes")
    module = ft.MultiAdapterModule(
        ft.BackboneConfig(),
        {name: ft.AdapterConfig(rank=8, lr=3e-3) for name in ("english", "bytecode")},
        ft.OptimConfig(optim),
    )
    data = ft.AdapterDataModule(
        {name: ft.DataConfig(f"quickstart:{name}", max_length=128) for name in ("english", "bytecode")}
    )
    losses, memory = _Losses(), ft.AdapterMemoryMonitor(every_n_steps=5, table=False)
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, max_steps=30, logger=False, default_root_dir=tmp_path, limit_val_batches=2,
        plugins=[ft.EightBitPrecision()], enable_progress_bar=False, enable_model_summary=False, val_check_interval=15,
        check_val_every_n_epoch=None, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[ft.FreezeQuantizedWeights(), memory, ft.AdapterCheckpoint("adapters"), losses],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert next(module.backbone.parameters()).dtype == torch.bfloat16
    assert sum(losses.seen[-5:]) / 5 < 0.85 * losses.seen[0]
    report = memory.report()
    assert report["peak"] > module.adapters.backbone_nbytes
    assert all(part["activations"] > 0 for part in report["adapters"].values())
    again = ft.AdapterBank(load_backbone("quickstart", device="cuda", dtype=torch.bfloat16))
    assert torch.equal(
        next(again.load("english", tmp_path / "adapters" / "english" / "last").parameters()).cpu(),
        next(module.adapters["english"].parameters()).cpu(),
    )
