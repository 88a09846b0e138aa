"""Train the quickstart backbone: a Llama of 6 million parameters that has read CPython's standard library only.

    python -m finetuna_lightning.quickstart.pretrain --write-corpus corpus.jsonl.gz --write-tokenizer tokenizer
    python -m finetuna_lightning.quickstart.pretrain --corpus corpus.jsonl.gz --tokenizer tokenizer --output DIR \
        --minutes 4

The first line collects the sources of the Python that runs it; the second may run on another machine, under another
Python. DIR becomes a Hugging Face folder in bf16 plus ``training.json``, which says how it was made.
The texts of the adapter domains stay out of the corpus (``domains.EXCLUDED_FROM_CORPUS``), and so do tables.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetuna_lightning.quickstart.domains import excluded_from_corpus

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE, CONTEXT = 4096, 512
MAX_FILE_BYTES = 400_000
HELD_OUT_ONE_IN = 50
# Tables and machine-made files; names stand for their submodules too. lib2to3's test data is partly Python 1.
TABLES = ("html.entities", "lib2to3.tests.data", "msilib", "stringprep", "test.re_tests")
# A line break takes the indentation after it along, so "\n        return" is two tokens; a word takes the space, dot,
# bracket or underscore before it along.
PRE_TOKENS = r"[\r\n]+[ \t]*|[^\r\n\t\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+(?!\S)|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


class SourceFile(NamedTuple):
    """One file of the corpus: its path under the standard library, and the Python version that carries it."""

    path: str
    text: str
    python: str

    @property
    def held_out(self) -> bool:
        """Whether it is among the 2% that are never trained on. The path alone decides, so a new version agrees."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def collect_corpus() -> list[SourceFile]:
    """The standard library's sources in the order of their paths, each text once. Some 28 MB with ``test``."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _belongs(name) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in seen and "decoding_table =" not in text:
            seen.add(text)
            files.append(SourceFile(name.as_posix(), text, platform.python_version()))
    return files


def _belongs(name: Path) -> bool:
    if {"site-packages", "dist-packages"} & set(name.parts) or name.parts[0].startswith(("_sysconfigdata", "config-")):
        return False
    module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
    return not excluded_from_corpus(module) and not any(f"{module}.".startswith(f"{table}.") for table in TABLES)


def write_corpus(files: list[SourceFile], target: Path) -> None:
    """One JSON object a line, gzipped when the name ends in ``.gz``; the same files give the same bytes."""
    lines = "".join(json.dumps(file._asdict()) + "\n" for file in files).encode()
    data = gzip.compress(lines, mtime=0) if target.suffix == ".gz" else lines
    save_folder(target.parent, lambda folder: Path(folder, target.name).write_bytes(data))


def read_corpus(source: Path) -> list[SourceFile]:
    """Read what ``write_corpus`` wrote."""
    data = source.read_bytes()
    lines = gzip.decompress(data) if source.suffix == ".gz" else data
    records = (json.loads(line) for line in lines.decode().splitlines())
    return [SourceFile(record["path"], record["text"], record.get("python", "unknown")) for record in records]


def save_folder(target: Path, *writers: Callable[[str], Any]) -> None:
    """Let each writer fill a scratch folder, then move its files into ``target``, each at once, weights last."""
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving.", dir=target))
    try:
        for writer in writers:
            writer(str(scratch))
        for path in sorted(scratch.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
            path.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(scratch)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back as it went in. Under 20 seconds on two CPU cores."""
    tokenizer = Tokenizer(models.BPE())
    words, as_bytes = Split(Regex(PRE_TOKENS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The Hugging Face face of a ``tokenizers.Tokenizer``: special tokens, context length, chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids [tokens], an end-of-text token before each and after the last."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = itertools.chain.from_iterable([eos, *one.ids] for one in encoded)
    return torch.tensor([*ids, eos], dtype=torch.long)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The quickstart architecture, in fp32, freshly initialised."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(stream: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches [B, CONTEXT + 1]: each pass cuts the stream at a new offset and shuffles the pieces."""
    windows = stream.unfold(0, CONTEXT + 1, 1)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        starts = torch.arange(min(offset, len(windows) - 1), len(windows), CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in torch.split(starts, batch_size):
            yield windows[chunk.to(stream.device)]


def cross_entropy(model: Callable[..., Any], ids_BT: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Next-token loss in nats; bf16 autocast on CUDA, the model's own type elsewhere."""
    with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16, enabled=ids_BT.is_cuda):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, stream: torch.Tensor, batch_size: int) -> float:
    """Nats per token of the held-out stream, read in windows that do not overlap, each token predicted once."""
    model.eval()
    total = torch.zeros((), device=stream.device, dtype=torch.float64)
    for batch in torch.split(stream.unfold(0, CONTEXT + 1, CONTEXT), batch_size):
        total += cross_entropy(model, batch, "sum").double()
    tail = (len(stream) - 1) % CONTEXT
    if tail:
        total += cross_entropy(model, stream[None, -tail - 1 :], "sum").double()
    model.train()
    return float(total) / (len(stream) - 1)


@dataclass
class Recipe:
    """What the run may be told; the defaults are the quickstart's."""

    steps: int = 4000
    minutes: float | None = None
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    evaluations: int = 40
    seed: int = 0
    compile: bool = False

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is spent, 0 to 1: of the steps or of the minutes, whichever is further."""
        spent = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(step / self.steps, spent))

    def scale(self, progress: float) -> float:
        """The learning rate as a share of its peak: linear warm-up, then a cosine to a twentieth."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.01)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices (the tied embedding too) and leaves norms alone."""
    parameters = list(model.parameters())
    norms = [parameter for parameter in parameters if parameter.ndim < 2]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def train(model: nn.Module, train_ids: torch.Tensor, held_out_ids: torch.Tensor, recipe: Recipe) -> dict[str, Any]:
    """Train in place and leave the best weights in ``model``. Returns the run's figures, the loss curve included."""
    optimizer = build_optimizer(model, recipe)
    run = torch.compile(model) if recipe.compile and train_ids.is_cuda else model
    data = batches(train_ids, recipe.batch_size, torch.Generator().manual_seed(recipe.seed))
    best_loss, best_step, best_weights, curve = math.inf, 0, {}, []
    start = last_line = time.perf_counter()
    progress, step, tokens, evaluated = 0.0, 0, 0, 0
    model.train()
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.scale(progress)
        batch = next(data)
        loss = cross_entropy(run, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + batch[:, 1:].numel()
        now = time.perf_counter()
        progress = recipe.progress(step, now - start)
        due = int(progress * recipe.evaluations) > evaluated or progress >= 1.0
        if not due and now - last_line < 5:
            continue
        last_line = now
        line = {"step": step, "epoch": tokens / len(train_ids), "train_loss": loss.item(), "lr": group["lr"]}
        if due:
            evaluated = int(progress * recipe.evaluations)
            line["held_out_loss"] = evaluate(model, held_out_ids, recipe.batch_size)
            if line["held_out_loss"] < best_loss:
                best_loss, best_step = line["held_out_loss"], step
                best_weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
            curve.append({name: round(value, 6) for name, value in line.items()})
        seconds = time.perf_counter() - start
        text = " ".join(f"{name} {value:.5g}" for name, value in line.items())
        print(f"{progress:4.0%} {seconds:.0f} s {tokens / seconds:,.0f} tok/s {text}", flush=True)
    if not best_weights:
        raise RuntimeError("the held-out loss was never finite: lower --learning-rate")
    model.load_state_dict(best_weights)
    figures = {"steps": step, "tokens_seen": tokens, "epochs": tokens / len(train_ids)}
    return {**figures, "seconds": time.perf_counter() - start, "best_step": best_step, "curve": curve}


def corpus_figures(files: list[SourceFile], train_tokens: int, held_out_tokens: int) -> dict[str, Any]:
    """What was read, in files, bytes and tokens, with a hash that names it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.text}\0".encode())
    held_out = [file for file in files if file.held_out]
    return {
        "python": sorted({file.python for file in files}),
        "sha256": digest.hexdigest(),
        "files": len(files),
        "bytes": sum(len(file.text.encode()) for file in files),
        "train_tokens": train_tokens,
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(file.text.encode()) for file in held_out),
        "held_out_tokens": held_out_tokens,
    }


def pretrain(
    files: list[SourceFile], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, device: torch.device, output: Path
) -> dict[str, Any]:
    """The whole run: encode, train, round to bf16, measure what was rounded, save. Returns ``training.json``."""
    train_ids = encode(tokenizer, [file.text for file in files if not file.held_out]).to(device)
    held_out_ids = encode(tokenizer, [file.text for file in files if file.held_out]).to(device)
    corpus = corpus_figures(files, len(train_ids), len(held_out_ids))
    print(json.dumps(corpus), flush=True)
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer)
    network: nn.Module = model
    network.to(device)
    figures = train(network, train_ids, held_out_ids, recipe)
    network.to(torch.bfloat16)
    nats = evaluate(network, held_out_ids, recipe.batch_size)
    record = {
        "held_out_perplexity_per_token": math.exp(nats),
        "held_out_bits_per_byte": nats / math.log(2) * (len(held_out_ids) - 1) / corpus["held_out_bytes"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "recipe": asdict(recipe),
        "corpus": corpus,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **figures,
    }

    def write_record(folder: str) -> None:
        Path(folder, "training.json").write_text(json.dumps(record, indent=1) + "\n")

    network.cpu()
    save_folder(output, model.save_pretrained, tokenizer.save_pretrained, write_record)
    return record


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every field of ``Recipe`` is a flag."""
    parser = argparse.ArgumentParser(description="Train the quickstart backbone on CPython's standard library.")
    parser.add_argument("--output", type=Path, help="folder for the model; without it nothing is trained")
    parser.add_argument("--corpus", type=Path, help="read the corpus from this file instead of this Python's library")
    parser.add_argument("--write-corpus", type=Path, help=".jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json, instead of training one")
    parser.add_argument("--write-tokenizer", type=Path, help="folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, help="stop at this time, or at --steps, whichever comes first")
    for name, value in asdict(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true", help="CUDA only")
        elif value is not None:
            parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    parsed = parser.parse_args(arguments)
    if not (parsed.output or parsed.write_corpus or parsed.write_tokenizer):
        parser.error("nothing to do: give --output, --write-corpus or --write-tokenizer")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for, in the order corpus, tokenizer, training."""
    given = parse_arguments(arguments)
    files = read_corpus(given.corpus) if given.corpus else collect_corpus()
    if given.write_corpus:
        write_corpus(files, given.write_corpus)
    if not (given.output or given.write_tokenizer):
        return
    if given.tokenizer:
        tokenizer = wrap_tokenizer(Tokenizer.from_file(str(given.tokenizer / "tokenizer.json")))
    else:
        tokenizer = train_tokenizer([file.text for file in files if not file.held_out])
    if given.write_tokenizer:
        save_folder(given.write_tokenizer, tokenizer.save_pretrained)
    if not given.output:
        return
    name = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    recipe = Recipe(**{key: getattr(given, key) for key in asdict(Recipe())})
    record = pretrain(files, tokenizer, recipe, torch.device(name), given.output)
    figures = ("steps", "seconds", "held_out_perplexity_per_token", "held_out_bits_per_byte")
    print(f"saved {given.output}:", ", ".join(f"{figure} {record[figure]:.4g}" for figure in figures))


if __name__ == "__main__":
    main()
