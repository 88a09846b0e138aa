"""What the device can do, and what each part of W1's step reaches.

    python -m benchmarks.roofline [--compute int8] [--kernels 20]     # or beside others: benchmarks.gpu w1 roofline
    python -m benchmarks.roofline --tiny                              # on this machine's CPU

Ceilings: a copy (bytes read and written), and products of M x K by K x N random numbers in bf16, fp8 and int8. Then two
steps of W1 under torch.profiler: each kernel is counted to a part by ``PARTS``. Operations and bytes are what the
mathematics needs, not what a kernel does. Idle is the step's wall time, measured without the profiler, less the
kernels' time.

In an uncompiled step the delta's scaling and addition are elementwise kernels like any other, and counted there."""

from __future__ import annotations

import importlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.common import show
from benchmarks.ours import Figures, Settings, run
from benchmarks.workloads import (
    Workload,
    attention_flops,
    delta_flops,
    head_flops,
    linear_flops,
    tokens_of,
)

PROFILED = 2  # steps
FORWARD = "benchmark: training_step"
WAITING = "Command Buffer Full"  # the profiler's own remark, which it counts kernels to a second time
RANGES = (FORWARD, "Optimizer.")  # which the profiler draws on the device's line too
Maker = Callable[[], Callable[[], Any]]

# The first part whose pattern is found in "kernel < operator < its callers" (lower case) takes the kernel. Products
# that no name tells apart go by their shapes: see ``part_of``.
PARTS: dict[str, str] = {
    "optimizer": r"optimizer|adam|lion|multi_tensor|_foreach",
    "attention": r"flash|fmha|scaled_dot_product|sdpa|attention",
    "head and loss": r"^_rows|cross_entropy|log_softmax|nll_loss|fused_linear_loss|lm_head|head_loss",
    "LoRA": r"^_down|^_outer|^_up_backward|^_add_(chunks|blocks)|lora|low_?rank|grouped_mm|delta",
    "quantise, dequantise, transpose": r"^_quantize|^_transpose|^_dequantize|quanti[sz]e|e4m3|amax|float8(?!.*gemm)",
    "norm, rotary, SwiGLU": r"^_norm|^_rotate|^_swiglu|rms_?norm|rsqrt|rotary|silu|swiglu|rope",
    "base": r"gemm|nvjet|cutlass|xmma|wgmma|_scaled_mm|int_mm|aten::(mm|addmm|bmm|matmul|linear)\b",
    "copies": r"memcpy|memset|copy_|aten::(copy|to|_to_copy|clone|contiguous|cat|zero|fill)",
    "elementwise, other": r"",
}
OWN_PRODUCT = re.compile(r"(_|hopper_)gemm")  # of a layer or of the head, whatever calls it
PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|wgmma|_scaled_mm|int_mm|aten::(mm|addmm|bmm)")
LAYER = re.compile(r"_quantizedlinear|_fp8linear|finetuna")  # an 8-bit layer's own operator, as autograd calls it
BACKWARD = re.compile(r"autograd::engine::evaluate_function|backward")


