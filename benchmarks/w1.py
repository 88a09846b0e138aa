"""W1: a Llama-3-8B shape with random weights, LoRA r=16 on all seven projections, 8 adapters x 1 sequence x 1,024
tokens a step, through Trainer.fit.

    python -m benchmarks.w1 [--steps 10] [--adapters 8] [--tokens 1024] [--scheme int8] [--optim adamw8bit]
    [--recompute]
"""

from __future__ import annotations

import argparse
import tempfile

import lightning.pytorch as pl
import torch
import transformers

import finetuna_lightning as ft
from benchmarks.common import LLAMA_3_8B, StepTimer, random_backbone, random_batches, show
from finetuna_lightning.backbone import enable_checkpointing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B["num_hidden_layers"])
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--optim", default="adamw8bit")
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = transformers.LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": options.layers})
    backbone = random_backbone(config, options.scheme, device, dtype)
    if options.recompute:
        enable_checkpointing(backbone)
    names = [f"adapter{index}" for index in range(options.adapters)]
    module = ft.MultiAdapterModule(
        backbone,
        {name: ft.AdapterConfig(rank=16, alpha=32, lr=1e-4) for name in names},
        ft.OptimConfig(options.optim),
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timer, freeze = StepTimer(), ft.FreezeQuantizedWeights()
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_steps=options.steps, logger=False,
        plugins=[ft.EightBitPrecision()], callbacks=[timer, freeze], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, random_batches(names, options.steps, 1, options.tokens, config.vocab_size))
    seconds = timer.median()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    own = sum(adapter.nbytes for adapter in module.adapters.adapters())
    show(
        f"W1: {options.adapters} adapters x 1 x {options.tokens} tokens, {options.scheme}, {options.layers} layers",
        ["", "s/step", "tokens/s", "peak GiB", "backbone GiB", "adapters GiB", "loss"],
        [[
            "recompute" if options.recompute else "no recompute",
            f"{seconds:.3f}",
            f"{options.adapters * options.tokens / seconds:,.0f}",
            f"{peak:.1f}",
            f"{module.adapters.backbone_nbytes / 2**30:.2f}",
            f"{own / 2**30:.3f}",
            f"{float(trainer.callback_metrics['train/loss']):.3f}",
        ]],
    )  # fmt: skip


if __name__ == "__main__":
    main()
