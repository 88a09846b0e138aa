"""The head fused with its loss on a GPU: the kernel against float64, no wait for the device, bytes, and whole steps."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.configs import AdapterConfig
from finetuna_lightning.ops import library, loss, reference
from finetuna_lightning.ops.library import has_joint_kernels
from finetuna_lightning.ops.loss import IGNORED, linear_cross_entropy
from finetuna_lightning.training.head import HeadInput
from finetuna_lightning.training.module import MultiAdapterModule
from tests.helpers.cuda import no_wait
from tests.helpers.models import VOCAB_SIZE, excite, tiny_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [(1, 1), (7, 99), (33, 4096), (5, 50257), (64, 128256)]


def _has_slices() -> bool:
    if not torch.cuda.is_available() or not has_joint_kernels(torch.device("cuda")):
        return False
    from finetuna_lightning.ops.kernels import hopper

    return hopper.takes_slices(torch.device("cuda", 0), torch.bfloat16)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.double()).norm() / other.double().norm())


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("padded", [0, 5])
def test_the_kernel_agrees_with_float64(rows: int, columns: int, dtype: torch.dtype, padded: int) -> None:
    from finetuna_lightning.ops.kernels import loss as kernel

    torch.manual_seed(0)
    buffer = (torch.randn(rows, columns + padded, device="cuda") * 4).to(dtype)
    labels = torch.randint(columns, (rows,), device="cuda")
    labels[1::3] = IGNORED
    wide = buffer[:, :columns].double().requires_grad_()
    true = F.cross_entropy(wide, labels, reduction="none", ignore_index=IGNORED)
    true.sum().backward()
    for gradient in (False, True):
        mine, losses = buffer.clone(), torch.full((rows,), torch.nan, device="cuda")
        kernel.cross_entropy_(mine[:, :columns], labels, losses, IGNORED, gradient)
        torch.testing.assert_close(losses.double(), true.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(mine[:, columns:], buffer[:, columns:])
        if gradient:
            assert float((mine[:, :columns].double() - wide.grad).norm()) < TOLERANCE[dtype] * float(
                wide.grad.norm() + 1
            )
        else:
            assert torch.equal(mine, buffer)


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_a_row_that_is_no_number_reaches_no_other() -> None:
    from finetuna_lightning.ops.kernels import loss as kernel

    torch.manual_seed(0)
    logits, labels = torch.randn(9, 5000, device="cuda", dtype=torch.bfloat16), torch.arange(9, device="cuda")
    labels[6] = IGNORED
    found = []
    for value in (0.0, torch.nan):
        mine, losses = logits.clone(), torch.full((9,), torch.nan, device="cuda")
        mine[3], mine[6] = value, value
        kernel.cross_entropy_(mine, labels, losses, IGNORED, True)
        found.append((losses, mine))
    others = torch.arange(9, device="cuda") != 3  # the ignored row is zero either way
    assert all(torch.equal(one[others], other[others]) for one, other in zip(*found, strict=True))
    assert bool(found[1][0][3].isnan()) and bool(found[1][1][3].isnan().all()) and not found[1][1][6].any()


@pytest.mark.parametrize("scheme", [None, "int8", "int8-blockwise", "fp8"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocabulary", [101, 512])
def test_losses_and_gradient_agree_with_float64(dtype: torch.dtype, scheme: str | None, vocabulary: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(70, 64, device="cuda").to(dtype).requires_grad_()
    weight, bias = torch.randn(vocabulary, 64).to(dtype), torch.randn(vocabulary).to(dtype)
    labels = torch.randint(vocabulary, (70,))
    labels[2::5] = IGNORED
    stored: dict[str, Any] = {"weight": weight.cuda()}
    if scheme:
        codes, scale = reference.quantize(weight, scheme, 64)
        stored = {"weight": codes.cuda(), "scale": scale.cuda(), "scheme": scheme, "block_size": 64}
        weight = reference.dequantize(codes, scale, scheme, 64, dtype)
    for own in (None, bias):
        hidden.grad = None
        losses = linear_cross_entropy(
            hidden, labels.cuda(), bias=None if own is None else own.cuda(), chunk=16, **stored
        )
        grad = torch.rand(70)
        losses.backward(grad.cuda())
        wide = hidden.detach().double().cpu().requires_grad_()
        true = F.cross_entropy(
            F.linear(wide, weight.double(), None if own is None else own.double()),
            labels, reduction="none", ignore_index=IGNORED,
        )  # fmt: skip
        true.backward(grad.double())
        assert relative(losses.cpu(), true.detach()) < TOLERANCE[dtype]
        assert hidden.grad is not None and wide.grad is not None
        assert relative(hidden.grad.cpu(), wide.grad) < 2 * TOLERANCE[dtype]


def test_the_host_never_waits_and_the_logits_never_stand() -> None:
    """4,096 tokens of a vocabulary of 128,256: their logits would take 1 GiB in 16 bits, 2 GiB in 32."""
    torch.manual_seed(0)
    hidden = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 256, device="cuda", dtype=torch.bfloat16)
    codes, scale = reference.quantize(weight, "int8")
    labels = torch.randint(128256, (4096,), device="cuda")
    linear_cross_entropy(hidden, labels, codes, scale, scheme="int8").sum().backward()  # compiles
    del weight
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_wait():
        linear_cross_entropy(hidden, labels, codes, scale, scheme="int8").sum().backward()
    chunk, head = loss.CHUNK * 128256 * 2, 128256 * 256 * 2
    assert torch.cuda.max_memory_allocated() - before < chunk + 2 * head + 2**25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_the_logits(dtype: torch.dtype) -> None:
    ids = torch.randint(VOCAB_SIZE, (5, 24), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "adapters": ["a", "b"],
        "rows": [2, 3],
    }
    found = []
    for fused in (True, False):
        module = MultiAdapterModule(
            tiny_model("llama", scale=3.0).to("cuda", dtype),
            {
                "a": AdapterConfig(rank=2, target_modules=["q_proj"]),
                "b": AdapterConfig(rank=2, plain_modules=["lm_head"]),
            },
        )
        excite(module.adapters.cpu(), std=0.1)
        module.adapters.cuda()
        module.train()
        output = module._for_losses(batch, training=True) if fused else module(batch, training=True)
        assert isinstance(output, HeadInput) == fused
        losses = torch.stack([total / count for _, total, count, _ in module.losses(output, batch)])
        losses.sum().backward()
        found.append((losses.detach(), [p.grad for p in module.adapters.parameters()]))
    (losses, gradients), (wanted, true) = found
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert relative(losses, wanted) < bound
    assert all(relative(one, other) < bound for one, other in zip(gradients, true, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head_is_read_out_as_the_reference_reads_it(dtype: torch.dtype) -> None:
    codes, scale = reference.quantize(torch.randn(101, 80, device="cuda"), "int8")
    wanted = reference.dequantize(codes, scale, "int8", 64, dtype)
    assert torch.equal(library.read_out(codes, scale, "int8", 64, dtype), wanted)


@pytest.mark.skipif(
    not torch.cuda.is_available() or not has_joint_kernels(torch.device("cuda")),
    reason="the products are torch's, which go by the rows",
)
@pytest.mark.parametrize(("vocabulary", "scheme"), [(101, None), (4096, None), (4096, "int8")])
def test_no_bit_of_a_row_depends_on_the_others(vocabulary: int, scheme: str | None) -> None:
    """Neither loss nor gradient, also where another row is NaN; of an int8 head on a Hopper GPU, in slices."""
    torch.manual_seed(0)
    hidden = torch.randn(1500, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 256, device="cuda", dtype=torch.bfloat16) / 16
    bias, labels = torch.randn(vocabulary, device="cuda").bfloat16(), torch.randint(vocabulary, (1500,), device="cuda")
    stored = (weight, None) if scheme is None else reference.quantize(weight, scheme)
    hidden[700] = torch.nan

    def of(cut: slice) -> tuple[torch.Tensor, torch.Tensor]:
        own = hidden[cut].clone().requires_grad_()
        losses = linear_cross_entropy(own, labels[cut], *stored, bias, scheme=scheme)
        losses.sum().backward()
        assert own.grad is not None
        return losses.detach(), own.grad

    losses, slopes = of(slice(None))
    for cut in (slice(0, 128), slice(640, 650), slice(1490, 1500), slice(130, 690)):
        own_losses, own_slopes = of(cut)
        assert torch.equal(own_losses, losses[cut]) and torch.equal(own_slopes, slopes[cut])
    assert losses.isnan().nonzero().flatten().tolist() == [700]


@pytest.mark.skipif(not _has_slices(), reason="only Hopper GPUs multiply slices")
def test_an_int8_head_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that differ little, and hidden states that add up to nothing: of logits that are small differences of large
    sums, a head rounded to 16 bits leaves less."""
    torch.manual_seed(0)
    hidden = torch.randn(70, 512, device="cuda").bfloat16()
    hidden[:, 256:] = -hidden[:, :256]
    codes = torch.randint(120, 128, (512, 512), device="cuda", dtype=torch.int8)
    scale, labels = torch.rand(512, device="cuda") / 64 + 1 / 64, torch.randint(512, (70,), device="cuda")
    true = F.cross_entropy(hidden.double() @ (codes.double() * scale.double()[:, None]).t(), labels, reduction="none")
    errors, held = [], []
    for taken in (True, False):
        if not taken:
            monkeypatch.setattr(loss, "_takes_slices", lambda *_: False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        errors.append(relative(linear_cross_entropy(hidden, labels, codes, scale, scheme="int8"), true))
        held.append(torch.cuda.max_memory_allocated() - before)
    assert errors[0] < 2e-3 and errors[0] < errors[1] / 3
    assert held[1] - held[0] > codes.numel()  # where there is no gradient the head is not even read out
