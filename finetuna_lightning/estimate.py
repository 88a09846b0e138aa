"""``finetuna-estimate``: what a run would need in memory, before it starts.

finetuna-estimate experiment=quickstart
finetuna-estimate backbone.name_or_path=./llama data.max_length=1024 device_memory=24GiB
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from finetuna_lightning.errors import ConfigError
from finetuna_lightning.train import run_program

if TYPE_CHECKING:
    from rich.table import Table

    from finetuna_lightning.memory_estimate import MemoryEstimate

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_MANY = 8  # adapters: beyond, the table has their sum alone
_PLUGIN = ".EightBitPrecision"


def parse_bytes(given: object) -> int:
    """Bytes of ``80GiB``, ``24GB`` or a number.

    Raises:
        ConfigError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", str(given).lower())
    size = 0 if found is None or found[2] not in _UNITS else round(float(found[1]) * _UNITS[found[2]])
    if size < 1 or isinstance(given, bool):
        raise ConfigError(f"device_memory must be a number of bytes, as 80GiB, 24GB or 25769803776, not {given!r}")
    return size


@dataclass(frozen=True)
class Device:
    """What the run is for.

    Args:
        kind: ``cpu`` or ``cuda``.
        memory: its bytes; None is unknown.
    """

    kind: str
    memory: int | None


def device_of(plain: dict[str, Any]) -> Device:
    """The device of a configuration: as ``trainer.accelerator`` says; ``auto`` is a GPU where one is here or
    ``device_memory`` was given."""
    import torch

    memory = None if plain.get("device_memory") is None else parse_bytes(plain["device_memory"])
    accelerator, here = str(plain["trainer"].get("accelerator", "auto")), torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and (here or memory is not None)):
        if memory is None and here:
            memory = torch.cuda.get_device_properties(0).total_memory
        return Device("cuda", memory)
    return Device("cpu", memory)


# ---- from a configuration --------------------------------------------------------------------------------------------


def arguments(plain: dict[str, Any], device: str) -> dict[str, Any]:
    """What ``estimate_memory`` is to be called with for a composed configuration (plain containers).

    The data is not read: every sequence is taken to be as long as ``max_length`` lets it be. Without any data there is
    one adapter, called ``adapter``.

    Raises:
        FinetunaError: for anything in the configuration that cannot work.
    """
    import torch

    from finetuna_lightning.backbone import read_config, read_info
    from finetuna_lightning.build import build_adapters, build_sources
    from finetuna_lightning.configs import BackboneConfig, OptimConfig, as_config
    from finetuna_lightning.memory_estimate import Sequences
    from finetuna_lightning.training.optim import check_optimizer
    from finetuna_lightning.training.precision import resolve_dtype
    from finetuna_lightning.training.tokenizing import sequence_length

    data = plain["data"]
    if not data["path"]:
        plain = {**plain, "data": {**data, "path": "adapter.txt"}}  # it is not read
    backbone = as_config(BackboneConfig, plain["backbone"], "backbone")
    optim = as_config(OptimConfig, plain["optim"], "optim")
    adapters, sources = build_adapters(plain), build_sources(plain)
    for name, adapter in adapters.items():
        check_optimizer(name, adapter, optim)
    info = read_info(
        backbone.name_or_path, backbone.task, backbone.num_labels, backbone.revision, backbone.trust_remote_code
    )
    sequences = {}
    for name, source in sources.items():
        tokens = sequence_length(source.max_length, info.max_positions)
        budget = source.max_tokens or (None if source.batch_size else data["max_tokens"])
        count = source.batch_size or data["batch_size"]
        sequences[name] = Sequences(count, tokens) if budget is None else _within(budget, tokens)
    given = plain["trainer"].get("plugins") or []  # one, or several
    every = [own for own in (given if isinstance(given, list) else [given]) if isinstance(own, dict)]
    plugins = [own for own in every if str(own.get("_target_")).endswith(_PLUGIN)]
    dtype = torch.bfloat16 if device == "cuda" and backbone.dtype == "auto" else None
    return {
        "architecture": read_config(backbone.name_or_path, backbone.revision, backbone.trust_remote_code),
        "adapters": adapters,
        "sequences": sequences,
        "optim": optim,
        "backbone": backbone,
        "dtype": dtype or resolve_dtype(backbone.dtype, torch.device("cpu")),
        "device": device,
        "packed": data["packing"] is not False and backbone.task == "causal-lm",
        "compute": plugins[0].get("compute", "auto") if plugins else "auto",
    }


