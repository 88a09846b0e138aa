"""Joint layers on a GPU that has the kernels: each kernel, whole models of fused layers against float64 and against the
layers one by one, and every adapter as alone, to the bit."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import Tensor, nn

import finetuna_lightning as ft
from finetuna_lightning.attention import enable_packing, packed_inputs
from finetuna_lightning.backbone import (
    cast_,
    enable_checkpointing,
    quantize_model_,
    quantized_layers,
    recompute_in_training,
)
from finetuna_lightning.fusing import fuse_
from finetuna_lightning.nn import joint
from finetuna_lightning.nn.blocks import FusedAttention, FusedLayer, FusedNorm, FusedSwiGLU
from finetuna_lightning.nn.gradients import Gradients, Source
from finetuna_lightning.nn.packing import packed_pass
from finetuna_lightning.nn.quantized import QuantizedWeight
from finetuna_lightning.nn.routing import Route
from finetuna_lightning.ops.library import has_joint_kernels, quantized_linear
from finetuna_lightning.ops.tiling import tiling

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None or not has_joint_kernels(CUDA),
    reason="the kernels for joint layers need a GPU of compute capability 9.0 or newer, and Triton",
)
FIGURES: dict[str, tuple[float, float]] = {
    "16bit": (2e-2, 4e-2), "16bit, read out": (2e-2, 4e-2), "int8": (5e-2, 1.2e-1)
}  # fmt: skip
"""By compute: how far output and gradients may lie from float64, of their norm; "read out": without CUDA kernels."""
RANKS = {"one": 4, "two": 20, "three": 16}
LENGTHS = {"one": [40], "two": [24, 70], "three": [130]}


def distance(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm())


def llama(**more: Any) -> nn.Module:
    """Of odd sizes that are multiples of 16, its weights and norms not near their initial values, in int8."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=96, hidden_size=112, intermediate_size=208, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | more)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2) if parameter.dim() == 2 else parameter.data.uniform_(0.5, 1.5)
    quantize_model_(model)
    return model


def bank_of(model: nn.Module, names: Sequence[str] = tuple(RANKS)) -> ft.AdapterBank:
    bank = ft.AdapterBank(model)
    for name in names:
        targets = ["q_proj", "v_proj", "down_proj", "gate_proj"] if name == "one" else ["all-linear"]
        bank.add(name, rank=RANKS[name], alpha=8, targets=targets, seed=0)
        generator = torch.Generator().manual_seed(RANKS[name])
        for parameter in bank[name].parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter)
    return bank


def kernels() -> Any:
    from finetuna_lightning.ops.kernels import hopper  # needs Triton

    return hopper


@contextmanager
def without_cuda_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNA_CUDA_KERNELS", "0")
        kernels()._kernel.cache_clear()
        yield
    kernels()._kernel.cache_clear()