# ---- ceilings --------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], device: torch.device, least: float) -> float:
    """Of one call, over as many as take ``least`` seconds."""

    def spent(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    spent(2)
    return spent(max(3, min(200, int(least / max(spent(3), 1e-6)))))


def _e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float() / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def _codes(x: Tensor) -> Tensor:
    return (x * (127 / x.abs().amax(1, keepdim=True))).round().to(torch.int8)


def candidates(
    m: int, k: int, n: int, device: torch.device
) -> Iterator[tuple[str, str, Callable[[], Callable[[], Any]]]]:
    """Name, kind and maker of each thing to be timed. ``kind``: copy, bf16, fp8 or int8."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)

    def copy() -> Callable[[], Any]:
        source = drawn(4 * m, n)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def bf16() -> Callable[[], Any]:
        a, b = drawn(m, k), drawn(n, k)
        return lambda: a @ b.t()

    def fp8(fast: bool) -> Callable[[], Any]:
        (a, scale_a), (b, scale_b) = _e4m3(drawn(m, k)), _e4m3(drawn(n, k))
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    def int8() -> Callable[[], Any]:
        a, b = _codes(drawn(m, k)), _codes(drawn(n, k))
        return lambda: torch._int_mm(a, b.t())

    def own(eight_bit: bool) -> Callable[[], Any]:
        gemm: Any = importlib.import_module("finetuna_lightning.ops.kernels.gemm")
        a, b = drawn(m, k), drawn(n, k)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        first = torch.arange(0, m, gemm.TILE_ROWS, device=device, dtype=torch.int32)
        tiles = torch.stack([first, (first + gemm.TILE_ROWS).clamp_max(m), torch.zeros_like(first)])
        if not eight_bit:
            return lambda: gemm.gemm(a, b, out, tiles)
        a8, b8, ones = _codes(a), _codes(b), torch.ones(max(m, n), device=device)
        return lambda: gemm.gemm(a8, b8, out, tiles, row_scale=ones[:m], column_scale=ones[:n])

    yield "copy", "copy", copy
    yield "bf16, torch.matmul", "bf16", bf16
    yield "fp8 row-scaled, torch._scaled_mm", "fp8", lambda: fp8(False)
    yield "the same, fast accumulation", "fp8", lambda: fp8(True)
    yield "int8, torch._int_mm", "int8", int8
    yield "int8 with scales, ops.kernels.gemm", "int8", lambda: own(True)
    yield "bf16, ops.kernels.gemm", "bf16", lambda: own(False)


def ceilings(
    device: torch.device, m: int = 8192, k: int = 4096, n: int = 14336, least: float = 0.2
) -> dict[str, float]:
    """Measure, each for ``least`` seconds, and print; by kind, the best: bytes a second of a copy, operations a second
    of products."""
    best: dict[str, float] = defaultdict(float)
    rows = []
    for name, kind, make in candidates(m, k, n, device):
        try:
            seconds = seconds_of(make(), device, least)
        except (ImportError, RuntimeError, AttributeError, TypeError, NotImplementedError, ValueError) as error:
            rows.append([name, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", ""])
            continue
        rate = (2 * 2 * 4 * m * n if kind == "copy" else 2 * m * k * n) / seconds
        best[kind] = max(best[kind], rate)
        rows.append([name, f"{seconds * 1e6:,.0f}", f"{rate / 1e9:,.0f} GB/s" if kind == "copy" else teraflops(rate)])
    show(f"ceilings: {m:,} x {k:,} by {k:,} x {n:,}; copy of {8 * m * n / 2**20:,.0f} MiB", ["", "us", "rate"], rows)
    return dict(best)


def teraflops(rate: float) -> str:
    """Operations a second, in words."""
    return f"{rate / 1e12:,.1f} TFLOP/s"


# ---- a step ----------------------------------------------------------------------------------------------------------


class Profile(pl.Callback):
    """Records ``PROFILED`` steps from step ``first`` on."""

    def __init__(self, first: int, device: torch.device) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        self.cuda = device.type == "cuda"
        if self.cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.first = first
        self.profile = torch.profiler.profile(activities=kinds, record_shapes=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            pl_module.training_step = torch.profiler.record_function(FORWARD)(pl_module.training_step)
            self._wait()
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first + PROFILED - 1:
            self._wait()
            self.profile.stop()
            del pl_module.training_step  # the wrapped one, before the class's

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Kernel:
    """Runs of one kernel at one place: its name, the operators around it (innermost first), the shapes of the
    innermost's inputs that are known; seconds and runs in all."""

    name: str
    operators: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    seconds: float
    runs: int = 1


def kernels_of(profile: Any, cuda: bool) -> list[Kernel]:
    """The kernels that a profile saw; on the CPU, each operator's own time."""
    found: dict[Any, list[float]] = defaultdict(list)
    attributed: dict[str, float] = defaultdict(float)
    total: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            if not (getattr(event, "is_user_annotation", False) or event.name.startswith(RANGES)):
                total[event.name].append(event.time_range.elapsed_us() * 1e-6)
        elif event.name == WAITING:
            continue
        elif cuda:
            for kernel in event.kernels:
                if not kernel.name.startswith(RANGES):
                    found[kernel.name, *_around(event)].append(kernel.duration * 1e-6)
                    attributed[kernel.name] += kernel.duration * 1e-6
        else:
            found[event.name, *_around(event)].append(event.self_cpu_time_total * 1e-6)
    kernels = [Kernel(*where, sum(times), len(times)) for where, times in found.items()]
    for name, times in total.items():  # what no operator launched
        if (more := sum(times) - attributed[name]) > 1e-6 * sum(times):
            kernels.append(Kernel(name, (), (), more, len(times)))
    return kernels


def _around(event: Any) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Up to the forward or backward pass, both of which run within ``Optimizer.step``, as Lightning's closure."""
    operators: list[str] = []
    shapes: tuple[tuple[int, ...], ...] = ()
    at = event
    while at is not None:
        operators.append(at.name)
        if not shapes:
            shapes = tuple(tuple(s) for s in at.input_shapes or () if s and all(isinstance(d, int) for d in s))
        if at.name == FORWARD or at.name.startswith("autograd::engine::evaluate_function"):
            break
        at = at.cpu_parent
    return tuple(operators), shapes


def part_of(kernel: Kernel, work: Workload, shape: dict[str, Any]) -> str:
    """The part that ``kernel`` belongs to: by shape, if it is a product of which one side is a rank or the vocabulary,
    by what called it, if that is an 8-bit layer; else by ``PARTS``."""
    text = " < ".join((kernel.name, *kernel.operators)).lower()
    backward = BACKWARD.search(text) is not None
    sides = [side for dimensions in kernel.shapes for side in dimensions[-2:]]
    ranks = sorted(set(work.ranks.values()))
    name = next(part for part, pattern in PARTS.items() if re.search(pattern, text))
    if OWN_PRODUCT.match(kernel.name):
        name = "head and loss" if shape["vocab_size"] in sides else "base"
    elif name in ("optimizer", "attention"):
        return name
    elif PRODUCT.search(" < ".join((kernel.name, *kernel.operators[:1])).lower()):
        if shape["vocab_size"] in sides:
            name = "head and loss"
        elif sides and (min(sides) in ranks or min(sides) <= min(sum(work.ranks.values()), shape["hidden_size"] // 8)):
            name = "LoRA"
        elif name not in ("head and loss", "LoRA"):
            name = "base"
    elif any(dimensions[-1] == shape["vocab_size"] for dimensions in kernel.shapes):
        name = "head and loss"
    elif LAYER.search(text) and name in ("elementwise, other", "copies"):
        name = "quantise, dequantise, transpose"
    if name == "base":
        return "base, backward" if backward else "base, forward"
    return name


def step_work(work: Workload, shape: dict[str, Any], layers: int, parameters: int) -> dict[str, tuple[float, str]]:
    """By part, what a step needs: operations (kind of product) or bytes (``copy``)."""
    (lengths,) = work.lengths(1)
    tokens = tokens_of(lengths)
    once = linear_flops(tokens, shape, layers)
    return {
        "base, forward": (once, "base"),
        "base, backward": (once, "base"),
        "LoRA": (delta_flops(lengths, work.ranks, shape, layers), "bf16"),
        "attention": (attention_flops(lengths, shape, layers), "bf16"),
        "head and loss": (2 * head_flops(tokens, shape), "bf16"),
        # float32 weight, gradient and two states of a byte are read, weight and states written
        "optimizer": (16.0 * parameters, "copy"),
    }


def step_table(
    work: Workload, shape: dict[str, Any], layers: int, figures: Figures, kernels: list[Kernel], best: dict[str, float]
) -> None:
    """Print the parts of a step."""
    spent: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        spent[part_of(kernel, work, shape)] += kernel.seconds / PROFILED
    busy = sum(spent.values())
    needed = step_work(work, shape, layers, figures.own["weights"] // 4)
    kind = next((k for k in ("int8", "fp8") if k in figures.compute), "bf16")
    rows = []
    for part, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        cells = ["", "", ""]
        if part in needed and seconds > 0:
            amount, ceiling = needed[part]
            ceiling = kind if ceiling == "base" else ceiling
            rate = amount / seconds
            top = best.get(ceiling, 0.0)
            cells = (
                [f"{amount / 1e9:,.1f} GB", f"{rate / 1e9:,.0f} GB/s"]
                if ceiling == "copy"
                else [f"{amount / 1e12:,.2f} TFLOP", teraflops(rate)]
            ) + [f"{rate / top:.0%} of {ceiling}" if top else ""]
        rows.append([part, f"{seconds * 1e3:.2f}", f"{seconds / figures.seconds:.1%}", *cells])
    idle = figures.seconds - busy
    rows.append(["idle", f"{idle * 1e3:.2f}", f"{idle / figures.seconds:.1%}", "", "", ""])
    rows.append(["step", f"{figures.seconds * 1e3:.2f}", "100%", "", f"{figures.rate:,.0f} tokens/s", ""])
    title = f"{work.key.upper()} by parts: {work.title}, compute {figures.compute}, {layers} layers"
    show(title, ["", "ms a step", "share", "needed", "reached", ""], rows)


def kernel_table(work: Workload, shape: dict[str, Any], kernels: list[Kernel], count: int) -> None:
    """Print the kernels that take longest, each with its part and the operator that launched it."""
    spent: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel in kernels:
        operator = kernel.operators[0] if kernel.operators else ""
        place = spent[kernel.name[:56], part_of(kernel, work, shape), operator[:40]]
        place[0] += kernel.seconds / PROFILED
        place[1] += kernel.runs / PROFILED
    first = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
    rows = [[*place, f"{runs:.0f}", f"{seconds * 1e3:.2f}"] for place, (seconds, runs) in first]
    show(f"the {count} that take longest", ["kernel", "part", "launched by", "a step", "ms a step"], rows)


def roofline(shared: Any, work: Workload, given: Settings, kernels: int = 20, tiny: bool = False) -> None:
    """Ceilings, then a profile of ``work`` over ``shared``."""
    best = ceilings(shared.device, *((64, 64, 128, 0.01) if tiny else ()))
    profile = Profile(given.warmup + given.steps, shared.device)
    figures = run(shared, work, given, [profile], after=PROFILED)
    if figures.failed:
        print(f"no profile: {figures.failed}")
        return
    found = kernels_of(profile.profile, profile.cuda)
    step_table(work, shared.shape, shared.layers, figures, found, best)
    kernel_table(work, shared.shape, found, kernels)


def main() -> None:
    from benchmarks.gpu import main as run_all  # which imports this file

    run_all(["roofline"], description=__doc__)


if __name__ == "__main__":
    main()
