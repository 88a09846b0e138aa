"""The product on Hopper's own instructions: against float64 and against Triton's kernel, whatever the lengths, the
shapes and what the end of it adds; and how it is compiled, kept and done without."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton: it comes with torch's CUDA builds")

from finetuna_lightning.ops.kernels import hopper, rows
from finetuna_lightning.ops.kernels.gemm import config, gemm
from finetuna_lightning.ops.tiling import tiling

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

DEVICE = torch.device("cuda")
# one tile, an odd number, ragged, many, few rows, and more than the eight pairs that go together
LENGTHS = ([128], [128] * 3, [77, 300, 1, 128], [1024] * 4, [5], [128] * 17 + [3], [128] * 21)
SIZES = ((256, 64), (512, 256), (1032, 208), (4096, 1024), (64, 1040), (1032, 784), (1032, 64), (1032, 336))
FORMS = ("int8", "slices", "along K", "along N")
ROUNDED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, device=DEVICE, dtype=torch.int8)


def tiles_of(lengths: list[int]) -> Tensor:
    spans, start = [], 0
    for slot, length in enumerate(lengths):
        spans.append((f"a{slot}", start, start + length))
        start += length
    return tiling(spans, DEVICE).tiles


def within(t: Tensor, before: int, after: int) -> Tensor:
    """The same as columns of a wider matrix: beside it stands what would be seen in any result."""
    room = torch.full((*t.shape[:-1], before + t.shape[-1] + after), 0, device=t.device, dtype=t.dtype)
    room.fill_(111 if t.dtype == torch.int8 else torch.nan)
    return room[..., before : before + t.shape[-1]].copy_(t)


def operands(form: str, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any], Tensor]:
    """X, W, what else the product is told, and the product in float64."""
    if form == "slices":
        x, w = codes(2, m, k), codes(n, k, seed=1)
        x[1] -= 1  # down to -128
        scales = {"row_scale": random(m, dtype=torch.float32).abs() / 127, "column_scale": random(n, seed=2).float()}
        sums = x[0].double() @ w.double().t() + torch.floor((x[1].double() @ w.double().t() + 128) / 256)
        return x, within(w, 32, 64), scales, sums * scales["row_scale"].double()[:, None] * scales["column_scale"]
    if form == "int8":
        x, w = codes(m, k), codes(n, k, seed=1)
        scales = {"row_scale": random(m, dtype=torch.float32).abs() / 127, "column_scale": random(n, seed=2).float()}
        whole = x.double() @ w.double().t() * scales["row_scale"].double()[:, None] * scales["column_scale"].double()
        return within(x, 16, 32), within(w, 32, 64), scales, whole
    x, w = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    whole = x.double() @ w.double().t()
    if form == "along N":
        return within(x, 8, 16), within(w.t(), 16, 24), {"b_is_kn": True}, whole
    return within(x, 8, 16), within(w, 16, 24), {}, whole


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product(lengths: list[int], form: str, dtype: torch.dtype) -> None:
    """Each matrix is a part of a wider one, of another width each; but for X in slices, which lie together."""
    tiles, m = tiles_of(lengths), sum(lengths)
    for n, k in SIZES:
        x, w, told, whole = operands(form, m, n, k, dtype)
        bias, residual = random(n, dtype=dtype, seed=5), within(random(m, n, dtype=dtype, seed=6), 24, 40)
        for columns in (0, 16, 48, 80):
            given, wanted = dict(told), whole
            if columns:
                low = within(random(m, columns, dtype=dtype, seed=3), 8, 8)
                room = torch.full((len(lengths), columns + 16, n + 48), torch.nan, device=DEVICE, dtype=dtype)
                matrices = room[:, :columns, 8 : 8 + n].copy_(random(len(lengths), columns, n, dtype=dtype, seed=4))
                given |= {"low": low, "matrices": matrices}
                parts = zip(low.split(lengths), matrices, strict=True)
                wanted = whole + torch.cat([part.double() @ matrix.double() for part, matrix in parts])
            cases: list[dict[str, Any]] = [{}, {"bias": bias}, {"bias": bias, "residual": residual}]
            for more in cases:
                right = sum((t.double() for t in more.values()), wanted)
                room = torch.full((m + 2, n + 40), torch.nan, device=DEVICE, dtype=dtype)
                out = room[:m, 16 : 16 + n]
                assert hopper.takes(x, w, out, *of(given | more))
                gemm(x, w, out, tiles, **given, **more)
                # rounded once; and sums of float32, of numbers that may cancel
                allowed = right.abs() * ROUNDED[dtype] + 2e-5 * right.abs().amax()
                assert bool(((out.double() - right).abs() <= allowed).all()), (n, k, columns, *more)
                out.fill_(torch.nan)
                assert bool(room.isnan().all())  # nothing beside it was written


def test_int8_of_rows_that_have_scales_alone() -> None:
    """As in a backward pass, where W's scales are in the gradient."""
    x, w, given, whole = operands("int8", 200, 520, 272, torch.bfloat16)
    out = torch.empty(200, 520, device=DEVICE, dtype=torch.bfloat16)
    wanted = whole / given.pop("column_scale").double()
    gemm(x, w, out, tiles_of([200]), **given)
    assert bool(((out.double() - wanted).abs() <= wanted.abs() * 2.0**-8).all())


