"""W8: loading a 16-bit safetensors folder straight into 8 bits, and its saved 8-bit form, against reading the files.

    python -m benchmarks.w8                                  # Llama-3-8B shape; CUDA where there is one
    python -m benchmarks.w8 --layers 2 --hidden 512          # a small one, on a laptop

Writes a folder of random bfloat16 weights in shards, reads it once so that it is in the page cache, and then in turn
reads it (the same number of threads, into memory that is thrown away) and loads it; the same for the saved form. The
page cache is warm throughout and nothing is dropped from it: a disk slower than memory makes both sides slower alike.
Before any figure is printed, the codes of three matrices must be those of ``reference.quantize`` on the CPU, and the
fingerprints of both forms the same. Exits with 1 when they are not, or when on CUDA a ratio or the device's peak is
above what is allowed. A CPU has nothing to overlap the arithmetic of quantising with: its ratio is shown, not judged.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from benchmarks.common import LLAMA_3_8B, show
from benchmarks.load_memory import Sampler, settle, write_folder
from finetuna_lightning.adapters import tensor_bytes
from finetuna_lightning.backbone import fingerprint, load_backbone, quantized_layers, save_backbone
from finetuna_lightning.ops import reference
from finetuna_lightning.shards import SPARE_BUFFERS, ReadAhead, piece_bytes, read_header, reader_count, spans_of

GIB = 1 << 30
ALLOWED_RATIO = 1.5
ALLOWED_DEVICE = GIB  # above the 8-bit size
SHARD = 5 * 10**9  # as on the hub
CHECKED = ("model.layers.0.self_attn.q_proj", "model.layers.{last}.mlp.down_proj", "lm_head")


def config_of(layers: int, hidden: int, vocabulary: int) -> transformers.LlamaConfig:
    """Llama-3-8B's shape, narrower where ``hidden`` says so."""
    wide = hidden / LLAMA_3_8B["hidden_size"]  # type: ignore[operator]
    return transformers.LlamaConfig(
        **LLAMA_3_8B
        | {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": int(14336 * wide),
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": max(1, hidden // 512),
            "vocab_size": vocabulary,
        }
    )