def run(compute: str, *args: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """See ``passed``."""
    compute, _, read_out = compute.partition(", ")
    with without_cuda_kernels() if read_out else nullcontext():
        return passed(compute, *args, **options)


def passed(
    compute: str, names: Sequence[str] = tuple(RANKS), *, fuse: bool = True, dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda", recompute: bool = False, poison: str | None = None, rows: bool = False,
    gradients: Gradients | None = None, passes: int = 1, watch: Any = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """By adapter, the logits of its tokens in a packed pass (or, with ``rows``, of one row each); every gradient."""
    model = llama().to(device)
    cast_(model, dtype)
    for name, quantized in quantized_layers(model).items():
        quantized.sliced = "layers" in name
        quantized.compute = compute if "layers" in name else "16bit"
    if fuse:
        fuse_(model, torch.device(device), dtype)
    if recompute:
        enable_checkpointing(model)
        recompute_in_training(model, True)
    if not rows:
        assert enable_packing(model) is None
    bank = bank_of(model, names)
    model.to(device)
    if poison is not None:
        spoilt = [p for name, p in bank[poison].named_parameters() if name.endswith("down_proj.lora_A")]
        spoilt[0].data.fill_(math.nan)
    if watch is not None:
        watch(bank)
    generator = torch.Generator().manual_seed(1)
    tokens = {n: [torch.randint(96, (size,), generator=generator) for size in LENGTHS[n]] for n in RANKS}
    slopes = {n: [torch.randn(size, 96, generator=generator) for size in LENGTHS[n]] for n in RANKS}
    if rows:
        ids = torch.stack([tokens[n][0][:24] for n in names]).to(device)
        with bank.route(list(names)):
            logits = model(input_ids=ids, use_cache=False).logits
        parts = {n: logits[index] for index, n in enumerate(names)}
        total = sum((parts[n].double() * slopes[n][0][:24].to(device)).sum() for n in names)
    else:
        lengths = [size for n in names for size in LENGTHS[n]]
        ids = torch.cat([part for n in names for part in tokens[n]])[None].to(device)
        route = Route(tuple(names), tuple(len(LENGTHS[n]) for n in names), lengths=tuple(lengths))
        for _ in range(passes - 1):
            with packed_pass(lengths), bank.follow(replace(route, gradients=gradients)):
                model(input_ids=ids, use_cache=False, **packed_inputs(lengths, ids.device)).logits.sum().backward()
        with packed_pass(lengths), bank.follow(replace(route, gradients=gradients)):
            logits = model(input_ids=ids, use_cache=False, **packed_inputs(lengths, ids.device)).logits[0]
        cut = logits.split([sum(LENGTHS[n]) for n in names])
        parts = dict(zip(names, cut, strict=True))
        total = sum((parts[n].double() * torch.cat(slopes[n]).to(device)).sum() for n in names)
    total.backward()  # type: ignore[union-attr]
    if gradients is not None:
        gradients.bind()
    found = {}
    for n in names:
        for key, parameter in bank[n].named_parameters():
            assert parameter.grad is not None
            found[f"{n}/{key}"] = parameter.grad
    return parts, found


def test_every_kernel_agrees_with_float64() -> None:
    from tests.helpers.kernels import check_all

    assert len(check_all("cuda")) == 15


def test_parts_of_a_large_rank_are_added_slab_by_slab() -> None:
    """What B's backward pass keeps for each block of features has 64 columns at most."""
    from finetuna_lightning.ops.kernels import lowrank

    tokens, width, rank = 1024, 4096, 256
    cut = tiling([("a", 0, tokens)], torch.device("cuda"))
    table = tuple(part.cuda() for part in lowrank.blocks([width]))
    given = [torch.ones(tokens, width), torch.ones(tokens, rank), torch.ones(1, rank, width)]
    grad, low, matrices = (t.cuda().bfloat16() for t in given)
    scales, ranks = torch.ones(1, rank, device="cuda"), torch.tensor([[rank]], dtype=torch.int32, device="cuda")

    def call() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = lowrank.up_backward(
            grad, low, matrices, scales, cut.tiles, cut.chunks, cut.first, ranks, rank, (table[0], table[1])
        )
        kept = sum(t.numel() * t.element_size() for t in made)
        return torch.cuda.max_memory_allocated() - before - kept

    call()
    assert call() <= table[0].shape[1] * tokens * 64 * 4 + 4096


def test_a_llama_is_fused_whole() -> None:
    model = llama().cuda()
    cast_(model, torch.bfloat16)
    assert fuse_(model, CUDA, torch.bfloat16) == {
        "LlamaRMSNorm": 7, "LlamaMLP": 3, "LlamaAttention": 3, "LlamaDecoderLayer": 3,
    }  # fmt: skip
    kinds = {type(module).__mro__[1] for module in model.modules()}
    assert {FusedNorm, FusedSwiGLU, FusedAttention, FusedLayer} <= kinds
    assert fuse_(model, CUDA, torch.bfloat16) == {}


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "olmo2"])
def test_fused_architectures_compute_the_same(name: str) -> None:
    """What has the form of a fused part and computes otherwise is left alone."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        {"gemma3": "gemma3_text"}.get(name, name), vocab_size=96, hidden_size=64, intermediate_size=112,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2) if parameter.dim() == 2 else parameter.data.uniform_(0.5, 1.5)
    quantize_model_(model)
    model.cuda()
    cast_(model, torch.bfloat16)
    ids = torch.randint(96, (2, 24), device="cuda")
    plain = model(input_ids=ids, use_cache=False).logits
    fuse_(model, CUDA, torch.bfloat16)
    assert distance(model(input_ids=ids, use_cache=False).logits, plain) < 2e-2


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("compute", FIGURES)
def test_forward_and_every_gradient_agree_with_float64(compute: str, fuse: bool, rows: bool) -> None:
    wanted, true = run("16bit", fuse=False, dtype=torch.float64, device="cpu", rows=rows)
    got, gradients = run(compute, fuse=fuse, rows=rows)
    output, gradient = FIGURES[compute]
    for name, logits in wanted.items():
        assert distance(got[name], logits) < output
    assert gradients.keys() == true.keys()
    for name, exact in true.items():
        assert gradients[name].dtype == torch.float32 and distance(gradients[name], exact) < gradient, name


def test_sums_of_an_mlp_are_over_weights_that_share_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    weights = [
        QuantizedWeight.from_weight(torch.randn(shape), "int8").cuda() for shape in ((48, 32), (48, 32), (32, 48))
    ]
    for weight in weights:
        weight.sliced = True
    for longest, slices in ((96, 2), (95, 0)):
        monkeypatch.setattr(kernels(), "LONGEST_SLICED", longest)
        assert joint._swiglu_slices(weights, torch.bfloat16) == slices


@pytest.mark.parametrize(
    ("change", "slices"),
    [("none", 2), ("float16", 0), ("another scheme", 0), ("no kernel", 0), ("int8 products", 1), ("the head", 0),
     ("a sum too long", 0), ("codes between addresses", 2)],
)  # fmt: skip
def test_in_16_bits_it_is_slices_where_they_are_closer(
    change: str, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    torch.manual_seed(0)
    scheme, dtype = ("fp8" if change == "another scheme" else "int8"), torch.bfloat16
    weight = QuantizedWeight.from_weight(torch.randn(48, 64), scheme).cuda()
    weight.sliced = change != "the head"
    if change == "a sum too long":
        monkeypatch.setattr(kernels(), "LONGEST_SLICED", 60)
    if change == "codes between addresses":
        room = torch.empty(48 * 64 + 1, device="cuda", dtype=torch.int8)
        weight.codes = room[1:].view(48, 64).copy_(weight.codes)
    if change == "int8 products":
        weight.compute = "int8"
    if change == "float16":
        dtype = torch.float16
    x = torch.randn(40, 64, device="cuda").to(dtype).requires_grad_()
    bias, residual = torch.randn(48, device="cuda"), torch.randn(40, 49, device="cuda", dtype=dtype)[:, 1:]
    cut = tiling([("one", 0, 40)], CUDA)
    with without_cuda_kernels() if change == "no kernel" else nullcontext():
        assert joint._slices([weight], dtype) == slices
        # a bias in 32 bits and rows at odd addresses are no obstacle
        y = joint.linear(x, weight, bias, [None], cut, residual)
        y.backward(torch.ones_like(y))
    matrix = weight.dequantize(torch.float64)
    bound = 2e-2 if slices == 1 else 4e-3
    assert distance(y, x.double() @ matrix.t() + bias + residual.double()) < bound
    assert x.grad is not None and distance(x.grad, torch.ones_like(y).double() @ matrix) < bound


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", FIGURES)
def test_joint_is_alone_to_the_bit(compute: str, recompute: bool) -> None:
    together, gradients = run(compute, recompute=recompute)
    for name in RANKS:
        alone, own = run(compute, [name], recompute=recompute)
        assert torch.equal(together[name], alone[name])
        for key, gradient in own.items():
            assert torch.equal(gradients[key], gradient), key


class Counted(Gradients):
    """How many parameters' gradients came."""

    count = 0

    def put(self, source: Source, written: Sequence[Tensor]) -> None:
        self.count += 0 if self.bound else len(source.parameters)
        if self.wait:  # what is said of where they stand holds
            starts = torch.tensor([tensor.data_ptr() for tensor in written])
            which, at = source.places
            assert (starts[which] + at).tolist() == [view.data_ptr() for view in source.views(written)]
            assert all(view.is_contiguous() for view in source.views(written))
        super().put(source, written)

    bound = False

    def bind(self) -> None:
        self.bound = True
        super().bind()


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_past_autograd_are_autograds(passes: int, recompute: bool, wait: bool) -> None:
    """Put in place at once or later, or added to what is there; a hooked parameter has its hook called."""
    logits, wanted = run("int8", passes=passes, recompute=recompute)
    past = Counted(wait)
    again, got = run("int8", passes=passes, recompute=recompute, gradients=past)
    assert past.count == passes * len(wanted) == passes * len(got)
    assert all(torch.equal(again[key], logits[key]) for key in logits)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    called: list[Tensor] = []
    past = Counted(wait)
    _, hooked = run(
        "int8", passes=passes, recompute=recompute, gradients=past,
        watch=lambda bank: next(bank.parameters()).register_hook(called.append),
    )  # fmt: skip
    assert not past.count and len(called) == passes
    assert all(torch.equal(hooked[key], wanted[key]) for key in wanted)


