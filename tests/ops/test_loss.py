"""The head fused with its loss: per-token losses and the gradient of the hidden states against torch in float64, what a
row's company changes of it (nothing), and what stands in memory. The kernel under Triton's interpreter, where there is
a Triton; on a GPU in ``tests/gpu``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.ops import loss, reference
from finetuna_lightning.ops.loss import IGNORED, linear_cross_entropy
from tests.helpers.sizes import Sizes

SCHEMES = ("int8", "int8-blockwise", "fp8")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 1, 1), (1, 24, 37), (7, 5, 2), (19, 24, 101), (33, 16, 64)]  # tokens, features, vocabulary; chunks of 8


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Whatever memory is not written holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels_of(tokens: int, vocabulary: int, every: int = 3) -> Tensor:
    """Random ones; every third is ignored."""
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(7))
    labels[1::every] = IGNORED
    return labels


def truth(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of ``hidden``, in float64."""
    wide = hidden.detach().double().requires_grad_()
    logits = F.linear(wide, weight.double(), None if bias is None else bias.double())
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    losses.backward(grad.double())
    assert wide.grad is not None
    return losses.detach(), wide.grad


def relative(one: Tensor, other: Tensor) -> float:
    """The distance in the Frobenius norm, as a part of the second's."""
    return float((one.detach().double() - other.double()).norm() / other.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignoring", [False, True])
def test_losses_and_gradient(
    shape: tuple[int, int, int], dtype: torch.dtype, scheme: str | None, ignoring: bool
) -> None:
    tokens, features, vocabulary = shape
    hidden = random(tokens, features, dtype=dtype).requires_grad_()
    labels = labels_of(tokens, vocabulary, every=3 if ignoring else tokens)
    if not ignoring:
        labels.clamp_(min=0)
    weight, bias = random(vocabulary, features, seed=1, dtype=dtype), random(vocabulary, seed=2, dtype=dtype)
    stored: dict[str, Any] = {"weight": weight}
    if scheme:
        codes, scale = reference.quantize(weight, scheme, 64)
        stored = {"weight": codes, "scale": scale, "scheme": scheme, "block_size": 64}
        weight = reference.dequantize(codes, scale, scheme, 64, dtype)
    for own in (None, bias):
        hidden.grad = None
        losses = linear_cross_entropy(hidden, labels, bias=own, chunk=8, **stored)
        grad = random(tokens, seed=3).to(losses.dtype)
        losses.backward(grad)
        true, true_grad = truth(hidden, labels, weight, own, grad)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert hidden.grad is not None and hidden.grad.dtype == dtype
        assert relative(losses, true) < TOLERANCE[dtype]
        limit = TOLERANCE[dtype] * max(1.0, float(true_grad.norm()))  # of one word the gradient is 0
        assert float((hidden.grad.double() - true_grad).norm()) < limit
        assert bool((losses[labels == IGNORED] == 0).all()) and bool((hidden.grad[labels == IGNORED] == 0).all())


def test_gradcheck() -> None:
    labels, weight, bias = labels_of(5, 9), random(9, 6, seed=1), random(9, seed=2)
    codes, scale = reference.quantize(weight, "int8")
    for options in ({"weight": weight, "bias": bias}, {"weight": codes, "scale": scale, "scheme": "int8"}):

        def function(hidden: Tensor, options: dict[str, Any] = options) -> Tensor:
            return linear_cross_entropy(hidden, labels, chunk=2, **options)

        assert torch.autograd.gradcheck(function, (random(5, 6).requires_grad_(),))


@pytest.mark.parametrize("shape", [(2, 5), (1, 7), (0,), (3, 0)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    hidden, weight = random(*shape, 6).requires_grad_(), random(9, 6, seed=1)
    labels = torch.randint(9, shape)
    losses = linear_cross_entropy(hidden, labels, weight)
    assert losses.shape == shape
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_all_ignored_is_zero_whatever_comes_in() -> None:
    """The mean of no token is NaN, and its gradient infinite: neither reaches what is before the head."""
    hidden = random(4, 6, dtype=torch.float32).requires_grad_()
    labels = torch.full((4,), IGNORED)
    losses = linear_cross_entropy(hidden, labels, random(9, 6, dtype=torch.float32))
    (losses.sum() / (labels != IGNORED).sum()).backward()
    assert torch.equal(losses, torch.zeros(4)) and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_reaches_no_other(dtype: torch.dtype, ignored: bool, bad: float) -> None:
    """And one that is ignored reaches nothing."""
    labels, weight = labels_of(9, 13, every=4), random(13, 6, seed=1, dtype=dtype)
    row = 5 if ignored else 4
    assert (labels[row] == IGNORED) == ignored
    found = []
    for value in (0.5, bad):
        hidden = random(9, 6, dtype=dtype)
        hidden[row] = value
        hidden.requires_grad_()
        losses = linear_cross_entropy(hidden, labels, weight, chunk=4)
        losses.sum().backward()
        found.append((losses.detach(), hidden.grad))
    others = torch.arange(9) != row
    (losses, grad), (spoilt, spoilt_grad) = found
    assert torch.equal(spoilt[others], losses[others]) and torch.equal(spoilt_grad[others], grad[others])
    assert bool(spoilt[row] == 0) if ignored else bool(spoilt[row].isnan())
    assert bool((spoilt_grad[row] == 0).all()) if ignored else bool(spoilt_grad[row].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_changes_a_row_by_rounding_at_most(dtype: torch.dtype) -> None:
    hidden, weight = random(40, 24, dtype=dtype), random(101, 24, seed=1, dtype=dtype)
    labels = labels_of(40, 101)
    whole = linear_cross_entropy(hidden, labels, weight, chunk=16)
    for cut in (slice(0, 13), slice(13, 14), slice(14, 40)):
        own = linear_cross_entropy(hidden[cut], labels[cut], weight, chunk=16)
        assert relative(own, whole[cut]) < 10 * torch.finfo(dtype).eps or not whole[cut].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_each_computed_as_alone(dtype: torch.dtype) -> None:
    """To the last bit, also where rows of one are ignored, and one is empty."""
    hidden, weight = random(300, 24, dtype=dtype), random(401, 24, seed=1, dtype=dtype)
    labels = torch.cat([labels_of(200, 401), labels_of(100, 401).clamp(min=0)])
    hidden.requires_grad_()
    whole = linear_cross_entropy(hidden, labels, weight, parts=[13, 187, 0, 100], chunk=64)
    whole.sum().backward()
    for cut in (slice(0, 13), slice(13, 200), slice(200, 300)):
        alone = hidden.detach()[cut].requires_grad_()
        own = linear_cross_entropy(alone, labels[cut], weight, chunk=64)
        own.sum().backward()
        assert torch.equal(own, whole[cut])
        assert hidden.grad is not None and alone.grad is not None and torch.equal(alone.grad, hidden.grad[cut])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_place_what_is_ignored_is_zero(dtype: torch.dtype) -> None:
    """Also for those who cannot leave it out, and do not know what it holds."""
    logits, labels = random(9, 13, dtype=dtype), labels_of(9, 13)
    logits[labels == IGNORED] = torch.nan
    losses = torch.empty(9, dtype=torch.promote_types(dtype, torch.float32))
    loss.cross_entropy_(logits, labels, losses, True)
    assert bool((losses[labels == IGNORED] == 0).all()) and bool((logits[labels == IGNORED] == 0).all())
    assert bool((losses[labels != IGNORED] > 0).all()) and bool(logits[labels != IGNORED].any(1).all())


@pytest.mark.parametrize("wanted", [True, False])
def test_no_logits_of_all_tokens_and_few_in_32_bits(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own kernels have none in 32 bits, and are left out while operations are watched."""
    monkeypatch.setattr(loss, "PIECE_ELEMENTS", 64 * 211)
    hidden = random(1500, 8, dtype=torch.bfloat16).requires_grad_(wanted)
    with Sizes(211) as sizes:
        losses = linear_cross_entropy(hidden, labels_of(1500, 211), random(211, 8, seed=1, dtype=torch.bfloat16))
        if wanted:
            losses.sum().backward()
    assert 0 < sizes.rows[torch.bfloat16] <= loss.CPU_CHUNK < 1000
    assert 0 < sizes.rows[torch.float32] <= 64


def test_without_a_gradient_none_is_computed() -> None:
    hidden = random(5, 6).requires_grad_()
    labels, weight = labels_of(5, 9), random(9, 6, seed=1)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, labels, weight)
    assert losses.grad_fn is None
    assert torch.equal(losses, linear_cross_entropy(hidden, labels, weight).detach())
    calls: list[bool] = []
    own = loss.cross_entropy_
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(loss, "cross_entropy_", lambda *args: (calls.append(args[3]), own(*args))[1])
        linear_cross_entropy(hidden, labels, weight)
    assert calls == [False]


def test_rows_that_the_kernel_could_not_read_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.zeros(40, 32, dtype=torch.bfloat16), torch.zeros(9, 48, dtype=torch.bfloat16)
    assert not loss._takes_tiles(rows[:, :32], weight)  # no GPU
    monkeypatch.setattr(loss, "has_joint_kernels", lambda _: True)
    assert loss._takes_tiles(rows[:, :32], weight) and loss._takes_tiles(rows[2:, 8:40], weight)
    for hidden, own in (
        (rows[:, 1:33], weight),
        (rows.t()[:32].t().contiguous().t().contiguous().t(), weight),
        (rows[:1, :32].expand(9, 32), weight),
        (torch.zeros(9, 36, dtype=torch.bfloat16)[:, :32], weight),
        (rows[:, :32].float(), weight.float()),
        (rows[:, :32].half(), weight),
        (rows[:, :24], weight[:, :24].contiguous()),
        (rows[:, :32], torch.zeros(32, 40, dtype=torch.bfloat16).t()),
    ):
        assert not loss._takes_tiles(hidden, own), (hidden.stride(), own.shape)


def test_autocast_is_followed() -> None:
    hidden, weight = random(5, 6, dtype=torch.float32).requires_grad_(), random(9, 6, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, labels_of(5, 9), weight)
    losses.sum().backward()
    own = linear_cross_entropy(hidden.detach().bfloat16(), labels_of(5, 9), weight)
    assert torch.equal(losses.detach(), own) and hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    hidden, labels, weight = random(5, 6), labels_of(5, 9), random(9, 6)
    with pytest.raises(ValueError, match="the head requires grad"):
        linear_cross_entropy(hidden, labels, weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="the head requires grad"):
        linear_cross_entropy(hidden, labels, weight, bias=random(9).requires_grad_())
    for wrong in (
        {"labels": labels[1:]},
        {"weight": weight[:, 1:]},
        {"chunk": 0},
        {"parts": [2, 2]},
        {"parts": [6, -1]},
    ):
        with pytest.raises(ValueError, match="do not fit"):
            linear_cross_entropy(**{"hidden": hidden, "labels": labels, "weight": weight} | wrong)


INTERPRETED = """
import numpy, torch
from finetuna_lightning.ops import loss
from finetuna_lightning.ops.kernels import loss as kernel
numpy.seterr(invalid="ignore")
for kernel.BLOCK in (16, 4096):
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for rows, columns in ((1, 1), (5, 37), (3, 129), (0, 5)):
            torch.manual_seed(0)
            buffer = (torch.randn(rows, columns + 3) * 4).to(dtype)
            labels = torch.randint(columns, (rows,))
            if rows > 1:
                labels[0] = -100
                buffer[0] = torch.nan
                buffer[1] = torch.nan
            for gradient in (True, False):
                found = []
                for function in (kernel.cross_entropy_, None):
                    mine, losses = buffer.clone(), torch.full((rows,), torch.nan)
                    if function is None:
                        loss.cross_entropy_(mine[:, :columns], labels, losses, gradient)
                    else:
                        function(mine[:, :columns], labels, losses, -100, gradient)
                    found.append((losses, mine))
                (losses, mine), (true, theirs) = found
                torch.testing.assert_close(losses, true, equal_nan=True, atol=1e-5, rtol=1e-6)
                assert torch.equal(mine[:, columns:].nan_to_num(7), buffer[:, columns:].nan_to_num(7))
                if gradient:
                    torch.testing.assert_close(mine, theirs, equal_nan=True, atol=bound, rtol=bound)
                else:
                    assert torch.equal(mine.nan_to_num(7), buffer.nan_to_num(7))
print("compared")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, whose interpreter runs the kernel on the CPU")
def test_the_kernel_under_the_interpreter_gives_what_torch_does() -> None:
    """In a process of its own: what Triton decorates is interpreted or compiled as the environment says at import."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "compared" in done.stdout, done.stderr