def test_on_the_current_stream() -> None:
    x, w, out = random(256, 256), random(256, 256, seed=1), torch.zeros(256, 256, device=DEVICE, dtype=torch.bfloat16)
    tiles, source = tiles_of([256]), random(256, 256, seed=2)
    wanted = gemm(source, w, torch.empty_like(out), tiles)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some hundredths of a second
        x.copy_(source)
        gemm(x, w, out, tiles)
    stream.synchronize()
    assert torch.equal(out, wanted)


def test_addresses_beyond_31_bits() -> None:
    """Rows of a result, and of a residual, that begin more than 2^31 numbers from the first."""
    m, n = 16_512, 131_072
    x, w, room = random(m, 16), random(n, 16, seed=1), torch.empty(m, n, device=DEVICE, dtype=torch.bfloat16)
    room[-128:] = 1.0
    gemm(x, w, room, tiles_of([m]), residual=room)  # each number of it is read before it is written
    wanted = x[-128:].double() @ w.double().t() + 1.0
    assert bool(((room[-128:].double() - wanted).abs() <= wanted.abs() * 2.0**-8 + 1e-4).all())


@pytest.mark.parametrize("compiled", [False, True])
def test_first_thing_in_a_new_thread(compiled: bool) -> None:
    """Which has no context of the driver's before torch launches something there."""
    x, w, out = random(128, 64), random(64, 64, seed=1), torch.empty(128, 64, device=DEVICE, dtype=torch.bfloat16)
    tiles = tiles_of([128])
    wanted = gemm(x, w, torch.empty_like(out), tiles)
    torch.cuda.synchronize()
    if not compiled:
        hopper._kernel.cache_clear()
    thread = threading.Thread(target=gemm, args=(x, w, out, tiles))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def of(given: dict[str, Any]) -> list[Any]:
    names = ("row_scale", "column_scale", "bias", "residual", "low", "matrices")
    return [*map(given.get, names), given.get("b_is_kn", False)]


