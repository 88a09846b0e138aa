"""The CPU's own kernels: each against torch in float64, whatever the width, the strides and the values; and how they
are compiled, kept and done without."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetuna_lightning.files import cache_folder
from finetuna_lightning.ops import cpu_attention, cpu_rows, library, loss, native
from tests.helpers import native as helper

WIDTHS = (1, 2, 15, 16, 17, 33, 100)  # the vectors have sixteen numbers
ROUNDED = 2.0**-8  # of a number, by rounding it to bfloat16 once: half a unit in the last of 8 bits, and a little
widths = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture
def kernels() -> None:
    helper.need()


with_kernels = pytest.mark.usefixtures("kernels")


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def within(whole: Tensor, columns: int) -> Tensor:
    """The first columns of rows that are longer: what stands beyond is not read, being NaN."""
    room = torch.full((*whole.shape[:-1], columns), torch.nan, dtype=whole.dtype)
    room[..., : whole.shape[-1]] = whole
    return room[..., : whole.shape[-1]]


def near(got: Tensor, wanted: Tensor, of: Tensor | None = None) -> bool:
    """Each number within one rounding, of itself or of the size of the summands ``of``."""
    allowed = (wanted.abs() if of is None else of) * ROUNDED + 5e-37  # below which e^x is 0
    return bool(((got.double() - wanted).abs() <= allowed).all())


# ---- each kernel -----------------------------------------------------------------------------------------------------


@with_kernels
@widths
def test_dequantize(width: int) -> None:
    codes = torch.randint(-127, 128, (7, width), dtype=torch.int8)
    codes[:, 0] = 1
    half = 2.0**-8  # of the last of 8 bits: ties, of an even number and of an odd one
    scale = torch.tensor([1.0, 0.3, 1e-20, 0.0, torch.inf, 1 + half, 1 + 3 * half])
    out = torch.full((7, width), torch.nan).bfloat16()
    native.run("dequantize", codes, scale, out, 7, width)
    assert torch.equal(out.nan_to_num(7), (codes * scale[:, None]).bfloat16().nan_to_num(7))


@with_kernels
@widths
def test_rms_norm_and_its_gradient(width: int) -> None:
    x, grad, weight = within(random(7, width), 109), within(random(7, width, seed=1), 103), random(width, seed=2)
    y, rstd, slope = torch.empty(7, width).bfloat16(), torch.empty(7), torch.empty(7, width).bfloat16()
    native.run("rms_norm", x, weight, y, rstd, 7, width, x.stride(0), 1e-5)
    native.run("rms_norm_backward", grad, x, weight, rstd, slope, 7, width, grad.stride(0), x.stride(0))
    wide = x.double().requires_grad_()
    wanted = F.rms_norm(wide, (width,), weight.double(), 1e-5)
    assert torch.equal(y, (x.float() * rstd[:, None]).bfloat16() * weight)  # rounded before the weight as well
    assert near(y, wanted.detach(), 2 * wanted.detach().abs())
    assert torch.allclose(rstd.double(), (x.double().pow(2).mean(1) + 1e-5).rsqrt(), rtol=1e-6)
    (right,) = torch.autograd.grad(wanted, wide, grad.double())
    assert near(slope, right, right.abs() + 1e-4 * (grad * weight).double().abs().amax(1, keepdim=True) * rstd[:, None])


@with_kernels
@widths
def test_swiglu_and_its_gradient(width: int) -> None:
    both = within(random(6, 2 * width, size=4.0), 210)
    both[:4, 0], both[:4, width] = torch.tensor([-300.0, 300.0, -88.4, 88.4]), 1.0
    grad = random(6, width, seed=1)
    h, out, given = torch.empty(6, width).bfloat16(), torch.empty(6, 2 * width).bfloat16(), grad.clone()
    native.run("swiglu", both, h, 6, width, both.stride(0))
    native.run("swiglu_backward", given, both, out, 6, width, both.stride(0))
    wide = both.double().requires_grad_()
    wanted = F.silu(wide[:, :width]) * wide[:, width:]
    (slope,) = torch.autograd.grad(wanted, wide, grad.double())
    assert torch.equal(given, h) and near(h, wanted.detach(), wanted.detach().abs() * 1.01)
    # 1 + g (1 - s) may cancel
    assert near(out, slope, 1.01 * slope.abs() + 1e-4 * (grad * both[:, width:]).double().abs().repeat(1, 2))


@with_kernels
@pytest.mark.parametrize("half", [1, 8, 16, 20, 64])
def test_rotary_embedding_and_its_gradient(half: int) -> None:
    heads, cos, sin = random(5, 3, 2 * half), within(random(5, 2 * half, seed=1), 150), within(random(5, 2 * half), 170)
    room = torch.full((5, 4 * 2 * half), torch.nan).bfloat16().view(5, 4, 2 * half)
    for backward in (False, True):
        room[:, :3] = heads
        own = room[:, :3]
        native.run("rotate", own, cos, sin, 5, 3, 2 * half, own.stride(0), cos.stride(0), sin.stride(0), backward)
        wide = heads.double().requires_grad_()
        turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
        wanted = wide * cos.double()[:, None] + turned * sin.double()[:, None]
        if backward:
            (wanted,) = torch.autograd.grad(wanted, wide, heads.double())
        size = heads.double().abs().amax(-1, keepdim=True) * (cos.abs() + sin.abs() + 9)[:, None].double()
        assert near(own, wanted.detach(), wanted.detach().abs() + 1e-4 * size)
        assert bool(room[:, 3].isnan().all())


@with_kernels
@widths
def test_cross_entropy(width: int) -> None:
    logits = within(random(8, width, size=3.0), 110)
    logits[1, 0], logits[2] = 1e4, -1e4
    if width > 1:
        logits[3, -1] = -torch.inf
    labels = torch.tensor([width - 1, 0, 0, 0, loss.IGNORED, width // 2, width - 1, 0])
    logits[4] = torch.nan  # ignored
    for gradient in (False, True):
        own, losses = within(logits, 110), torch.full((8,), torch.nan)
        native.run("cross_entropy", own, labels, losses, 8, width, own.stride(0), loss.IGNORED, gradient)
        wide = logits.double().masked_fill(labels[:, None] == loss.IGNORED, 0).requires_grad_()
        wanted = F.cross_entropy(wide, labels, ignore_index=loss.IGNORED, reduction="none")
        assert torch.allclose(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
        if not gradient:
            assert torch.equal(own.nan_to_num(7), logits.nan_to_num(7))
            continue
        (slope,) = torch.autograd.grad(wanted.sum(), wide)
        assert near(own, slope, 1.01 * slope.abs() + 3e-5)
        assert width == 1 or float(own[3, -1]) == 0.0


@with_kernels
@pytest.mark.parametrize("tokens", WIDTHS)
def test_causal_softmax_and_its_gradient(tokens: int) -> None:
    scores, slope = random(3, tokens, tokens, size=5.0), random(3, tokens, tokens, seed=1)
    beyond = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for part in (scores, slope):
        part.masked_fill_(beyond, torch.nan)  # is not read
    weights, given = scores.clone(), slope.clone()
    native.run("causal_softmax", weights, 3, tokens, 0.3)
    wide = scores.double().masked_fill(beyond, -torch.inf).requires_grad_()
    wanted = torch.softmax(0.3 * wide, -1)
    assert near(weights, wanted.detach(), 1.01 * wanted.detach() + 1e-12)
    native.run("causal_softmax_backward", given, weights, 3, tokens, 0.3)
    p, g = weights.double(), slope.double().masked_fill(beyond, 0)
    right = 0.3 * p * (g - (p * g).sum(-1, keepdim=True))
    assert near(given, right, 1.01 * right.abs() + 1e-4 * p * g.abs().amax(-1, keepdim=True))
    assert not bool(given.masked_select(beyond).any()) and not bool(weights.masked_select(beyond).any())


@with_kernels
def test_the_threads_do_not_show_and_a_nan_stays_in_its_row() -> None:
    """Of rows enough for several threads."""
    both, labels = random(1200, 66), torch.arange(1200) % 66
    both[7, 3] = torch.nan
    found = []
    for threads in (1, 3):
        own, now = both.clone(), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            h, losses = torch.empty(1200, 33).bfloat16(), torch.empty(1200)
            native.run("swiglu", own, h, 1200, 33, 66)
            native.run("cross_entropy", own, labels, losses, 1200, 66, 66, loss.IGNORED, True)
        finally:
            torch.set_num_threads(now)
        assert bool(losses[7].isnan()) and bool(own[7].isnan().all()) and bool(h[7, 3].isnan())
        clean = torch.arange(1200) != 7
        assert all(bool(part[clean].isfinite().all()) for part in (h, losses, own))
        found.append([part.nan_to_num(7) for part in (h, losses, own)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@with_kernels
def test_a_label_beyond_the_vocabulary_is_refused() -> None:
    for label in (9, -1, 1 << 40):
        with pytest.raises(IndexError, match=rf"label {label}: labels are -100, or 0 to 8"):
            loss.cross_entropy_(random(2, 9), torch.tensor([0, label]), torch.empty(2), True)


@with_kernels
def test_what_they_take() -> None:
    x = random(4, 8)
    assert native.takes(x, x[:, :4], torch.nn.Parameter(x, requires_grad=False))
    others = x.float(), x.t(), x.to("meta"), x[:, ::2], torch.nn.Parameter(x), x[0, 0]
    views = torch._neg_view(x), torch._efficientzerotensor((4, 8), dtype=x.dtype)
    for other in (*others, *views):
        assert not native.takes(x, other)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not native.takes(mode.from_tensor(x)) and not native.takes(x)
    seen: list[bool] = []
    torch.func.vmap(lambda row: (seen.append(native.takes(row)), row)[1])(x)
    torch.func.functionalize(lambda y: (seen.append(native.takes(y)), y)[1])(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of jit.trace
        torch.jit.trace(lambda y: (seen.append(native.takes(x)), y + 1)[1], x, check_trace=False)
    assert not any(seen) and len(seen) >= 3


@with_kernels
def test_what_does_not_fit_goes_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what plain torch makes of it, an error or a result."""
    x, labels, losses = random(6, 40), torch.arange(6), torch.empty(6)
    codes, scale = torch.randint(-127, 128, (6, 40), dtype=torch.int8), torch.rand(6) + 1
    heads, token = x.view(6, 2, 20), x.view(1, 1, 6, 40)

    def entropy(labels: Tensor, losses: Tensor) -> Tensor:
        loss.cross_entropy_(x.clone(), labels, losses, True)
        return losses

    cases: list[Callable[[], Tensor]] = [
        lambda: entropy(labels.int(), losses.clone()),
        lambda: entropy(labels.to(torch.uint8), losses.clone()),
        lambda: entropy(labels, losses.double()),
        lambda: loss.linear_cross_entropy(x[:, :8], labels.int(), random(11, 8)),
        lambda: library.read_out(codes, scale.double(), "int8", 64, torch.bfloat16),
        lambda: library.read_out(codes, scale.bfloat16(), "int8", 64, torch.bfloat16),
        lambda: library.read_out(codes, scale[:1], "int8", 64, torch.bfloat16),
        lambda: library.read_out(codes.view(torch.uint8), scale, "int8", 64, torch.bfloat16),
        lambda: cpu_rows.rms_norm(x, random(1), 1e-5),
        lambda: cpu_rows.rotate_(heads.clone(), random(1, 20), random(1, 20)),
        lambda: cpu_rows.rotate_(heads.clone(), random(6, 10), random(6, 10)),
        lambda: cpu_rows.swiglu_backward_(torch.ones(6, 20), x)[0],
        lambda: cpu_attention.attend(token, token, token, -0.5),
    ]
    for case in cases:
        found: list[Any] = []
        for way in helper.WAYS:
            with monkeypatch.context() as patch:
                helper.take(way, patch)
                try:
                    found.append(case())
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    found.append(type(error))
        one, other = found
        assert torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