def copies(elements: int = 1 << 26) -> Callable[[torch.Tensor], None]:
    """Fills tensors from one block of Gaussian numbers, each from another place in it: as fast as memory."""
    block = (torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    start = 0

    def fill(tensor: torch.Tensor) -> None:
        nonlocal start
        flat, at = tensor.view(-1), 0
        while at < flat.numel():
            part = block[start : start + flat.numel() - at]
            flat[at : at + part.numel()] = part
            at += part.numel()
            start = (start + part.numel() + 12345) % elements

    return fill


def read_plainly(folder: Path, device: torch.device) -> None:
    """Read every tensor of a folder with the loader's threads and sizes, and do nothing with it."""
    entries = [entry for file in sorted(folder.glob("*.safetensors")) for entry in read_header(file).values()]
    spans = [span for entry in entries for span in spans_of(entry, 1, piece_bytes(device))]
    ahead = ReadAhead(spans, piece_bytes(device), torch.device("cpu"))
    ahead.finish()
    ahead.close()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long ``work`` takes, with memory of the device that nothing has cached."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del result
    return taken


def differing_codes(folder: Path, model: torch.nn.Module, scheme: str, layers: int) -> float:
    """The largest share of codes, over three matrices, that differ from those of the reference on the CPU."""
    worst = 0.0
    files = {name: entry.path for file in folder.glob("*.safetensors") for name, entry in read_header(file).items()}
    matrices = quantized_layers(model)
    for pattern in CHECKED:
        name = pattern.format(last=layers - 1)
        with safe_open(files[f"{name}.weight"], framework="pt") as file:
            codes, scale = reference.quantize(file.get_tensor(f"{name}.weight"), scheme)
        if not torch.allclose(matrices[name].scale.cpu(), scale, rtol=1e-6):
            return 1.0
        worst = max(worst, float((matrices[name].codes.cpu() != codes).float().mean()))
    return worst


def peaks(load: Callable[[], torch.nn.Module], device: torch.device) -> tuple[torch.nn.Module, dict[str, float]]:
    """A load that is watched, not timed: bytes of the model, and the peaks above what was there before."""
    before, sampler = settle(), Sampler()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sampler.start()
    model = load()
    sampler.ended.set()
    sampler.join()
    found = {"size": float(tensor_bytes(model)), "host": float(sampler.peak - before), "device": float("nan")}
    if device.type == "cuda":
        found["device"] = float(torch.cuda.max_memory_allocated())
    return model, found


def in_turn(folder: Path, options: dict[str, Any], device: torch.device, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of reading and of loading, one after the other, ``runs`` times."""
    reading, loading = [], []
    for _ in range(runs):
        reading.append(seconds(lambda: read_plainly(folder, device), device))
        loading.append(seconds(lambda: load_backbone(str(folder), **options), device))
    return reading, loading


def rows_of(
    name: str, folder: Path, found: dict[str, float], times: tuple[list[float], list[float]]
) -> list[list[str]]:
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    reading, loading = (statistics.median(each) for each in times)
    each = ["/".join(f"{t:.2f}" for t in part) for part in times]
    return [
        [f"{name}: file, GiB", f"{size / GIB:.2f}", ""],
        [f"{name}: reading, s ({size / GIB / reading:.1f} GiB/s)", f"{reading:.2f}", each[0]],
        [f"{name}: loading, s", f"{loading:.2f}", each[1]],
        [f"{name}: loading / reading", f"{loading / reading:.2f}", f"allowed {ALLOWED_RATIO}"],
        [f"{name}: 8-bit model, GiB", f"{found['size'] / GIB:.2f}", ""],
        [f"{name}: device peak above the model, GiB", f"{(found['device'] - found['size']) / GIB:.2f}", "allowed 1"],
        [f"{name}: host peak, anonymous, GiB", f"{found['host'] / GIB:.2f}", ""],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    chosen = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(chosen.device)
    options: dict[str, Any] = {"scheme": chosen.scheme, "device": device, "dtype": torch.bfloat16}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as root:
        folder, saved, small = Path(root, "16-bit"), Path(root, "8-bit"), Path(root, "small")
        start = time.perf_counter()
        write_folder(folder, config_of(chosen.layers, chosen.hidden, chosen.vocabulary), SHARD, copies())
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
        write_folder(small, config_of(1, 256, 64), SHARD)
        load_backbone(str(small), **options)  # imports, contexts and kernels are there before anything is measured
        read_plainly(folder, device)
        model, first = peaks(lambda: load_backbone(str(folder), **options), device)
        differ = differing_codes(folder, model, chosen.scheme, chosen.layers)
        start = time.perf_counter()
        save_backbone(model, saved)
        saving, mark = time.perf_counter() - start, fingerprint(model)
        del model
        read_plainly(saved, device)
        model, second = peaks(lambda: load_backbone(str(saved), **options), device)
        same = fingerprint(model) == mark
        del model
        print(f"codes that differ from the reference's: {differ:.1e}; both forms the same: {same}", flush=True)
        if differ > 1e-4 or not same:
            print("NOT EQUAL: no figures")
            return 1
        times = in_turn(folder, options, device, chosen.runs), in_turn(saved, options, device, chosen.runs)
        rows = rows_of("16-bit", folder, first, times[0]) + rows_of("saved", saved, second, times[1])
    rows.insert(7, ["saving, s", f"{saving:.2f}", ""])
    staging = (reader_count() + SPARE_BUFFERS) * piece_bytes(device) >> 20
    show(
        f"W8: {chosen.layers} layers of {chosen.hidden} into {chosen.scheme} on {device}; page cache warm; "
        f"{reader_count()} readers, {staging} MiB of staging (pinned for CUDA: not anonymous memory)",
        ["what", "median", "runs"],
        rows,
    )
    ratios = [statistics.median(loading) / statistics.median(reading) for reading, loading in times]
    over = [found["device"] - found["size"] for found in (first, second)]
    if device.type == "cpu":
        return 0
    ok = max(ratios) <= ALLOWED_RATIO and not any(extra > ALLOWED_DEVICE for extra in over)
    print("within the allowed" if ok else "ABOVE the allowed")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
