"""What others reach on the same shape: peft over bitsandbytes int8 or bfloat16, each with and without liger-kernel.

One adapter, LoRA r = 16 on the same seven projections, bitsandbytes AdamW 8-bit, sdpa attention, random weights made on
the device matrix by matrix. Everything that can be is set for speed: adapters in the activations' type rather than
float32 (no casts, no autocast), no gradient clipping, batches on the device already. int8 is what ``load_in_8bit``
gives: ``Linear8bitLt`` with threshold 6.0 everywhere but in the head."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.common import PROJECTIONS, default_dtype, llama_config, release_memory
from benchmarks.ours import Figures, StepClock
from benchmarks.workloads import ALPHA, RANK
from finetuna_lightning.backbone import skeleton

THRESHOLD = 6.0  # bitsandbytes' and transformers' default
PEERS = ("int8", "int8+liger", "bf16", "bf16+liger", "unsloth")
FAILURES = (RuntimeError, TypeError, AttributeError, ValueError, ImportError, AssertionError)  # a peer's own
Job = tuple[str, tuple[int, int], bool]


def chosen(text: str) -> list[str]:
    """The peers that ``text`` names: all, none, or some by name (``int8+liger,bf16``).

    Raises:
        SystemExit: for another name.
    """
    names = list(PEERS) if text == "all" else [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise SystemExit(f"--peers: no {', '.join(unknown)} (there are: all, {', '.join(PEERS)})")
    return names


def obstacle(name: str, device: torch.device) -> str:
    """Why a peer cannot run here; empty where it can."""
    if name == "unsloth":
        if importlib.util.find_spec("unsloth") is None:
            return "not installed"
        return "installed, not run: it loads a checkpoint and patches transformers for the whole process"
    needed = ["peft", "bitsandbytes", *(["liger_kernel"] if name.endswith("+liger") else [])]
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if name.endswith("+liger") and device.type != "cuda":
        return "liger-kernel needs a GPU"
    return ""


def random_llama(
    shape: Mapping[str, Any], layers: int | None, eight_bit: bool, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A transformers Llama with random weights on ``device``; ``eight_bit``: its projections are bitsandbytes' int8."""
    model = skeleton(llama_config(shape, layers), "causal-lm")
    generator = torch.Generator(device).manual_seed(0)
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() == 2:
                value.normal_(0.0, 0.02, generator=generator)
            if eight_bit and isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, _int8_linear(value))
            else:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    if eight_bit:
        model.is_loaded_in_8bit = True  # by which peft knows its layer  # type: ignore[assignment]
    return model.to(device) if not eight_bit else model


def _int8_linear(weight: torch.Tensor) -> nn.Module:
    """bitsandbytes' layer over ``weight`` [out, in], quantised by bitsandbytes."""
    import bitsandbytes as bnb

    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear8bitLt(
        in_features, out_features, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
    return layer


def with_adapter(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` under peft, one adapter, its weights in ``dtype``."""
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped.train()


@contextmanager
def liger(model: Any) -> Iterator[None]:
    """``model`` (under peft) with liger-kernel's norms, rotary embedding, SwiGLU and fused loss; within, transformers'
    Llama module is patched too, since the rotary embedding is a function of it, and is put back."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = {name: getattr(modeling_llama, name) for name in names}
    apply_liger_kernel_to_llama(model=model.get_base_model())
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


def recompute_(model: Any, on: bool) -> None:
    """Recompute each layer in the backward pass, non-reentrant; or do not."""
    base = model.get_base_model()
    if on:
        enable: Callable[..., Any] = getattr(base, "activation_checkpointing_enable", None) or (
            base.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    else:
        for module in base.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False


def measure(model: Any, rows: int, tokens: int, device: torch.device, warmup: int, steps: int) -> Figures:
    """Training steps of ``rows`` x ``tokens`` random tokens."""
    import bitsandbytes as bnb

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4)
    vocab = model.config.vocab_size
    batches = [torch.randint(0, vocab, (rows, tokens), device=device) for _ in range(warmup + steps)]
    clock, loss = StepClock(device), torch.zeros(())
    release_memory()
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    for index, ids in enumerate(batches):
        if index == warmup:
            clock.start()
        if index >= warmup:
            clock.mark()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.stop()
    figures = Figures((clock.stopped - clock.started) / steps, clock.median(), rows * tokens, loss=float(loss.detach()))
    if clock.cuda:
        figures.peak = figures.steady = torch.cuda.max_memory_allocated()
        figures.reserved = torch.cuda.max_memory_reserved()
    return figures


def run(name: str, shape: Mapping[str, Any], layers: int | None, device: torch.device, jobs: list[Job], warmup: int,
        steps: int) -> Iterator[tuple[str, bool, Figures]]:  # fmt: skip
    """The figures of each of ``jobs`` (workload, rows and tokens, recompute), over one model that is built, used and
    freed. What fails says so in its row, and the others run."""
    if reason := obstacle(name, device):
        yield from ((key, recompute, Figures(failed=reason)) for key, _, recompute in jobs)
        return
    eight_bit = name.startswith("int8")
    dtype = default_dtype(device) if eight_bit else torch.bfloat16
    model: Any = None
    release_memory()
    try:
        model = with_adapter(random_llama(shape, layers, eight_bit, device, dtype), dtype)
        with liger(model) if name.endswith("+liger") else nullcontext():
            for job in jobs:
                yield _run_job(model, job, device, warmup, steps)
    except FAILURES as error:  # while it was built
        yield from ((key, recompute, Figures(failed=_said(error))) for key, _, recompute in jobs)
    finally:
        model = None
        release_memory()


def _said(error: Exception) -> str:
    """An error in one short line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"


def _run_job(model: Any, job: Job, device: torch.device, warmup: int, steps: int) -> tuple[str, bool, Figures]:
    key, (rows, tokens), recompute = job
    recompute_(model, recompute)
    try:
        figures = measure(model, rows, tokens, device, warmup, steps)
    except FAILURES as error:
        figures = Figures(failed=_said(error))
    model.zero_grad(set_to_none=True)
    release_memory()
    return key, recompute, figures
