"""The precision plugin: what it quantises, what it leaves alone, which types it computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetuna_lightning.backbone import fingerprints, quantize_model_, quantized_layers
from finetuna_lightning.configs import AdapterConfig
from finetuna_lightning.errors import ConfigError, TargetError
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear
from finetuna_lightning.training import precision
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.precision import EightBitPrecision, has_fp8, refuse_joint_clipping, resolve_dtype
from tests.helpers.models import PlainNet, plain_net
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit, tiny_llama_folder, tiny_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Holder(nn.Module):
    """A module that is not ours: a backbone, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = plain_net()
        self.head = nn.Linear(4, 4)


def plain_module() -> MultiAdapterModule:
    adapters = {"a": AdapterConfig(rank=2, target_modules=["first"], plain_modules=["head"])}
    return MultiAdapterModule(plain_net(), adapters, loss=lambda output, batch: output.square().mean())


# ---- what is converted ----------------------------------------------------------------------------------------------


def test_the_backbone_is_quantised_and_frozen_and_nothing_else() -> None:
    holder = Holder()
    assert EightBitPrecision().convert_module(holder) is holder
    assert isinstance(holder.backbone.table, QuantizedEmbedding)
    assert isinstance(holder.backbone.block[0], QuantizedLinear)
    assert {q.scheme for q in quantized_layers(holder.backbone).values()} == {"int8"}
    assert not any(p.requires_grad for p in holder.backbone.parameters())
    assert type(holder.head) is nn.Linear
    assert holder.head.weight.requires_grad


def test_a_second_conversion_changes_nothing() -> None:
    holder, plugin = Holder(), EightBitPrecision()
    plugin.convert_module(holder)
    before = fingerprints(holder.backbone)
    codes = {name: q.codes.data_ptr() for name, q in quantized_layers(holder.backbone).items()}
    plugin.convert_module(holder)
    EightBitPrecision(scheme="fp8").convert_module(holder)
    assert fingerprints(holder.backbone) == before
    assert {name: q.codes.data_ptr() for name, q in quantized_layers(holder.backbone).items()} == codes


@pytest.mark.parametrize(("scheme", "block_size"), [("int8-blockwise", 256), ("fp8", 64)])
def test_the_scheme_is_a_setting(scheme: str, block_size: int) -> None:
    holder = Holder()
    EightBitPrecision(scheme, block_size).convert_module(holder)
    found = quantized_layers(holder.backbone).values()
    assert {(q.scheme, q.block_size) for q in found} == {(scheme, block_size)}


def test_modules_can_be_left_in_full_precision() -> None:
    holder = Holder()
    EightBitPrecision(skip_modules=["head"]).convert_module(holder)
    assert type(holder.backbone.head) is nn.Linear
    assert isinstance(holder.backbone.block[0], QuantizedLinear)
    with pytest.raises(TargetError, match="haed"):
        EightBitPrecision(skip_modules=["haed"]).convert_module(Holder())


def test_a_module_without_a_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has none: name it so"):
        EightBitPrecision().convert_module(nn.Linear(2, 2))


def test_a_configured_backbone_keeps_its_own_scheme(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, {"a": {"rank": 2}}, scheme="none")
    tiny_fit(module, tiny_batches(["a"], 1), plugins=[EightBitPrecision("fp8")])
    assert module.backbone is not None
    assert quantized_layers(module.backbone) == {}


def test_a_plain_backbone_gets_the_plugin_s_scheme_and_the_adapters_stay_whole() -> None:
    module = plain_module()
    batch = {"input_ids": torch.randint(99, (4, 5)), "labels": torch.zeros(4), "adapters": ["a"], "rows": [4]}
    tiny_fit(module, Batches([batch]), plugins=[EightBitPrecision("fp8")])
    assert module.backbone is not None
    assert {q.scheme for q in quantized_layers(module.backbone).values()} == {"fp8"}
    assert {p.dtype for p in module.adapters.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in module.adapters.parameters())
    assert type(module.adapters["a"].plain["head"]) is nn.Linear


