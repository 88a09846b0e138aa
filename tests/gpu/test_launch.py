"""Kernels launched past Triton's own look-up: one compiled for other arguments must never run."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton: it comes with torch's CUDA builds")
tl = pytest.importorskip("triton.language")


@triton.jit(do_not_specialize=["size"])
def scaled(
    x_ptr, bias_ptr, out_ptr, factor, step, eps, size, BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if WHOLE:  # without a mask it is read 16 bytes at a time where Triton was told that the address is a multiple of 16
        out = tl.load(x_ptr + at * step).to(tl.float32) * factor + eps
    else:
        out = tl.load(x_ptr + at * step, mask=inside, other=0.0).to(tl.float32) * factor + eps
    if BIAS:
        out += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def test_a_kernel_runs_for_the_arguments_that_it_was_compiled_for() -> None:
    from finetuna_lightning.ops.kernels.launch import Kernel

    kernel = Kernel(scaled)
    device = torch.device("cuda")
    torch.manual_seed(0)
    for _ in range(2):  # what was compiled is looked up in the second round
        for dtype in (torch.float32, torch.float16):
            store = torch.randn(40_000, device=device).to(dtype)
            for start in (0, 1, 8):  # addresses that are multiples of 16, and not
                for factor in (1, 2, 16, 17, -3, 1 << 33):
                    for step, size in ((1, 1000), (16, 2000), (3, 1), (1, 16), (1, 4096)):
                        for bias in (None, torch.randn(size, device=device).to(dtype)):
                            x = store[start:]
                            out = torch.full((size + 1,), torch.nan, device=device)
                            kernel(
                                (triton.cdiv(size, 1024),), x, bias, out, factor, step, 0.5, size,
                                BIAS=bias is not None, WHOLE=size % 1024 == 0, BLOCK=1024, num_warps=4,
                            )  # fmt: skip
                            right = x[: step * size : step].double() * factor + 0.5
                            right = right if bias is None else right + bias.double()
                            torch.testing.assert_close(out[:-1].double(), right, rtol=1e-5, atol=1e-5 * abs(factor))
                            assert out[-1].isnan()


def test_kernels_are_kept_for_no_more_than_triton_compiles_for() -> None:
    """Sizes that vary from batch to batch neither compile anything nor fill the memory."""
    from finetuna_lightning.ops.kernels.launch import Kernel

    kernel = Kernel(scaled)
    x = torch.ones(5000, device="cuda")
    out = torch.empty(5000, device="cuda")
    for size in range(1, 5000, 7):
        kernel((triton.cdiv(size, 256),), x, None, out, 3, 5, 0.0, size, BIAS=False, WHOLE=False, BLOCK=256)
        kernel((triton.cdiv(size, 256),), x, None, out, 100 + 2 * size, 7, 0.1, 1, BIAS=False, WHOLE=False, BLOCK=256)
    assert len(kernel._compiled) == 2  # for factors that are multiples of 16, and for others


def test_arguments_that_vary_come_last() -> None:
    from finetuna_lightning.ops.kernels.launch import Kernel

    @triton.jit(do_not_specialize=["size"])
    def wrong(size, out_ptr):
        tl.store(out_ptr, size)

    with pytest.raises(ValueError, match="must come last"):
        Kernel(wrong)


def test_what_the_copy_engine_cannot_read_is_refused() -> None:
    from finetuna_lightning.ops.kernels.gemm import gemm
    from finetuna_lightning.ops.tiling import tiling

    tiles = tiling([("", 0, 64)], torch.device("cuda")).tiles
    b = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16)
    whole = torch.randn(64 * 64 + 8, device="cuda", dtype=torch.bfloat16)
    gemm(whole[8:].view(64, 64), b, out, tiles)
    with pytest.raises((AssertionError, RuntimeError)):
        gemm(whole[1 : 1 + 64 * 64].view(64, 64), b, out, tiles)
