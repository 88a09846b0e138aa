"""The CPU's own kernels, ``kernels/rows.cpp``: compiled where they run, by the machine's g++ for its own vector units,
in a second, and kept in ``~/.cache/finetuna_lightning`` for later processes.

They are plain C functions over addresses, so that no header of Python's or torch's is needed and a call costs some
microseconds. OpenMP's functions are left open when they are linked, and found in the runtime that torch has loaded for
the whole process: with a second one, two pools of threads would wait for work on the same cores.

Where they cannot be had, plain torch computes the same in more passes, and it is said once. Environment variables:
``FINETUNA_CPU_KERNELS=0`` leaves them out, ``FINETUNA_CACHE`` is another folder to keep them in, ``CXX`` another
GCC (clang asks for an OpenMP runtime of its own)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.files import cache_folder, replacing_file

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


# besides: no such file, a variable that is no command line, a compiler that hangs, a library of something else
_FAILURES = (_Unavailable, OSError, ValueError, subprocess.SubprocessError, AttributeError)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with ``tensors``: bfloat16 of a CPU, the last axis contiguous, no gradient recorded.
    Not where operations are watched (traced, counted, on tensors without values): a kernel is none."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = all(_plain(t, torch.bfloat16) and t.dim() and t.stride(-1) == 1 for t in tensors)
    return plain and not recorded and available()


def holds(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether ``tensor`` is of that type and shape, contiguous, in the CPU's memory."""
    return _plain(tensor, dtype) and tensor.shape == tuple(shape) and tensor.is_contiguous()


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether its values stand at its address."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and not (tensor.is_neg() or tensor._is_zerotensor() or torch._is_functional_tensor(tensor))
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def run(name: str, *args: Any) -> None:
    """Call the function ``name`` of ``rows.cpp``; a tensor stands for its address."""
    given = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    getattr(_kernels(), name)(*given, torch.get_num_threads())


def available() -> bool:
    """Whether this process has the kernels; the first call looks for them, and compiles them where need be."""
    return _kernels() is not None


_looked = list[ctypes.CDLL | None]()  # what the first look found
_lock = threading.Lock()


def _kernels() -> ctypes.CDLL | None:
    if not _looked:
        obstacle = ""
        with _lock:
            if not _looked:  # another thread may have, meanwhile
                library, obstacle = _look()
                _looked.append(library)
        if obstacle:
            warnings.warn(f"the CPU's own kernels are left out, plain torch takes longer: {obstacle}", stacklevel=4)
    return _looked[0]


def _look() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or why there are none; both empty where nobody wants them."""
    if os.environ.get("FINETUNA_CPU_KERNELS", "") == "0":
        return None, ""
    try:
        return _found(), ""
    except _FAILURES as error:
        return None, str(error) or type(error).__name__


def _found() -> ctypes.CDLL:
    compiler = _compiler()
    folder, name = cache_folder(), f"rows-{_key(compiler)}.so"
    kept = None if folder is None else folder / name
    if kept is not None and kept.is_file() and kept.stat().st_uid == os.getuid():
        try:
            return _loaded(kept)
        except _FAILURES:
            pass  # of another time, or another machine: made anew
    with tempfile.TemporaryDirectory(prefix="finetuna-") as scratch:
        made = _compiled(compiler, Path(scratch))
        try:
            library = _loaded(made)
        except OSError:  # nothing is run from a folder for temporary files (noexec): perhaps from the cache
            if kept is None:
                raise
            return _from_cache(made, kept)
        if kept is not None:
            with contextlib.suppress(OSError):  # the next process compiles it again
                _keep(made, kept)
    return library


def _keep(made: Path, kept: Path) -> None:
    with replacing_file(kept) as beside:
        shutil.copy(made, beside)


def _from_cache(made: Path, kept: Path) -> ctypes.CDLL:
    _keep(made, kept)
    try:
        return _loaded(kept)
    except _FAILURES:
        kept.unlink()
        raise


def _compiler() -> list[str]:
    if sys.platform != "linux":
        raise _Unavailable(f"the kernels are compiled on Linux, and this is {sys.platform}")
    named = os.environ.get("CXX", "")
    found = shlex.split(named) if named else next(([name] for name in _COMPILERS if shutil.which(name)), [])
    if not found or shutil.which(found[0]) is None:
        raise _Unavailable(f"no C++ compiler: {named or ' and '.join(_COMPILERS)} not found")
    return found


def _key(compiler: Sequence[str]) -> str:
    """Of all that the compiled file depends on."""
    features = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_PATIENCE, check=False).stdout
    command = repr((*compiler, platform.machine(), *_COMPILE)).encode()
    parts = (_SOURCE.read_bytes(), version, features.encode(), command)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiled(compiler: Sequence[str], folder: Path) -> Path:
    objects, library = folder / "rows.o", folder / "rows.so"
    steps = [[*_COMPILE, "-o", str(objects), str(_SOURCE)], ["-shared", "-o", str(library), str(objects)]]
    for arguments in steps:
        command = [*compiler, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise _Unavailable(f"{compiler[0]} took more than {_PATIENCE} s") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").splitlines()
            lines = [line for line in said if "error" in line] or [f"status {done.returncode}"]
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
