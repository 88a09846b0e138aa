"""The order of the house: which file imports which, who may import which library, what is packaged, what is public."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import finetuna_lightning

# A file imports only from files listed above it, whether at its top or inside a function. The number is its floor.
HOUSE = """
    0  errors.py
    0  configs.py
    0  seeds.py
    0  files.py
    0  quickstart/domains.py
    1  ops/reference.py
    1  ops/native.py
    1  ops/cpu.py
    1  ops/cpu_rows.py
    1  ops/cpu_attention.py
    1  ops/tiling.py
    1  ops/kernels/launch.py
    1  ops/kernels/hopper.py
    1  ops/kernels/*.py
    1  ops/library.py
    1  ops/loss.py
    2  nn/quantized.py
    2  nn/dropout.py
    2  nn/lora.py
    2  nn/packing.py
    2  nn/gradients.py
    2  nn/joint_cpu.py
    2  nn/joint.py
    2  nn/routing.py
    2  nn/blocks.py
    3  peft_io.py
    3  adapters.py
    3  quantizing.py
    3  shards.py
    3  saved.py
    3  loading.py
    3  backbone.py
    3  fusing.py
    3  attention.py
    4  finetuned.py
    5  training/precision.py
    5  training/checkpoint_io.py
    5  training/distributed.py
    5  training/sources.py
    5  training/tokenizing.py
    5  training/batches.py
    5  training/quarantine.py
    5  training/norms.py
    5  training/flat_optim.py
    5  training/waiting.py
    5  training/optim.py
    5  training/loader.py
    5  training/resume.py
    5  training/data.py
    5  training/metrics.py
    5  training/live.py
    5  training/head.py
    5  training/losses.py
    5  training/module.py
    5  training/plots.py
    5  training/report.py
    5  training/callbacks/*.py
    6  build.py
    6  simulation.py
    6  fused_memory.py
    6  memory_estimate.py
    7  train.py
    7  estimate.py
    7  cli.py
    7  quickstart/pretrain.py
    8  __init__.py
"""
# An __init__.py other than the package's own imports nothing: names are handed out by finetuna_lightning/__init__.py.

FLOORS = {name: int(floor) for floor, name in (line.split() for line in HOUSE.split("\n") if line.strip())}
ORDER = list(FLOORS)

# Who may import a library that is kept to a few rooms.
LIGHTNING_FLOOR = 5
TRANSFORMERS_ROOMS = {
    *("attention.py", "backbone.py", "fusing.py", "loading.py"),
    *("quickstart/pretrain.py", "training/tokenizing.py"),
}
OPS_LIBRARIES = {"torch", "triton"}
NOWHERE = {"peft"}

PACKAGE = Path(finetuna_lightning.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """``from <module> import <name>``, or ``import <module>`` with an empty name."""

    line: int
    module: str
    name: str


def imports(file: str, source: str) -> Iterator[Import]:
    """Every import anywhere in ``source``, relative ones made absolute, and ``import_module`` of a literal."""
    folder = ["finetuna_lightning", *Path(file).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield Import(node.lineno, str(node.args[0].value), "")


def file_of(module: str, name: str, files: list[str]) -> str | None:
    """The file of the package that an import reads (the module's name if it has none); None for another library."""
    top, *parts = module.split(".")
    if top != "finetuna_lightning":
        return None
    for tail in ([*parts, name], parts) if name else (parts,):
        for suffix in (".py", "/__init__.py"):
            if (file := ("/".join(tail) + suffix).lstrip("/")) in files:
                return file
    return module


def row_of(file: str) -> int | None:
    """The file's row in the table; None for a file that is not in it."""
    exact = ORDER.index(file) if file in FLOORS else None
    if exact is not None or file.endswith("__init__.py"):
        return exact
    return next((row for row, pattern in enumerate(ORDER) if fnmatch(file, pattern)), None)


def faults(file: str, source: str, files: list[str]) -> list[str]:
    """What is wrong with the imports of one file, one line each."""
    found = []
    inner_init = file.endswith("/__init__.py")
    row = row_of(file)
    if row is None and not inner_init:
        return [f"{file} is not in the table of tests/test_house.py: give it a floor"]
    floor = -1 if row is None else FLOORS[ORDER[row]]
    for line, module, name in imports(file, source):
        library = module.partition(".")[0]
        read = file_of(module, name, files)
        wrong = ""
        if library == "__future__":
            continue
        if inner_init:
            wrong = "an inner __init__.py imports nothing"
        elif read is not None:
            above = row_of(read)
            if not read.endswith(".py"):
                wrong = "there is no such file"
            elif read.endswith("/__init__.py"):
                wrong = "names come from their own file, not from an inner __init__.py"
            elif above is None or row is None or above >= row:
                wrong = f"{read} is not above {file} in the table"
            elif file == "configs.py" and read != "errors.py":
                wrong = "configs.py imports the standard library and errors.py only"
        elif library in sys.stdlib_module_names:
            continue
        elif library in NOWHERE:
            wrong = f"{library} is imported nowhere in the package"
        elif file == "configs.py":
            wrong = "configs.py imports the standard library and errors.py only"
        elif file.startswith("ops/") and library not in OPS_LIBRARIES:
            wrong = f"ops/ imports {' and '.join(sorted(OPS_LIBRARIES))} only"
        elif library in ("lightning", "lightning_fabric", "pytorch_lightning") and floor < LIGHTNING_FLOOR:
            wrong = f"lightning is for floor {LIGHTNING_FLOOR} and above"
        elif library == "transformers" and file not in TRANSFORMERS_ROOMS:
            wrong = f"transformers is for {', '.join(sorted(TRANSFORMERS_ROOMS))}"
        if wrong:
            found.append(f"{file}:{line}: imports {module}: {wrong}")
    return list(dict.fromkeys(found))


def test_every_import_points_down() -> None:
    found = [fault for file in FILES for fault in faults(file, (PACKAGE / file).read_text(encoding="utf-8"), FILES)]
    assert not found, "\n" + "\n".join(found)


def test_the_table_names_no_file_that_is_not_there() -> None:
    gone = [row for row in ORDER if "*" not in row and row not in FILES]
    assert not gone


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("nn/lora.py", "from finetuna_lightning.nn.routing import Route"),
        ("nn/lora.py", "from finetuna_lightning.nn import routing"),
        ("nn/lora.py", "import finetuna_lightning.nn.routing"),
        ("nn/lora.py", "def late():\n    from finetuna_lightning.build import run"),
        ("nn/lora.py", "import importlib\nimportlib.import_module('finetuna_lightning.nn.routing')"),
        ("nn/lora.py", "from .routing import Route"),
        ("nn/lora.py", "from ..training.module import MultiAdapterModule"),
        ("nn/lora.py", "from finetuna_lightning.ops import quantized_linear"),
        ("nn/lora.py", "from finetuna_lightning import MultiAdapterModule"),
        ("nn/lora.py", "import lightning as L"),
        ("nn/lora.py", "from transformers import AutoModel"),
        ("nn/__init__.py", "from finetuna_lightning.nn.lora import LoRALinear"),
        ("nn/unheard_of.py", ""),
        ("configs.py", "import torch"),
        ("configs.py", "from finetuna_lightning.seeds import stream_seed"),
        ("ops/library.py", "import bitsandbytes"),
        ("peft_io.py", "import peft"),
        ("training/callbacks/memory.py", "from finetuna_lightning.training.callbacks.freeze import Freeze"),
    ],
)
def test_a_climbing_import_is_found(file: str, source: str) -> None:
    there = [*(row for row in ORDER if "*" not in row), "nn/__init__.py", "ops/__init__.py"]
    assert len(faults(file, source, [*there, "training/callbacks/freeze.py"])) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("nn/routing.py", "from finetuna_lightning.nn.lora import Delta\nfrom finetuna_lightning.ops import library"),
        ("nn/routing.py", "from .lora import Delta\nimport torch"),
        ("training/module.py", "import lightning as L\nfrom finetuna_lightning.training import optim"),
        ("ops/library.py", "import triton\nimport os"),
        ("__init__.py", "from finetuna_lightning.build import run"),
    ],
)
def test_an_import_that_points_down_is_allowed(file: str, source: str) -> None:
    there = [*(row for row in ORDER if "*" not in row), "nn/__init__.py", "ops/__init__.py"]
    assert faults(file, source, there) == []


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def test_every_imported_library_is_a_declared_dependency() -> None:
    """Not one that another dependency, or the test extra, happens to bring. Triton comes with torch's CUDA build."""
    lines = setup_cfg()["options"]["install_requires"].split()
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in lines}
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for file in FILES:
        for line, module, _ in imports(file, (PACKAGE / file).read_text(encoding="utf-8")):
            library = module.partition(".")[0]
            if library in sys.stdlib_module_names or library in ("finetuna_lightning", "triton"):
                continue
            if not declared & {owner.lower().replace("-", "_") for owner in owners.get(library, [library])}:
                missing.add(f"{file}:{line}: {library} is not in setup.cfg's install_requires")
    assert not missing, "\n" + "\n".join(sorted(missing))


def test_every_package_is_listed_in_setup_cfg() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts for path in PACKAGE.rglob("*.py")}
    expected = {".".join(["finetuna_lightning", *parts]) for parts in folders} | {"finetuna_lightning.conf"}
    assert set(setup_cfg()["options"]["packages"].split()) == expected


def test_every_file_that_is_no_module_is_packaged() -> None:
    """A wheel without one of them would install, and miss it where it runs."""
    kept: set[Path] = set()
    for package, patterns in setup_cfg()["options.package_data"].items():
        folder = PACKAGE.joinpath(*package.split(".")[1:])
        kept |= {path for pattern in patterns.split() for path in folder.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    linked = PACKAGE / "conf"  # to the package of that name
    assert not {path for path in files if linked not in path.parents} - kept


def test_the_public_names_are_those_in_all() -> None:
    names = finetuna_lightning.__all__
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(finetuna_lightning, name)] == []
    exposed = {
        name
        for name, value in vars(finetuna_lightning).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert exposed <= set(names)
