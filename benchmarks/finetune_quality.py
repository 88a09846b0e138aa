"""Does fine-tuning over 8 bits reach the held-out loss of fine-tuning over 16 bits? The quickstart's bf16 original is
loaded in each storage scheme; over it, one fine-tuned model for every domain and seed, r = 16 on all linear layers but
the head.

    python -m benchmarks.finetune_quality [--steps 300] [--seeds 3] [--device cuda] [--markdown] [--json out.json]

At one domain and seed all schemes start from the same adapter and train on the same batches, so the change against 16
bits is taken run by run: loss / (16-bit loss of the same domain and seed) - 1. Losses are nats per token over fixed
windows of documents that no run trains on; the softmax is in float32. ``--jobs`` trains schemes side by side, each in a
process of its own: a model this small is paced by the host. On a GPU all of them are, by default.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.common import machine, show
from finetuna_lightning.backbone import QUICKSTART_FOLDER, load_backbone
from finetuna_lightning.finetuned import LinearAdapterConfig, new_finetuned
from finetuna_lightning.fusing import fuse_
from finetuna_lightning.quickstart.domains import DOMAINS, describe, documents
from finetuna_lightning.quickstart.pretrain import encode
from finetuna_lightning.training.precision import EightBitPrecision, has_fp8, has_int8, resolve_dtype

SOURCE = "tests/data/quickstart_bf16"
BASELINE = "16-bit"
# by the table's name, how weights are stored, and how products with them are computed
SCHEMES = {
    BASELINE: ("none", "16bit"), "int8": ("int8", "16bit"), "int8, int8 compute": ("int8", "int8"),
    "int8-blockwise": ("int8-blockwise", "16bit"), "fp8": ("fp8", "16bit"), "fp8, fp8 compute": ("fp8", "fp8"),
}  # fmt: skip
HELD_OUT_ONE_IN = 5  # documents of a domain, which come in the order of a hash
PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # all linear layers but the head
LORA = LinearAdapterConfig(r=16, alpha=32, dropout=0.0, bias=False)
TOLERANCE = 0.01
COLUMNS = ["scheme", "domain", "before", "after", "spread over seeds", "change", "worst run", "within 1%"]


class Run(NamedTuple):
    """One fine-tuned model: held-out losses before and after training."""

    scheme: str
    domain: str
    seed: int
    before: float
    after: float
    seconds: float


def read_domain(domain: str, tokens: int, windows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A domain's training stream [T], and ``windows`` held-out windows [windows, tokens + 1] spread over the rest."""
    tokenizer: Any = AutoTokenizer.from_pretrained(QUICKSTART_FOLDER)
    texts = documents(domain)
    train = [text for index, text in enumerate(texts) if index % HELD_OUT_ONE_IN]
    held_out = encode(tokenizer, texts[::HELD_OUT_ONE_IN]).unfold(0, tokens + 1, tokens)
    chosen = torch.linspace(0, len(held_out) - 1, min(windows, len(held_out))).long()
    return encode(tokenizer, train).to(device), held_out[chosen].to(device)


def next_token_loss(model: nn.Module, ids: Tensor, causal: Tensor) -> Tensor:
    """Nats per token of ``ids`` [rows, tokens + 1]. The mask [1, 1, tokens, tokens] is given, since transformers looks
    for packed sequences, and waits for the device, where it has to make one."""
    logits = model(input_ids=ids[:, :-1], attention_mask=causal, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, rows: int, causal: Tensor) -> float:
    """The mean loss over ``windows`` [windows, tokens + 1], ``rows`` at a time."""
    total = sum(next_token_loss(model, batch, causal).double() * len(batch) for batch in windows.split(rows))
    return float(total) / len(windows)


