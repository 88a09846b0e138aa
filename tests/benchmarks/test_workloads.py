"""The workloads' shapes, and each run once over a tiny backbone."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from benchmarks import equality, gpu, peers
from benchmarks.common import TINY, SharedBackbone, joint_batches
from benchmarks.ours import Settings, run
from benchmarks.roofline import WAITING, Kernel, kernels_of, part_of
from benchmarks.workloads import RAGGED_RANKS, growing, tokens_of, workload
from finetuna_lightning.nn.quantized import QuantizedWeight

CPU = torch.device("cpu")
QUICK = ["--tiny", "--adapters", "2", "--steps", "1", "--warmup", "1", "--tokens", "8"]


def test_the_workloads_are_those_of_the_design() -> None:
    by_key = {key: workload(key) for key in ("w1", "w2", "w3")}
    shapes = {key: (len(w.ranks), set(w.ranks.values()), tokens_of(w.step(0))) for key, w in by_key.items()}
    assert shapes == {"w1": (8, {16}, 8192), "w2": (1, {16}, 8192), "w3": (64, {16}, 8192)}
    assert by_key["w2"].step(0) == {"adapter0": [1024] * 8}


def test_w4_is_ragged_varies_from_step_to_step_and_is_drawn_the_same_again() -> None:
    work, again = workload("w4"), workload("w4")
    assert tuple(work.ranks.values()) == RAGGED_RANKS and {4, 64} <= set(RAGGED_RANKS)
    steps = [work.step(index) for index in range(20)]
    assert steps == [again.step(index) for index in range(20)]
    assert steps[0] != steps[1]
    for step in steps:
        assert 8192 - 128 < tokens_of(step) <= 8192
        assert all(own and min(own) >= 128 and max(own) <= 2048 for own in step.values())


@pytest.mark.parametrize("adapters", [1, 8, 9, 64, 65])
def test_w5_has_the_same_tokens_whatever_the_adapters(adapters: int) -> None:
    work = growing(adapters, 16 * 65)
    assert tokens_of(work.step(0)) == 16 * 65
    assert len(work.ranks) == adapters and all(len(own) == 1 for own in work.step(0).values())


def test_batches_hold_the_lengths_that_a_workload_says() -> None:
    step = {"a": [5, 3], "b": [4]}
    packed, padded = (joint_batches([step], 50, packed)[0] for packed in (True, False))
    assert packed["lengths"] == [5, 3, 4] and packed["rows"] == padded["rows"] == [2, 1]
    assert padded["attention_mask"].sum(1).tolist() == [5, 3, 4]


def test_a_fit_ends_without_carrying_its_backbone_away(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.Module] = []
    move = QuantizedWeight._apply

    def watched(own: QuantizedWeight, *given: Any) -> QuantizedWeight:
        moved.append(own)
        return move(own, *given)

    class Ending(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            monkeypatch.setattr(QuantizedWeight, "_apply", watched)
            self.backbone = pl_module.backbone

    shared, ending = SharedBackbone(TINY, "int8", CPU), Ending()
    run(shared, growing(2, 8), Settings(1, 1), [ending])
    assert not moved
    assert ending.backbone is shared.model()
    shared.model().cpu()
    assert moved  # it would have been seen


def test_every_workload_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.main(None, ["w1", "w2", "w3", "w4", "w5", "roofline", *QUICK, "--counts", "1", "--kernels", "3"])
    said = capsys.readouterr().out
    assert bench.equal == {"w1": True, "w2": True, "w3": True, "w4": True, "w5": True}
    assert all(f"W{number}: " in said for number in range(1, 6))
    assert list(bench.found["w2"]) == ["ours", "ours recompute"]
    for key, tokens in {"w1": 16, "w2": 64, "w3": 4, "w4": 64}.items():
        (figures,) = bench.found[key]["ours"]
        assert figures.seconds > 0 and math.isfinite(figures.loss) and not figures.failed, key
        assert figures.tokens == pytest.approx(tokens)
    assert all(part in said for part in ("base, forward", "base, backward", "LoRA", "optimizer", "idle"))
    profiled = next(line for line in said.splitlines() if "base, forward" in line)
    assert "TFLOP/s" in profiled


def test_peers_run_in_turn_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.main(["w1"], [*QUICK, "--peers", "bf16,int8,unsloth", "--peer-steps", "1", "--padded"])
    said = capsys.readouterr().out
    runs = [line.split("w1 ")[1].split(":")[0] for line in said.splitlines() if line.startswith("[")]
    assert runs == ["ours", "bf16", "int8", "unsloth"] * 2
    assert "unsloth: s/step not installed" in said
    found = bench.found["w1"]
    for who in ("bf16", "int8"):
        assert all(f.seconds > 0 and math.isfinite(f.loss) and not f.failed for f in found[who]), who
        ratio = fmean(f.rate for f in found["ours"]) / fmean(f.rate for f in found[who])
        assert bench.ratio(found, who, found[who], refused=False) == f"{ratio:.2f}x"
        assert bench.ratio(found, who, found[who], refused=True) == "refused"


def test_no_ratio_after_a_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(equality.ALLOWED, "float32", equality.Allowed(0.0, 0.0, 0.0, 0.0))
    gpu.main(["w1"], [*QUICK, "--peers", "bf16", "--peer-steps", "1", "--rounds", "1"])
    said = capsys.readouterr().out
    assert "NOT EQUAL" in said and "THE EQUALITY CHECK FAILED" in said and "refused" in said


def test_the_check_finds_a_delta_that_is_scaled_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, work = SharedBackbone(TINY, "int8", CPU), workload("w4", 16)
    with gpu.quiet():
        assert equality.check(cut, work, Settings(packed=False)).passed
        monkeypatch.setattr(equality, "ALPHA", 16.0)
        result = equality.check(cut, work, Settings(packed=False))
    assert not result.passed
    assert all(row[1] <= result.allowed.joint_gradient < row[3] for row in result.rows.values())
    assert not replace(result, rows={"a": (math.nan,) * 4}).passed


def test_a_backbone_serves_one_fit_after_another_and_counts_its_adapters() -> None:
    shared = SharedBackbone(TINY, "int8", CPU)
    given = Settings(steps=1, warmup=1)
    with gpu.quiet():
        first, second = (run(shared, growing(count, 30), given) for count in (2, 3))
        again = run(shared, growing(2, 30), given)
    assert shared.model() is shared.model()
    assert first.loss == again.loss
    weights = 4 * 16 * sum(i + o for i, o in [(64, 64)] * 4 + [(64, 128)] * 2 + [(128, 64)]) * 2
    assert second.own["weights"] - first.own["weights"] == weights
    assert second.own["gradients"] - first.own["gradients"] == weights
    assert (
        gpu.marginal_row(2, first, second)[4]
        == f"{(2 * weights + second.own['state'] - first.own['state']) / 2**20:.1f}"
    )


class FullOnce(pl.Callback):
    """Runs out of the device's memory."""

    def on_train_batch_end(self, *given: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_run_that_the_memory_does_not_hold_says_so_and_the_next_goes_on() -> None:
    shared, given = SharedBackbone(TINY, "int8", CPU), Settings(steps=1, warmup=1)
    with gpu.quiet():
        full = run(shared, growing(2, 30), given, [FullOnce()])
        after = run(shared, growing(2, 30), replace(given, recompute=True))
    assert full.failed == "out of memory" and full.cells()[0] == "out of memory"
    assert math.isfinite(after.loss)
    assert gpu.marginal_row(2, after, full)[1] == "out of memory"


def test_more_arguments_are_python_values() -> None:
    assert gpu.arguments_of(["compile=True", "form=[1, 2]", "compute=int8"]) == {
        "compile": True, "form": [1, 2], "compute": "int8",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which would run it")
def test_the_whole_shape_is_not_begun_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["w1"], ["--steps", "1", "--no-check"])
    assert "--tiny runs a small shape on this CPU" in capsys.readouterr().err


def test_a_peer_that_is_not_here_says_so() -> None:
    assert peers.chosen("all") == list(peers.PEERS)
    with pytest.raises(SystemExit, match="no qlora"):
        peers.chosen("bf16,qlora")
    (row,) = peers.run("int8+liger", TINY, None, CPU, [("w1", (1, 8), False)], 1, 1)
    assert row[2].failed


@pytest.mark.parametrize(
    "name, operators, shapes, part",
    [
        ("_gemm", ("finetuna::linear",), (), "base, forward"),
        ("_gemm", ("XBackward", "autograd::engine::evaluate_function: XBackward"), (), "base, backward"),
        ("hopper_gemm", ("_Attention",), ((8192, 4096), (16, 4096)), "base, forward"),
        ("hopper_gemm", ("_LinearCrossEntropy",), ((8192, 4096), (128256, 4096)), "head and loss"),
        ("nvjet_tst_128", ("aten::mm", "_QuantizedLinear"), ((8192, 4096), (4096, 14336)), "base, forward"),
        ("nvjet_tst_64", ("aten::mm", "aten::linear"), ((1024, 4096), (4096, 16)), "LoRA"),
        ("splitKreduce_kernel", ("aten::mm", "aten::linear"), ((1024, 4096), (4096, 16)), "LoRA"),
        ("nvjet_tst_128", ("aten::mm",), ((8192, 4096), (4096, 128256)), "head and loss"),
        ("elementwise_kernel", ("aten::mul", "_QuantizedLinear"), ((14336, 4096),), "quantise, dequantise, transpose"),
        ("_quantize", (), (), "quantise, dequantise, transpose"),
        ("_down", (), (), "LoRA"),
        ("_rows", (), (), "head and loss"),
        ("elementwise_kernel", ("aten::copy_", "aten::to"), ((8192, 128256),), "head and loss"),
        ("flash_fwd_kernel", ("aten::_flash_attention_forward",), (), "attention"),
        ("kOptimizerStatic8bit2StateBlockwise", ("Optimizer.step#AdamW8bit.step",), (), "optimizer"),
        ("_swiglu_backward", (), (), "norm, rotary, SwiGLU"),
        ("Memcpy DtoD (Device -> Device)", ("aten::copy_",), (), "copies"),
        ("vectorized_elementwise_kernel", ("aten::add",), ((1, 8192, 4096),), "elementwise, other"),
    ],
)
def test_a_kernel_is_counted_to_its_part(name: str, operators: tuple[str, ...], shapes: tuple, part: str) -> None:  # type: ignore[type-arg]
    shape = {"vocab_size": 128256, "hidden_size": 4096}
    assert part_of(Kernel(name, operators, shapes, 1.0), workload("w1"), shape) == part


def test_no_kernel_is_counted_twice() -> None:
    """The profiler hangs kernels to its own remarks as well."""
    span = SimpleNamespace(elapsed_us=lambda: 2e6)
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    kernel = SimpleNamespace(name="_gemm", duration=2e6)
    events = [
        SimpleNamespace(name=name, device_type=cpu, kernels=[kernel], input_shapes=(), cpu_parent=None)
        for name in ("_Attention", WAITING)
    ]
    events.append(SimpleNamespace(name="_gemm", device_type=cuda, time_range=span))
    assert kernels_of(SimpleNamespace(events=lambda: events), True) == [Kernel("_gemm", ("_Attention",), (), 2.0)]