class Ordinary(pl.LightningModule):
    """A user's own LightningModule, which knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = plain_net().train()
        self.own = nn.Linear(3, 1)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        return self.own(self.backbone(batch["input_ids"])).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.own.parameters(), lr=0.1)


def test_any_lightning_module_with_a_backbone_can_be_trained() -> None:
    module = Ordinary()
    before = module.own.weight.detach().clone()
    tiny_fit(module, Batches([{"input_ids": torch.randint(99, (4, 5))}]), plugins=[EightBitPrecision()])
    assert isinstance(module.backbone, PlainNet)
    assert isinstance(module.backbone.head, QuantizedLinear)
    assert not torch.equal(module.own.weight, before)


# ---- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_is_float32_on_the_cpu_and_sixteen_bits_on_a_gpu(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert resolve_dtype("auto", CPU) is torch.float32
    assert resolve_dtype("auto", CUDA) is (torch.bfloat16 if bf16 else torch.float16)
    assert resolve_dtype("auto", torch.device("mps")) is torch.bfloat16
    assert resolve_dtype("float16", CPU) is torch.float16


def test_what_is_not_quantised_and_the_activations_have_the_asked_type() -> None:
    holder = Holder()
    EightBitPrecision(dtype="bfloat16").convert_module(holder)
    assert holder.backbone.norm.weight.dtype is torch.bfloat16
    assert holder.backbone(torch.randint(99, (2, 3))).dtype is torch.bfloat16
    assert holder.head.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("machine", "amx", "avx512", "dtype", "compute", "said"),
    [
        ("x86_64", False, False, "bfloat16", "auto", 1),
        ("AMD64", False, False, "bfloat16", "auto", 1),
        ("x86_64", True, False, "bfloat16", "auto", 0),
        ("x86_64", False, True, "bfloat16", "auto", 0),
        ("x86_64", False, False, "float32", "auto", 0),
        ("aarch64", False, False, "bfloat16", "auto", 0),
        ("x86_64", False, False, "bfloat16", "int8", 0),
    ],
)
def test_a_cpu_that_multiplies_bfloat16_slower_is_named(
    machine: str, amx: bool, avx512: bool, dtype: str, compute: str, said: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with caplog.at_level("INFO"):
        holder = Holder()
        EightBitPrecision(dtype=dtype, compute=compute).convert_module(holder)
        assert caplog.text.count("slower than float32") == said
        EightBitPrecision(dtype=dtype, compute=compute).convert_module(
            holder.to("meta")
        )  # as on a GPU: it is not this CPU's
        assert caplog.text.count("slower than float32") == said


def test_the_plugin_s_type_serves_a_configured_backbone_that_names_none(tmp_path: Path) -> None:
    for own, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        module = tiny_module(tmp_path / own, {"a": {"rank": 2}}, dtype=own)
        tiny_fit(module, tiny_batches(["a"], 1), plugins=[EightBitPrecision(dtype="bfloat16")])
        assert module.backbone is not None
        assert module.backbone.model.norm.weight.dtype is expected
        assert {p.dtype for p in module.adapters.parameters()} == {torch.float32}


# ---- computing in eight bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "expected"), [("auto", "16bit"), ("16bit", "16bit"), ("fp8", "fp8")])
def test_every_matrix_is_told_how_to_compute(compute: str, expected: str) -> None:
    holder = Holder()
    EightBitPrecision("fp8", compute=compute).convert_module(holder)
    assert {q.compute for q in quantized_layers(holder.backbone).values()} == {expected}


def test_all_but_the_output_head_may_be_sliced(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder(tmp_path))
    quantize_model_(model)
    assert not any(q.sliced for q in quantized_layers(model).values())
    for compute in ("auto", "16bit"):
        EightBitPrecision(compute=compute).set_compute(model)
        assert {name for name, q in quantized_layers(model).items() if not q.sliced} == {"lm_head"}


def test_fp8_needs_a_gpu_that_has_it_and_a_backbone_stored_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = EightBitPrecision(compute="fp8")
    with pytest.raises(ConfigError, match="this run is on cpu: use compute='auto'"):
        plugin.check_device(CPU, "fp8")
    monkeypatch.setattr(precision, "has_fp8", lambda device: True)
    with pytest.raises(ConfigError, match=r"needs backbone\.scheme='fp8', not 'int8'"):
        plugin.check_device(CUDA, "int8")
    plugin.check_device(CUDA, "fp8")
    EightBitPrecision().check_device(CPU, "fp8")


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_is_there_from_compute_capability_8_9(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fp8(CUDA) is expected
    assert not has_fp8(CPU)


def test_fp8_is_refused_on_the_cpu_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuna_lightning.training.module.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    module = tiny_module(tmp_path, {"a": {"rank": 2}}, scheme="fp8")
    with pytest.raises(ConfigError, match="compute='fp8' needs a CUDA GPU"):
        tiny_fit(module, tiny_batches(["a"], 1), plugins=[EightBitPrecision(compute="fp8")])


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int9"}, "EightBitPrecision.scheme must be one of .*'int9'; did you mean 'int8'"),
        ({"dtype": "bfloat17"}, "EightBitPrecision.dtype must be one of .*did you mean 'bfloat16'"),
        ({"compute": "fp9"}, "EightBitPrecision.compute must be one of .*did you mean 'fp8'"),
        ({"block_size": 100}, "EightBitPrecision.block_size must be one of"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EightBitPrecision(**fields)


def test_clipping_the_joint_norm_is_refused() -> None:
    refuse_joint_clipping(None)
    refuse_joint_clipping(0)
    with pytest.raises(ConfigError, match=r"set max_grad_norm=0\.5 in AdapterConfig"):
        refuse_joint_clipping(0.5)
    with pytest.raises(ConfigError, match="max_grad_norm=2"):
        EightBitPrecision().clip_gradients(None, 2)
