"""The CPU's own kernels, ``kernels/rows.cpp``: compiled where they run, by the machine's g++ for its own vector units,
in a second, and kept in ``~/.cache/finetuna_lightning`` for later processes.

They are plain C functions over addresses, so that no header of Python's or torch's is needed and a call costs two
microseconds. OpenMP's functions are left open when they are linked, and found in the runtime that torch has loaded for
the whole process: with a second one, two pools of threads would wait for work on the same cores.

Where they cannot be had, plain torch computes the same in more passes, and it is said once. Environment variables:
``FINETUNA_CPU_KERNELS=0`` leaves them out, ``FINETUNA_CACHE`` is another folder to keep them in, ``CXX`` another
compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.files import replacing_file

_SOURCE = Path(__file__).parent / "kernels" / "rows.cpp"
_COMPILE = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-fopenmp", "-fPIC", "-c")
_COMPILERS = ("g++", "c++")
_PATIENCE = 120  # seconds that a compiler may take

_FUNCTIONS = {
    "dequantize": "pppii",
    "rms_norm": "ppppiiif",
    "rms_norm_backward": "pppppiiii",
    "swiglu": "ppiii",
    "swiglu_backward": "pppiii",
    "rotate": "pppiiiiiii",
    "cross_entropy": "pppiiiii",
    "causal_softmax": "piif",
    "causal_softmax_backward": "ppiif",
}
"""What each is given: p, a tensor's address; i, an integer; f, a number. The number of threads comes last."""

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class _Unavailable(Exception):
    """Why there are no kernels, in words."""


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with ``tensors``: of a CPU, in bfloat16, with values, their last axis contiguous."""
    return (
        not torch.compiler.is_compiling()
        and all(
            type(t) in (Tensor, torch.nn.Parameter)
            and t.device.type == "cpu"
            and t.dtype == torch.bfloat16
            and t.stride(-1) == 1
            for t in tensors
        )
        and available()
    )


def run(name: str, *args: Any) -> None:
    """Call the function ``name`` of ``rows.cpp``; a tensor stands for its address."""
    given = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    getattr(_kernels(), name)(*given, torch.get_num_threads())


def available() -> bool:
    """Whether this process has the kernels; the first call looks for them, and compiles them where need be."""
    return _kernels() is not None


@cache
def _kernels() -> ctypes.CDLL | None:
    if os.environ.get("FINETUNA_CPU_KERNELS", "") == "0":
        return None
    try:
        return _found()
    except (_Unavailable, OSError) as error:
        warnings.warn(f"the CPU's own kernels are left out, plain torch takes longer: {error}", stacklevel=4)
        return None


def _found() -> ctypes.CDLL:
    compiler = _compiler()
    kept = _cache_folder() / f"rows-{_key(compiler)}.so"
    if kept.is_file() and kept.stat().st_uid == os.getuid():
        try:
            return _loaded(kept)
        except (_Unavailable, OSError):
            pass  # of another time, or another machine: made anew
    with tempfile.TemporaryDirectory(prefix="finetuna-") as folder:
        made = _compiled(compiler, Path(folder))
        library = _loaded(made)
        try:
            with replacing_file(kept) as beside:
                shutil.copy(made, beside)
        except OSError:
            pass  # the next process compiles it again
    return library


def _compiler() -> list[str]:
    if sys.platform != "linux":
        raise _Unavailable(f"the kernels are compiled on Linux, and this is {sys.platform}")
    named = os.environ.get("CXX", "")
    found = shlex.split(named) if named else next(([name] for name in _COMPILERS if shutil.which(name)), [])
    if not found or shutil.which(found[0]) is None:
        raise _Unavailable(f"no C++ compiler: {named or ' and '.join(_COMPILERS)} not found")
    return found


def _cache_folder() -> Path:
    own, everyone = os.environ.get("FINETUNA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(everyone or os.path.expanduser("~/.cache")) / "finetuna_lightning"


def _key(compiler: Sequence[str]) -> str:
    """Of all that the compiled file depends on."""
    features = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_PATIENCE, check=False).stdout
    parts = (_SOURCE.read_bytes(), version, features.encode(), platform.machine().encode(), repr(_COMPILE).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiled(compiler: Sequence[str], folder: Path) -> Path:
    objects, library = folder / "rows.o", folder / "rows.so"
    steps = [[*_COMPILE, "-o", str(objects), str(_SOURCE)], ["-shared", "-o", str(library), str(objects)]]
    for arguments in steps:
        command = [*compiler, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise _Unavailable(f"{compiler[0]} took more than {_PATIENCE} s") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
            raise _Unavailable(f"{compiler[0]} failed: {lines[0]}")
    return library


def _loaded(path: Path) -> ctypes.CDLL:
    """The library, once it has computed what torch computes."""
    library = ctypes.CDLL(str(path))
    for name, kinds in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*(_TYPES[kind] for kind in kinds), ctypes.c_int], None
    codes = torch.arange(-100, 101, dtype=torch.int8).view(3, 67)
    scale, out = torch.tensor([1.0, 0.3, -7e-3]), torch.empty(3, 67, dtype=torch.bfloat16)
    library.dequantize(codes.data_ptr(), scale.data_ptr(), out.data_ptr(), 3, 67, 1)
    if not torch.equal(out, (codes * scale[:, None]).bfloat16()):
        raise _Unavailable("they do not compute what torch does")
    return library