def _within(budget: int, tokens: int) -> Any:
    """Sequences that fill a budget of tokens."""
    from finetuna_lightning.memory_estimate import Sequences

    tokens = min(tokens, budget)
    return Sequences(budget // tokens, tokens)


Change = tuple[str, str, str, Any]  # the override as it is typed; group, key and value in the configuration


def changes(plain: dict[str, Any], given: dict[str, Any]) -> Iterator[Change]:
    """What could be changed for a run to need less, one at a time."""
    if not plain["backbone"]["gradient_checkpointing"]:
        yield "backbone.gradient_checkpointing=true", "backbone", "gradient_checkpointing", True
    optimizer = given["optim"].name
    if optimizer in ("adamw", "lion") and any(own.optimizer is None for own in given["adapters"].values()):
        yield f"optim={optimizer}8bit", "optim", "name", f"{optimizer}8bit"
    size = "max_tokens" if plain["data"]["max_tokens"] else "batch_size"
    if (half := plain["data"][size] // 2) >= 1:
        yield f"data.{size}={half}", "data", size, half
    if (half := max(own.tokens for own in given["sequences"].values()) // 2) >= 2:
        yield f"data.max_length={half}", "data", "max_length", half


def changed(plain: dict[str, Any], *made: Change) -> dict[str, Any]:
    """A copy of the configuration with the changes made."""
    new = copy.deepcopy(plain)
    for _, group, key, value in made:
        new[group][key] = value
    return new


def estimate(plain: dict[str, Any]) -> tuple[MemoryEstimate, Device]:
    """The estimate for a composed configuration (plain containers)."""
    from finetuna_lightning.memory_estimate import estimate_memory

    device = device_of(plain)
    return estimate_memory(**arguments(plain, device.kind)), device


# ---- what is shown ---------------------------------------------------------------------------------------------------


def run(config: DictConfig) -> None:
    """Print the estimate for ``config``, how many adapters would fit, and what would help when it does not fit."""
    from rich.console import Console

    from finetuna_lightning.memory_estimate import adapters_that_fit, estimate_memory, with_one_more
    from finetuna_lightning.training.report import human_bytes

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    console = Console(highlight=False, soft_wrap=True)
    device = device_of(plain)
    given = arguments(plain, device.kind)
    found = estimate_memory(**given)
    console.print(estimate_table(found, given))
    if device.memory is None:
        where = "this GPU is not here" if device.kind == "cuda" else "of a CPU run it is the host's"
        console.print(f"device    its memory is unknown ({where}): say it with device_memory=80GiB")
        return
    fits, left = found.needed <= device.memory, device.memory - found.needed
    room = f"fits, {human_bytes(left)} left" if fits else f"does not fit, {human_bytes(-left)} too much"
    context = " with the GPU's own context" if device.kind == "cuda" else ""
    console.print(f"device    {human_bytes(device.memory)}: {human_bytes(found.needed)}{context} {room}")
    like, more = with_one_more(**given)
    count = adapters_that_fit(found, more, device.memory)
    console.print(
        f"adapters  {count} would fit" + (f" (more or fewer like {like!r})" if len(found.adapters) > 1 else "")
    )
    if not fits:
        console.print(_changes_table(plain, given, device, found, count))


def estimate_table(found: MemoryEstimate, given: dict[str, Any]) -> Table:
    """Every part in full, and what of it stands at the peak."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from finetuna_lightning.training.report import human_bytes

    phase, top = found.peak_phase
    adapters = found.adapters
    tokens = sum(own.count * own.tokens for own in given["sequences"].values())
    what = f"{_adapters(len(adapters))}, {tokens:,} tokens a step, {found.device}"
    table = Table(title=f"memory estimate: {what}", title_style="bold", title_justify="left", box=SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for column in ("", "in all", "at the peak"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(name: str, whole: float, then: float | None = None, style: str = "") -> None:
        table.add_row(Text(name), human_bytes(round(whole)), human_bytes(round(whole if then is None else then)),
                      style=style)  # fmt: skip

    row(f"backbone, {given['backbone'].scheme}", found.backbone)
    if 1 < len(adapters) <= _MANY:
        for name, own in adapters.items():
            row(f"  {name}: weights and optimizer state", own.standing, style="dim")
    row("adapters: weights", sum(own.weights for own in adapters.values()))
    row("adapters: optimizer state", sum(own.optimizer for own in adapters.values()))
    row("adapters: gradients", sum(own.gradients for own in adapters.values()), top.gradients)
    row("activations kept for the backward pass", found.activations, top.kept)
    row("working memory", top.working + found.libraries)
    table.add_section()
    row(f"peak ({phase})", found.peak, style="bold")
    return table


def _adapters(count: int) -> str:
    return f"{count} adapter{'' if count == 1 else 's'}"


def _changes_table(plain: dict[str, Any], given: dict[str, Any], device: Device, found: MemoryEstimate, count: int
                   ) -> Table:  # fmt: skip
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from finetuna_lightning.memory_estimate import estimate_memory
    from finetuna_lightning.training.report import human_bytes

    assert device.memory is not None
    table = Table(title="what would help", title_style="bold", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "peak", "less by", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    tried = list(changes(plain, given))
    options = [(change[0], [change]) for change in tried]
    options += [("all of these", tried)] if len(tried) > 1 else []
    for name, made in options:
        then = estimate_memory(**arguments(changed(plain, *made), device.kind))
        verdict = "fits" if then.needed <= device.memory else ""
        if then.peak < found.peak:  # a source's own settings may stand in the way
            table.add_row(Text(name), human_bytes(then.peak), human_bytes(found.peak - then.peak), Text(verdict))
    if 0 < count < len(found.adapters):
        table.add_row(Text(f"{_adapters(count)} instead of {len(found.adapters)}"), "", "", Text("fits"))
    return table


def main() -> None:
    """Entry point: see ``train.run_program``."""
    run_program("finetuna-estimate", "estimate", run)


if __name__ == "__main__":
    main()