def test_nothing_stays_on_the_device_when_adapters_and_backbone_have_left() -> None:
    kept: list[ft.AdapterBank] = []
    run("int8", watch=kept.append)
    (bank,) = kept
    own = [weakref.ref(delta) for name in bank for delta in bank[name].modules() if delta in joint._TABLES]
    assert len(own) > 0
    for name in list(bank):
        bank.remove(name)
    gc.collect()
    assert all(delta() is None for delta in own)  # the key of its tables
    model = bank.backbone.cpu()  # with the row scales put together
    reached = [t for module in model.modules() for own in vars(module).values() for t in tensors_in(own)]
    assert len(reached) > 0 and all(t.device.type == "cpu" for t in reached)


def test_a_bank_that_nobody_holds_leaves_with_its_backbone() -> None:
    held: list[Any] = []
    run("int8", watch=lambda bank: held.extend(map(weakref.ref, (bank, bank.backbone))))
    gc.collect()
    assert [own() is None for own in held] == [True, True]


def tensors_in(value: Any) -> list[Tensor]:
    """All in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for own in value for t in tensors_in(own)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("compute", FIGURES)
def test_recompute_changes_no_bit(compute: str) -> None:
    kept, gradients = run(compute)
    again, others = run(compute, recompute=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("compute", FIGURES)
def test_a_nan_stays_with_its_adapter(compute: str) -> None:
    clean, gradients = run(compute)
    spoilt, others = run(compute, poison="two")
    assert spoilt["two"].isnan().any()
    for name in ("one", "three"):
        assert torch.equal(clean[name], spoilt[name])
    for key, gradient in gradients.items():
        if not key.startswith("two"):
            assert torch.equal(gradient, others[key]), key


def test_the_registered_operators() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 17, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    codes = torch.randint(-127, 128, (96, 64), device="cuda", dtype=torch.int8)
    scale, bias = torch.rand(96, device="cuda") / 100, torch.randn(96, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.finetuna.int8_linear.default, (x.detach(), codes, scale, bias))
    torch.library.opcheck(
        torch.ops.finetuna.int8_linear_backward.default,
        (torch.randn(3, 17, 96, device="cuda", dtype=torch.bfloat16), codes, scale),
    )
    grad = torch.randn(3, 17, 96, device="cuda", dtype=torch.bfloat16)

    def call(x: Tensor) -> Tensor:
        return quantized_linear(x, codes, scale, bias, scheme="int8", block_size=64, compute="int8")

    y = call(x)
    y.backward(grad)
    weight = codes.double() * scale.double()[:, None]
    assert distance(y, x.double() @ weight.t() + bias) < 2e-2
    assert x.grad is not None and distance(x.grad, grad.double() @ weight) < 2e-2
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("compute", ["auto", "16bit", "int8"])
def test_training_side_by_side_is_training_alone(compute: str) -> None:
    """Through ``Trainer.fit``, with the 8-bit optimizer: every weight to the bit after three steps."""

    def trained(names: Sequence[str]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        drawn = [
            {n: torch.randint(96, (2, 24), generator=generator) for n in RANKS} for _ in range(3)
        ]  # fmt: skip
        batches = [
            {
                "input_ids": torch.cat([step[n] for n in names]), "labels": torch.cat([step[n] for n in names]),
                "attention_mask": torch.ones(2 * len(names), 24, dtype=torch.long), "adapters": list(names),
                "rows": [2] * len(names),
            }
            for step in drawn
        ]  # fmt: skip
        adapters = {n: ft.AdapterConfig(rank=RANKS[n], lr=1e-2, target_modules=["all-linear"]) for n in names}
        model = llama()
        cast_(model, torch.bfloat16)
        module = ft.MultiAdapterModule(model, adapters, ft.OptimConfig("adamw8bit"))
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, plugins=[ft.EightBitPrecision(compute=compute)],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        assert {q.compute for n, q in quantized_layers(module.backbone).items() if "layers" in n} == {  # type: ignore[arg-type]
            "int8" if compute == "auto" else compute
        }
        return {f"{n}/{k}": p.detach().clone() for n in names for k, p in module.adapters[n].named_parameters()}

    together = trained(list(RANKS))
    for name in RANKS:
        for key, weight in trained([name]).items():
            assert torch.equal(together[key], weight), key
