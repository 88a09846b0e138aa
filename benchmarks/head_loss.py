"""The output head and the loss, forward and backward: fused in chunks, against logits of all tokens.

    python -m benchmarks.head_loss [--tokens 8192] [--features 4096] [--vocabulary 128256] [--dtype bfloat16]
                                   [--scheme int8] [--chunks 1024 2048 4096] [--repeats 5]

The peer is what a training step did before: logits in the 16-bit type, cross entropy of their float32 copy; and
liger-kernel's fused loss over a dequantised head, where it is installed. The gradients of all must agree, or no figure
is shown. Runs alternate. Peak: above what inputs and codes take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import show
from finetuna_lightning.ops import reference
from finetuna_lightning.ops.library import quantized_linear
from finetuna_lightning.ops.loss import linear_cross_entropy

Way = Callable[[Tensor], Tensor]


def ways(labels: Tensor, codes: Tensor, scale: Tensor, scheme: str, chunks: list[int]) -> dict[str, Way]:
    """By name: hidden -> mean loss."""

    def logits(hidden: Tensor) -> Tensor:
        out = quantized_linear(hidden, codes, scale, None, scheme=scheme, block_size=64)
        return F.cross_entropy(out.float(), labels)

    def fused(chunk: int) -> Way:
        return lambda hidden: linear_cross_entropy(hidden, labels, codes, scale, scheme=scheme, chunk=chunk).mean()

    found: dict[str, Way] = {"logits": logits} | {f"fused, chunks of {chunk}": fused(chunk) for chunk in chunks}
    if codes.is_cuda and find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = lambda hidden: liger(
            reference.dequantize(codes, scale, scheme, 64, hidden.dtype), hidden, labels
        )
    return found


def measure(way: Way, hidden: Tensor) -> tuple[float, float, Tensor]:
    """Milliseconds, peak MiB (on a GPU), and the gradient."""
    hidden = hidden.detach().requires_grad_()
    if hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if hidden.is_cuda else 0
    started = time.perf_counter()
    way(hidden).backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    took = (time.perf_counter() - started) * 1e3
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if hidden.is_cuda else float("nan")
    assert hidden.grad is not None
    return took, peak, hidden.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.features, device=device, dtype=dtype)
    weight = torch.randn(options.vocabulary, options.features, device=device, dtype=dtype) * 0.02
    codes, scale = reference.quantize(weight, options.scheme)
    del weight
    labels = torch.randint(options.vocabulary, (options.tokens,), device=device)
    compared = ways(labels, codes, scale, options.scheme, options.chunks)
    wanted = measure(compared["logits"], hidden)[2].double()
    for name, way in compared.items():
        error = float((measure(way, hidden)[2].double() - wanted).norm() / wanted.norm())
        if not error < (2e-2 if dtype.itemsize == 2 else 1e-5):
            raise SystemExit(f"{name}: the gradient is {error:.1e} of its norm away from that of the logits")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for _ in range(options.repeats):
        for name, way in compared.items():
            taken[name].append(measure(way, hidden)[:2])
    rows = []
    for name, runs in taken.items():
        milliseconds = sorted(took for took, _ in runs)
        rows.append([name, f"{milliseconds[len(runs) // 2]:,.1f}", f"{milliseconds[0]:,.1f} to {milliseconds[-1]:,.1f}",
                     f"{max(peak for _, peak in runs):,.0f}"])  # fmt: skip
    title = f"{options.tokens} tokens, head {options.vocabulary} x {options.features} in {options.scheme}, {dtype}"
    show(title, ["head and loss", "median ms", "all", "peak MiB"], rows)


if __name__ == "__main__":
    main()
