"""W8, memory: the peak of loading a 16-bit folder of random weights straight into 8 bits, against what is allowed.

    python -m benchmarks.load_memory [--gib 1.2] [--scheme int8] [--shard 500MB]

Allowed above what the process held before: the 8-bit model, the largest single tensor in 16 bits, and 64 MiB. The peak
is of anonymous memory (RssAnon, read every millisecond), since the mapped checkpoint is the page cache's; VmHWM, which
counts those pages too, is printed beside it. Exits with 1 when the peak is above the allowed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from benchmarks.common import show
from finetuna_lightning.adapters import tensor_bytes
from finetuna_lightning.backbone import load_backbone, skeleton

MIB = 1 << 20
MARGIN = 64 * MIB


def config_of(gib: float) -> transformers.LlamaConfig:
    """A Llama whose bfloat16 file takes about ``gib`` GiB."""
    hidden, vocabulary = (2048, 32000) if gib > 0.6 else (1024, 16000)
    layer = 4 * hidden * hidden + 3 * hidden * 3 * hidden
    layers = max(2, round((gib * 2**29 - 2 * vocabulary * hidden) / layer))
    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip


def uniform(seed: int = 0) -> Callable[[torch.Tensor], object]:
    """Fills tensors with small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda tensor: tensor.uniform_(-0.03, 0.03, generator=generator)


def write_folder(
    folder: Path, config: transformers.LlamaConfig, shard: int, fill: Callable[[torch.Tensor], object] | None = None
) -> None:
    """A folder as ``save_pretrained`` writes it, made tensor by tensor: the model is never whole here either.

    ``fill`` gives a tensor its values; by default they are uniform.
    """
    fill = fill or uniform()
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, parameter in skeleton(config, "causal-lm").named_parameters():
        if files[-1] and size + 2 * parameter.numel() > shard:
            files.append({})
            size = 0
        files[-1][name] = parameter.shape
        size += 2 * parameter.numel()
    where = {}
    for number, shapes in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for tensor in tensors.values():
            fill(tensor)
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shapes, file)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Sampler(threading.Thread):
    """The largest RssAnon while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.samples, self.ended = 0, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, status("RssAnon"))
            self.samples += 1


def warm_up() -> None:
    """Load a small folder, so that what is imported and allocated once is there before anything is measured."""
    with tempfile.TemporaryDirectory() as folder:
        small = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        write_folder(Path(folder), small, 1 << 40)
        load_backbone(folder)


def settle() -> int:
    """Give the system back what is free; the anonymous memory that is left, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")


def measure(folder: Path, scheme: str) -> dict[str, float]:
    """Load ``folder`` and compare the peak with what is allowed; sizes in MiB."""
    warm_up()
    before, sampler = settle(), Sampler()
    sampler.start()
    start = time.perf_counter()
    model = load_backbone(str(folder), scheme=scheme)
    seconds = time.perf_counter() - start
    sampler.ended.set()
    sampler.join()
    largest = 2 * max(math.prod(p.shape) for p in skeleton(model.config, "causal-lm").parameters())
    eight_bit = tensor_bytes(model)
    return {
        "file": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / MIB,
        "8-bit model": eight_bit / MIB,
        "largest tensor in 16 bits": largest / MIB,
        "before": before / MIB,
        "peak above it": (sampler.peak - before) / MIB,
        "allowed above it": (eight_bit + largest + MARGIN) / MIB,
        "VmHWM (with mapped pages)": status("VmHWM") / MIB,
        "seconds": seconds,
        "samples": sampler.samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.2)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--shard", default="100GB", help="the largest file, such as 500MB")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to put the checkpoint; default: a temporary folder"
    )
    options = parser.parse_args()
    units = {"MB": 10**6, "GB": 10**9}
    shard = int(options.shard[:-2]) * units[options.shard[-2:]]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # in a process of its own: what it frees would tell this one's allocator to keep large blocks
        writer = multiprocessing.get_context("spawn").Process(
            target=write_folder, args=(Path(folder), config_of(options.gib), shard)
        )
        writer.start()
        writer.join()
        result = measure(Path(folder), options.scheme)
    show(f"W8: loading into {options.scheme}, MiB", ["what", "value"], [[k, f"{v:.1f}"] for k, v in result.items()])
    ok = result["peak above it"] <= result["allowed above it"]
    print(
        "within the allowed" if ok else "ABOVE the allowed",
        f"by {abs(result['peak above it'] - result['allowed above it']):.1f} MiB",
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