def test_int8_is_triton_s_to_the_bit() -> None:
    lengths = [77, 300, 128]
    x, w, given, _ = operands("int8", 505, 520, 272, torch.bfloat16)
    given["residual"] = random(505, 520, seed=7)
    outs = [torch.empty(505, 520, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    gemm(x, w, outs[0], tiles_of(lengths), **given)
    gemm(x, w, outs[1], tiles_of(lengths), **given, options=config(True))
    assert torch.equal(*outs)


@pytest.mark.parametrize("form", FORMS)
def test_company_changes_no_bit(form: str) -> None:
    """Alone, and as the second of three whose neighbours are NaN in all that a float can be."""
    x, w, given, _ = operands(form, 400, 512, 256, torch.bfloat16)
    low, matrices, residual = random(400, 32, seed=3), random(3, 32, 512, seed=4), random(400, 512, seed=5)
    own = slice(130, 330)
    in_int8 = x.dtype == torch.int8
    for t in (low, residual, *([] if in_int8 else [x])):
        t[:130], t[330:] = torch.nan, torch.nan
    matrices[0], matrices[2] = torch.nan, torch.nan
    if in_int8:
        given["row_scale"][:130], given["row_scale"][330:] = torch.nan, torch.nan
    together = torch.empty(400, 512, device=DEVICE, dtype=torch.bfloat16)
    gemm(x, w, together, tiles_of([130, 200, 70]), **given, low=low, matrices=matrices, residual=residual)
    if in_int8:
        given["row_scale"] = given["row_scale"][own].clone()
    alone = torch.empty(200, 512, device=DEVICE, dtype=torch.bfloat16)
    gemm(
        x[..., own, :].clone(), w, alone, tiles_of([200]), **given,
        low=low[own].clone(), matrices=matrices[1:2].clone(), residual=residual[own].clone(),
    )  # fmt: skip
    assert torch.equal(together[own], alone) and not bool(alone.isnan().any())
    assert bool(together[:130].isnan().all()) and bool(together[330:].isnan().all())


@pytest.mark.parametrize("given", ["random", "just above a power of two"])
@pytest.mark.parametrize("k", [4096, 28672])
def test_slices_are_closer_than_weights_in_16_bits(k: int, given: str) -> None:
    """To the product of X, in bfloat16, and W: of plain rows by twenty times and more; of rows of one number a hundred
    or ten thousand times the others about as close."""
    x, w, scale = random(384, k), codes(256, k, seed=1), random(256, seed=2, dtype=torch.float32).abs()
    x[128:256, 7] *= 100
    x[256:, 9] = 1e4
    if given != "random":  # of which a scale would be nearly doubled
        x[128:256, 7], x[256:, 9] = 128, 8192
    values, row_scale = rows.quantize(x, slices=2)
    wanted = x.double() @ (w.double() * scale.double()[:, None]).t()
    shrink = 1 / wanted.abs().amax(1).float()
    known = (wanted * shrink[:, None]).half()  # taken off before the result is rounded: what is left is the error
    out = torch.empty(384, 256, device=DEVICE, dtype=torch.float16)
    gemm(values, w, out, tiles_of([384]), row_scale=row_scale * shrink, column_scale=scale, residual=-known)
    ours = out.double() + known.double() - wanted * shrink[:, None]
    theirs = (x.double() @ (w.float() * scale[:, None]).bfloat16().double().t() - wanted) * shrink[:, None]
    ratio = (ours.square().view(3, -1).mean(1) / theirs.square().view(3, -1).mean(1)).sqrt()
    assert bool((ratio < torch.tensor([0.05, 0.6, 1.5], device=DEVICE)).all()), ratio


def test_the_rest_is_rounded_to_the_codes_unit() -> None:
    """Sums that are exact in 16 bits."""
    x, w = codes(2, 128, 32), codes(64, 32, seed=1) % 4
    x[0] %= 3
    out = torch.empty(128, 64, device=DEVICE, dtype=torch.float16)
    gemm(x, w, out, tiles_of([128]), row_scale=torch.ones(128, device=DEVICE))
    left, right = x.double(), w.double().t()
    assert torch.equal(out.double(), left[0] @ right + torch.floor((left[1] @ right + 128) / 256))


def test_the_largest_slices_fit_their_sums() -> None:
    k = hopper.LONGEST_SLICED
    x, w = torch.full((2, 128, k), 127, device=DEVICE, dtype=torch.int8), codes(64, 1).sign().expand(64, k) * 127
    x[1, 64:] = -128
    out = torch.empty(128, 64, device=DEVICE, dtype=torch.bfloat16)
    ones = torch.ones(128, device=DEVICE)
    gemm(x, w.contiguous(), out, tiles_of([128]), row_scale=ones)
    wanted = (x[0].double() + x[1].double() / 256) @ w.double().t()
    assert bool(((out.double() - wanted).abs() <= wanted.abs() * 2.0**-8).all())


def test_the_largest_codes_fit_their_sums() -> None:
    k = hopper.LONGEST
    x, w = torch.full((128, k), 127, device=DEVICE, dtype=torch.int8), codes(64, 1).sign().expand(64, k) * 127
    out = torch.empty(128, 64, device=DEVICE, dtype=torch.bfloat16)
    ones = torch.ones(128, device=DEVICE)
    gemm(x, w.contiguous(), out, tiles_of([128]), row_scale=ones)
    wanted = x.double() @ w.double().t()
    assert bool(((out.double() - wanted).abs() <= wanted.abs() * 2.0**-8).all())
    for given, longest in ((x, hopper.LONGEST), (torch.stack([x, x]), hopper.LONGEST_SLICED)):
        for length, takes in ((longest, True), (longest + 16, False)):
            a, b = torch.empty(*given.shape[:-1], length, device=DEVICE, dtype=torch.int8), w.new_empty(64, length)
            assert hopper.takes(a, b, out, *of({"row_scale": ones})) == takes


def test_rows_that_are_one_row_are_not_taken() -> None:
    x, w, given, _ = operands("int8", 128, 64, 64, torch.bfloat16)
    out = torch.empty(128, 64, device=DEVICE, dtype=torch.bfloat16)
    assert hopper.takes(x, w, out, *of(given | {"residual": random(128, 64)}))
    assert not hopper.takes(x, w, out, *of(given | {"residual": random(1, 64).expand(128, 64)}))


def test_slices_are_nothing_for_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, given, _ = operands("slices", 128, 64, 64, torch.bfloat16)
    out = torch.empty(128, 64, device=DEVICE, dtype=torch.bfloat16)
    for other in (x.transpose(1, 2).contiguous().transpose(1, 2), x[:1], x.float()):
        assert not hopper.takes(other, w, out, *of(given))
    monkeypatch.setattr(hopper, "takes", lambda *_: False)
    with pytest.raises(ValueError, match=r"slices \[2, 128, 64\] are for Hopper's kernel"):
        gemm(x, w, out, tiles_of([128]), **given)


@pytest.mark.parametrize(
    "change",
    ["columns that are no multiple of 8", "a scale of 16 bits", "a bias of 32 bits", "out in 32 bits", "no row scale",
     "a residual between addresses", "a bias at an odd one", "out between addresses", "out in other 16 bits",
     "row scales in 16 bits"],
)  # fmt: skip
def test_what_it_does_not_take_is_triton_s(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 100 if change.startswith("columns") else 96
    in_16_bits = ("a bias of 32 bits", "out in other 16 bits", "row scales in 16 bits")
    form = "along K" if change in in_16_bits else "int8"
    x, w, given, wanted = operands(form, 128, n, 64, torch.bfloat16)
    out, room = torch.empty(128, n, device=DEVICE, dtype=torch.bfloat16), random(128 * n + 8).zero_()
    if change == "a scale of 16 bits":
        given["column_scale"] = given["column_scale"].bfloat16()
    if change == "a bias of 32 bits":
        given["bias"] = torch.zeros(n, device=DEVICE)
    if change == "out in 32 bits":
        out = out.float()
    if change == "out in other 16 bits":
        out = out.half()
    if change == "out between addresses":
        out = room[4:-4].view(128, n)
    if change == "a residual between addresses":
        given["residual"] = room[4:-4].view(128, n)
    if change == "a bias at an odd one":
        given["bias"] = room[1 : 1 + n]
    if change == "row scales in 16 bits":
        given["row_scale"] = torch.full((128,), 3.0, device=DEVICE)  # the equation has none there
    if change == "no row scale":
        del given["row_scale"]
        assert not hopper.takes(x, w, out, *of(given))
        return
    monkeypatch.setattr(hopper, "product", lambda *_: pytest.fail("taken"))
    gemm(x, w, out, tiles_of([128]), **given)
    assert float((out.double() - wanted).abs().max() / wanted.abs().max()) < 5e-3


def test_tables_of_matrices_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_KEPT_MAPS", 8)
    x, w, out = random(64, 64), random(64, 64, seed=1), torch.empty(64, 64, device=DEVICE, dtype=torch.bfloat16)
    room = torch.empty(40, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    wanted = gemm(x, w, out, tiles_of([64])).clone()
    for copy in room:
        assert torch.equal(gemm(copy.copy_(x), w, out, tiles_of([64])), wanted)
        assert len(hopper._maps) <= 8


# ---- compiled, kept, done without ------------------------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a new process, with a cache of its own."""
    monkeypatch.setenv("FINETUNA_CACHE", str(tmp_path / "cache"))
    kept = (hopper._kernel, hopper._say)
    for function in kept:
        function.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    for function in kept:
        function.cache_clear()


def small() -> tuple[Tensor, Tensor]:
    """A product, and what it is."""
    x, w, given, wanted = operands("int8", 128, 64, 64, torch.bfloat16)
    out = torch.empty(128, 64, device=DEVICE, dtype=torch.bfloat16)
    return gemm(x, w, out, tiles_of([128]), **given), wanted


def near(pair: tuple[Tensor, Tensor]) -> bool:
    return float((pair[0].double() - pair[1]).abs().max() / pair[1].abs().max()) < 5e-3


def test_what_was_compiled_is_kept(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert near(small()) and len(list(anew.glob("hopper-*.bin"))) == 1
    hopper._kernel.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "_compiled", lambda *_: pytest.fail("compiled again"))
        assert near(small())
    (file,) = anew.glob("hopper-*.bin")
    whole = file.read_bytes()
    for other in (whole[:1000], whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1])):  # cut off, gone, changed
        file.write_bytes(other)
        hopper._kernel.cache_clear()
        assert near(small()) and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(anew: Path) -> None:
    anew.write_text("no folder")
    assert near(small()) and hopper._kernel(0, 0, 1, False, 1) is not None


def test_left_out_where_nobody_wants_it(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNA_CUDA_KERNELS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert near(small()) and hopper._kernel(0, 0, 1, False, 1) is None
        assert not hopper.takes_slices(torch.device("cuda", 0), torch.bfloat16)
    assert not anew.exists()


@pytest.mark.parametrize("obstacle", ["no NVRTC", "a source that does not compile"])
def test_done_without_and_said_once(anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, obstacle: str) -> None:
    if obstacle == "no NVRTC":

        def nothing() -> Any:
            raise OSError("libnvrtc.so.13: cannot open shared object file")

        monkeypatch.setattr(hopper, "_nvrtc", nothing)
    else:
        (tmp_path / "hopper.cu").write_text("this is no C++;\n")
        monkeypatch.setattr(hopper, "_SOURCE", tmp_path / "hopper.cu")
    said = "libnvrtc" if obstacle == "no NVRTC" else r"NVRTC failed \(\d+\): hopper.cu.*error"
    with pytest.warns(UserWarning, match=f"Hopper's own kernel is left out, Triton's takes longer: .*{said}"):
        assert near(small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert near(small())


def test_what_may_pass_is_raised_and_not_kept(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is full when a kernel is first asked for: the next product is the kernel's all the same."""

    class Full:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: 2) if name == "cuModuleLoadData" else getattr(driver, name)

    driver = hopper._driver()
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "_driver", Full)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
            small()
    assert near(small()) and hopper._kernel(0, 0, 1, False, 1) is not None