# ---- how they come about ---------------------------------------------------------------------------------------------


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Look for the kernels as a new process would, in an empty cache, under other variables."""

    def look(**variables: str) -> Any:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        native._looked.clear()
        return native._kernels()

    monkeypatch.setenv("FINETUNA_CACHE", str(tmp_path / "cache"))
    yield look
    monkeypatch.undo()
    native._looked.clear()


@with_kernels
def test_they_are_compiled_once_and_kept(anew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert anew() is not None
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(native, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert anew() is not None


@with_kernels
def test_a_kept_file_that_is_no_library_is_made_anew(anew: Any, tmp_path: Path) -> None:
    assert anew() is not None
    (kept,) = (tmp_path / "cache").iterdir()
    other = tmp_path / "other" / kept.name
    other.parent.mkdir()
    other.write_bytes(b"of another system")
    assert anew(FINETUNA_CACHE=str(other.parent)) is not None and other.stat().st_size > 1000


@with_kernels
def test_a_cache_that_cannot_be_written_is_done_without(anew: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert anew(FINETUNA_CACHE=str(tmp_path / "file" / "cache")) is not None


def test_without_a_compiler_plain_torch_computes_and_says_so_once(anew: Any) -> None:
    with pytest.warns(UserWarning, match="own kernels are left out, plain torch takes longer: .*no-such-compiler"):
        assert anew(CXX="no-such-compiler") is None
    with pytest.warns(UserWarning, match="No closing quotation"):
        assert anew(CXX='g++ "') is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.available() and not native.takes(random(2, 2))
        assert anew(FINETUNA_CPU_KERNELS="0") is None  # asked for: nothing to say


def test_a_warning_that_is_an_error_is_raised_once(anew: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="left out"):
            anew(CXX="no-such-compiler")
        assert not native.available()


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FINETUNA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder() is None
    monkeypatch.setenv("FINETUNA_CACHE", ".")
    assert cache_folder() == Path.cwd()


@with_kernels
@pytest.mark.parametrize("anywhere", [False, True])
def test_a_temporary_folder_from_which_nothing_is_run(
    anew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anywhere: bool
) -> None:
    cache, load = tmp_path / "cache", ctypes.CDLL

    def refused(path: str) -> ctypes.CDLL:
        if anywhere or cache not in Path(path).parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", refused)
    if anywhere:
        with pytest.warns(UserWarning, match="failed to map segment"):
            assert anew() is None
        assert not list(cache.glob("rows*"))
    else:
        assert anew() is not None and native.available()


@with_kernels
def test_another_command_line_is_another_file(anew: Any, tmp_path: Path) -> None:
    assert anew() is not None and anew(CXX="g++ -O1") is not None
    assert len(list((tmp_path / "cache").iterdir())) == 2


@with_kernels
def test_several_threads_look_once(anew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = native._look
    monkeypatch.setattr(native, "_look", lambda: (looks.append(1), look())[1])
    native._looked.clear()
    threads = [threading.Thread(target=native.available) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looks) == 1 and native.available()


@with_kernels
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "failed: status 3"),
        ("echo error: its own >&2; exit 1", "failed: error: its own"),
        (r"printf 'error: \377' >&2; exit 1", "failed: error: "),
    ],
)
def test_a_compiler_that_fails_is_quoted(script: str, said: str, anew: Any, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    with pytest.warns(UserWarning, match=said):
        assert anew(CXX=str(compiler)) is None
    assert not list(tmp_path.glob("cache/*"))


@with_kernels
def test_kernels_that_compute_something_else_are_not_used(
    anew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = native._SOURCE.read_text(encoding="utf-8").replace("* scale[i]", "+ scale[i]")
    (tmp_path / "rows.cpp").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "rows.cpp")
    with pytest.warns(UserWarning, match="they do not compute what torch does"):
        assert anew() is None
    assert not (tmp_path / "cache").exists()


@with_kernels
def test_they_share_the_threads_of_torch() -> None:
    """One pool: no second OpenMP runtime is loaded for them."""
    program = """if True:
        import torch
        from finetuna_lightning.ops import native
        def runtimes():
            names = {line.split()[-1].rpartition("/")[2] for line in open("/proc/self/maps")}
            return {name for name in names if "omp" in name}
        torch.ones(1 << 20).exp()
        before = runtimes()
        x = torch.ones(4096, 64).bfloat16()
        native.run("swiglu", x, torch.empty(4096, 32).bfloat16(), 4096, 32, 64)
        assert before and runtimes() == before, runtimes() - before
        """
    root = Path(native.__file__).parents[2]  # where a relative PYTHONPATH leads
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=dict(os.environ))
