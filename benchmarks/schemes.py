"""What 8 bits cost the quickstart backbone: the error of every layer's output on real inputs, and held-out perplexity.

    python -m benchmarks.schemes [--tokens 20000] [--source tests/data/quickstart_bf16]

The output error is ||Y8 - Y|| / ||Y|| (Frobenius) over the inputs that each layer gets from held-out Python sources,
Y in float32.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.common import show
from finetuna_lightning.backbone import QUICKSTART_FOLDER, load_backbone, quantize_model_
from finetuna_lightning.nn.quantized import QuantizedLinear, QuantizedWeight
from finetuna_lightning.quickstart.pretrain import collect_corpus, encode, evaluate

SCHEMES = {"int8": 64, "int8-blockwise": 64, "fp8": 64}


def held_out_stream(tokens: int) -> Tensor:
    """Tokens of the standard library's held-out files [tokens]."""
    texts = [file.text for file in collect_corpus() if file.held_out]
    return encode(AutoTokenizer.from_pretrained(QUICKSTART_FOLDER), texts)[:tokens]


@torch.no_grad()
def output_errors(model: nn.Module, ids: Tensor, scheme: str, block_size: int) -> list[float]:
    """The relative output error of every linear layer of ``model`` (float32), on what it is given for ``ids`` [1,
    tokens]."""
    errors: list[float] = []

    def compare(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        eight = QuantizedLinear(QuantizedWeight.from_weight(weight, scheme, block_size), layer.bias)  # type: ignore[arg-type]
        errors.append(float((eight(inputs[0]) - output).norm() / output.norm()))

    hooks = [m.register_forward_hook(compare) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def measure(source: str, tokens: int) -> list[dict[str, Any]]:
    """One row for the original and one for each scheme: worst and mean output error, perplexity, its change."""
    stream = held_out_stream(tokens)
    original = load_backbone(source, scheme="none")
    base = evaluate(original, stream, 4)
    rows: list[dict[str, Any]] = [{"scheme": "bf16 original", "perplexity": math.exp(base), "change": 0.0}]
    for scheme, block_size in SCHEMES.items():
        errors = output_errors(original, stream[None, :512], scheme, block_size)
        quantized = quantize_model_(copy.deepcopy(original), scheme, block_size)
        loss = evaluate(quantized, stream, 4)
        rows.append(
            {
                "scheme": scheme,
                "worst": max(errors),
                "mean": sum(errors) / len(errors),
                "perplexity": math.exp(loss),
                "change": math.exp(loss - base) - 1,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--source", default="tests/data/quickstart_bf16")
    options = parser.parse_args()
    show(
        f"the quickstart backbone in 8 bits, {options.tokens:,} held-out tokens",
        ["", "worst layer's output error", "mean", "perplexity", "change"],
        [
            [
                row["scheme"],
                f"{row['worst']:.2%}" if "worst" in row else "",
                f"{row['mean']:.2%}" if "mean" in row else "",
                f"{row['perplexity']:.4f}",
                f"{row['change']:+.3%}",
            ]
            for row in measure(options.source, options.tokens)
        ],
    )


if __name__ == "__main__":
    main()