def train(model: nn.Module, batches: Tensor, lr: float, causal: Tensor) -> None:
    """AdamW over ``batches`` [steps, rows, tokens + 1], the learning rate falling to zero in a straight line."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=batches.is_cuda)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        next_token_loss(model, batch, causal).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()


def run_scheme(label: str, options: argparse.Namespace) -> list[Run]:
    """All domains and seeds over one base."""
    device, bare = torch.device(options.device), label == BASELINE
    scheme, compute = SCHEMES[label]
    base = load_backbone(SOURCE, scheme=scheme, dtype=resolve_dtype(options.dtype, device), device=device)
    EightBitPrecision(compute=compute).set_compute(base)
    if not bare:
        fuse_(base, device, next(base.parameters()).dtype)
    causal = torch.ones(options.tokens, options.tokens, dtype=torch.bool, device=device).tril()[None, None]
    runs = []
    for domain in options.domains:
        stream, held_out = read_domain(domain, options.tokens, options.windows, device)
        windows = stream.unfold(0, options.tokens + 1, 1)
        before = evaluate(base, held_out, options.batch, causal)
        for seed in range(options.seeds):
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(seed)
            starts = torch.randint(len(windows), (options.steps, options.batch), generator=generator)
            model = new_finetuned(base, PROJECTIONS, (), linear_config=LORA, do_not_quantize=bare, seed=seed)
            train(model, windows[starts.to(device)], options.lr, causal)
            after = evaluate(model, held_out, options.batch, causal)
            runs.append(Run(label, domain, seed, before, after, time.perf_counter() - start))
            progress = f"{label}, {domain}, seed {seed}: {before:.4f} -> {after:.4f} in {runs[-1].seconds:.1f} s"
            print(progress, file=sys.stderr, flush=True)
    return runs


def verdict(changes: list[float]) -> str:
    """``yes`` where every run is within the tolerance, not the mean alone. A loss that is not a number is a no."""
    if not fmean(changes) <= TOLERANCE:
        return "no"
    return "yes" if all(change <= TOLERANCE for change in changes) else "on average, not in the worst run"


def summarise(runs: list[Run]) -> list[list[str]]:
    """The table's rows: for each scheme its domains, and their mean with the verdict."""
    reference = {(run.domain, run.seed): run.after for run in runs if run.scheme == BASELINE}
    rows = []
    for scheme in dict.fromkeys(run.scheme for run in runs):
        own = [run for run in runs if run.scheme == scheme]
        for domain in [*dict.fromkeys(run.domain for run in own), "mean"]:
            part = [run for run in own if domain in (run.domain, "mean")]
            after = [run.after for run in part]
            changes = [run.after / reference[run.domain, run.seed] - 1 for run in part]
            compared = [f"{fmean(changes):+.3%}", f"{max(changes):+.3%}"] if scheme != BASELINE else ["", ""]
            rows.append([
                scheme, domain, f"{fmean(run.before for run in part):.4f}", f"{fmean(after):.4f}",
                "" if domain == "mean" else f"{max(after) - min(after):.4f}", *compared,
                verdict(changes) if domain == "mean" and scheme != BASELINE else "",
            ])  # fmt: skip
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The table for a model card."""
    lines = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 3), "---"], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="16-bit always runs")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of --tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="of activations: auto is float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--jobs", type=int, help="schemes trained at a time; by default all on a GPU, one on the CPU")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    labels = [label for label in SCHEMES if label in (BASELINE, *options.schemes)]
    able = {"16bit": True, "int8": has_int8(device), "fp8": has_fp8(device)}
    labels = [label for label in labels if able[SCHEMES[label][1]]]
    sources = [describe(domain) for domain in options.domains]
    start = time.perf_counter()
    jobs = min(len(labels), options.jobs or (len(labels) if device.type == "cuda" else 1))
    if jobs == 1:
        parts = [run_scheme(label, options) for label in labels]
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(run_scheme, labels, repeat(options)))
    runs = [run for part in parts for run in part]
    rows, seconds = summarise(runs), time.perf_counter() - start
    what = f"held-out loss of fine-tuning, r = 16, {options.steps} steps of {options.batch} x {options.tokens} tokens"
    title = f"{what}, lr {options.lr:g}, {options.seeds} seeds, {resolve_dtype(options.dtype, device)}, {seconds:.0f} s"
    if options.json:
        record: dict[str, Any] = {"machine": machine(), "options": {**vars(options), "json": str(options.json)}}
        record |= {"domains": sources, "seconds": seconds, "runs": [run._asdict() for run in runs], "table": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        print("\n".join([f"{title}; {machine()}", "", markdown(rows)]))
    else:
        show(title, COLUMNS, rows)
    print("\n".join(sources))


if __name__ == "__main__":
    main()
