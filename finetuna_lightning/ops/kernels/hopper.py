"""The product of ``gemm.py`` by Hopper's own instructions, ``hopper.cu``: NVRTC, which comes with torch's CUDA builds,
compiles it where it runs, in a second for each kind of operands, and what it made is kept in
``~/.cache/finetuna_lightning``.

Triton 3.6 offers neither loads that two blocks share nor warps that only load: this is 13% to 16% faster in int8, and
as fast in 16 bits, where a GPU's power is the limit (benchmarks/LOG.md). Results are those of Triton's kernel but for
the rounding of sums, and as there, a row's bits depend on nothing but the row and its adapter.

It also multiplies int8 codes of W by X in two int8 slices, which Triton's does not: 16-bit fixed point with one scale a
row. Of plain rows it is fifty times closer to the product of X and W than W rounded to bfloat16 is, and more where X is
bfloat16 itself (benchmarks/LOG.md; with one giant in a row, about as close), with less energy, and W is not read out
for it.

Where it cannot be had (another GPU, no NVRTC), Triton's kernel runs; on a Hopper GPU that is said once. Environment
variables: ``FINETUNA_CUDA_KERNELS=0`` leaves it out, ``FINETUNA_CACHE`` is another folder to keep it in."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.files import cache_folder, replacing_file
from finetuna_lightning.ops.kernels.launch import cdiv
from finetuna_lightning.ops.tiling import TILE_ROWS

_SOURCE = Path(__file__).parent / "hopper.cu"
_OPERANDS = {torch.int8: 0, torch.bfloat16: 1, torch.float16: 2}
_TENSOR_MAP_TYPES = {torch.int8: 0, torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_COLUMNS, _STAGES, _THREADS = 256, 4, 384
# as hopper.cu divides it: an alignment, the stages, two pieces of Y for each of eight warps, two barriers a stage
_SHARED_BYTES = 1024 + _STAGES * (TILE_ROWS + _COLUMNS) * 128 + 8 * 2 * 16 * 128 + _STAGES * 2 * 8
LONGEST = 1 << 17
"""K of int8 operands: their sums stay within int32."""
LONGEST_SLICED = 3 << 15
"""K of two slices: the remainders' sums and hopper.cu's ``OFFSET`` together do."""
_KEPT_MAPS = 1 << 14
_DIGEST = hashlib.sha256().digest_size


class _Unavailable(Exception):
    """Why there is no kernel, in words."""


_NUMBERS = ("n", "k", "c", "step", "stride_out", "residual", "tile_count", "slice")


class _Given(ctypes.Structure):
    """``Given`` of hopper.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "row_scale", "column_scale", "bias", "tiles")),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


def takes(
    a: Tensor, b: Tensor, out: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, low: Tensor | None, matrices: Tensor | None, b_is_kn: bool,
) -> bool:  # fmt: skip
    """Whether ``product`` computes this: on a Hopper GPU, of types and shapes that it knows, a layer's rows whatever
    their number, so that company never decides."""
    kind, made = a.dtype, out.dtype
    if a.dim() == 3 and (kind != torch.int8 or len(a) != 2 or not a.is_contiguous()):
        return False
    if kind == torch.int8 and a.shape[-1] > (LONGEST if a.dim() == 2 else LONGEST_SLICED):
        return False
    if b.dtype != kind or made not in (torch.bfloat16, torch.float16) or out.shape[1] % 8 or not a.shape[-1]:
        return False
    if (row_scale is None or b_is_kn) if kind == torch.int8 else (row_scale is not None or kind != made):
        return False
    if any(t is not None and not _row(t, torch.float32) for t in (row_scale, column_scale)):
        return False
    if bias is not None and not _row(bias, made):
        return False
    if any(t is not None and not _rows(t, made) for t in (out, residual)):
        return False
    if low is not None and (low.dtype != made or low.shape[1] % 16 or matrices is None or matrices.dtype != made):
        return False
    return a.device.type == "cuda" and _kernel_of(a, out, b_is_kn) is not None


def takes_slices(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``product`` multiplies two int8 slices of X by int8, into ``dtype``, on ``device`` (an index)."""
    return _kernel(device.index, _OPERANDS[torch.int8], _OPERANDS[dtype], False, 2) is not None


def _kernel_of(a: Tensor, out: Tensor, b_is_kn: bool) -> _Kernel | None:
    slices = 2 if a.dim() == 3 else 1
    return _kernel(a.device.index, _OPERANDS[a.dtype], _OPERANDS[out.dtype], b_is_kn, slices)


def _row(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether two of its numbers can be had at a time."""
    return t.dtype == dtype and t.is_contiguous() and t.data_ptr() % (2 * t.element_size()) == 0


def _rows(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether sixteen bytes of a row can be had at a time."""
    apart = t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1]
    return t.dtype == dtype and t.stride(1) == 1 and apart and t.data_ptr() % 16 == 0


def product(
    a: Tensor, b: Tensor, out: Tensor, tiles: Tensor, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, low: Tensor | None, matrices: Tensor | None, b_is_kn: bool,
) -> None:  # fmt: skip
    """Fill ``out`` as ``gemm.gemm`` says, of what it ``takes``, on the current device and stream.

    Raises:
        RuntimeError: of the driver's: for rows that do not begin at multiples of 16 bytes, say.
    """
    device, count = a.device.index, tiles.shape[1]
    kernel = _kernel_of(a, out, b_is_kn)
    rows, k, n = a.shape[-2], a.shape[-1], out.shape[1]
    if kernel is None:
        raise RuntimeError("not a product that hopper.takes")
    if not count:
        return
    _use_context(device)
    width = 128 // a.element_size()
    x = _map(a, a.numel() // k, k, a.stride(-2), TILE_ROWS, width)
    w = _map(b, k, n, b.stride(0), 64, 64) if b_is_kn else _map(b, n, k, b.stride(0), _COLUMNS // 2, width)
    left, right, columns, step = x, w, 0, 0  # without a delta these are not looked at
    if low is not None and matrices is not None:
        columns, step = low.shape[1], matrices.stride(0) // matrices.stride(1)
        height = (matrices.shape[0] - 1) * step + columns
        left = _map(low, low.shape[0], columns, low.stride(0), TILE_ROWS, 64)
        right = _map(matrices, height, n, matrices.stride(1), 16, 64)
    added = x if residual is None else _map(residual, rows, n, residual.stride(0), TILE_ROWS, 64)
    given = _Given(
        *(None if t is None else t.data_ptr() for t in (out, row_scale, column_scale, bias, tiles)),
        n, k, columns, step, out.stride(0), residual is not None, count, rows,
    )  # fmt: skip
    blocks = 2 * min(cdiv(count, 2) * cdiv(n, _COLUMNS), kernel.clusters)
    arguments = (ctypes.c_void_p * 6)(
        x.address, w.address, left.address, right.address, added.address, ctypes.addressof(given)
    )  # fmt: skip
    stream = torch.cuda.current_stream(device).cuda_stream
    _check(_driver().cuLaunchKernel(
        kernel.function, blocks, 1, 1, _THREADS, 1, 1, _SHARED_BYTES, ctypes.c_void_p(stream), arguments, None
    ))  # fmt: skip


class _Map:
    """A CUtensorMap, of 128 bytes at a multiple of 64."""

    def __init__(self) -> None:
        self._room = ctypes.create_string_buffer(128 + 63)
        self.address = -(-ctypes.addressof(self._room) // 64) * 64


_maps: dict[tuple[Any, ...], _Map] = {}


def _map(t: Tensor, rows: int, columns: int, stride: int, box_rows: int, box_columns: int) -> _Map:
    """What the copy engine is told of a matrix: where it stands and its form, and so it is kept by these."""
    key = (t.data_ptr(), rows, columns, stride, box_rows, box_columns, t.dtype)
    found = _maps.get(key)
    if found is None:
        made = _Map()
        _check(_driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(made.address), _TENSOR_MAP_TYPES[t.dtype], 2, ctypes.c_void_p(t.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(stride * t.element_size()),
            (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1),
            0, 3, 2, 0,  # not interleaved, swizzled in 128 bytes, 128 bytes at a time into L2, zeros beyond the edge
        ))  # fmt: skip
        if len(_maps) >= _KEPT_MAPS:
            _maps.clear()
        found = _maps.setdefault(key, made)
    return found


# ---- compiling -------------------------------------------------------------------------------------------------------

_lock = threading.Lock()


class _Kernel:
    """``hopper_gemm`` of a module loaded on a device, and how many clusters it runs at a time."""

    def __init__(self, code: bytes, device: int) -> None:
        driver = _driver()
        _use_context(device)
        self._module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        status = driver.cuModuleLoadData(ctypes.byref(self._module), code)
        if status in _FOREIGN:
            raise _Unavailable(f"the driver does not take it: {_text(status)}")
        _check(status)
        _check(driver.cuModuleGetFunction(ctypes.byref(self.function), self._module, b"hopper_gemm"))
        _check(driver.cuFuncSetAttribute(self.function, 8, _SHARED_BYTES))  # dynamic shared memory's greatest size
        self.clusters = torch.cuda.get_device_properties(device).multi_processor_count // 2


@cache
def _kernel(device: int, operands: int, result: int, along_n: bool, slices: int) -> _Kernel | None:
    """The kernel for such operands, compiled where no other process has; None where it cannot be had, for good. What
    may be otherwise the next time (a GPU that is full) is raised: who computes must not depend on it."""
    if os.environ.get("FINETUNA_CUDA_KERNELS", "") == "0" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    kind = {"OPERANDS": operands, "RESULT": result, "ALONG_N": int(along_n), "SLICES": slices}
    tile = {"ROWS": TILE_ROWS, "COLUMNS": _COLUMNS, "STAGES": _STAGES}
    defined = (f"-D{name}={value}" for name, value in (kind | tile).items())
    try:
        with _lock, torch.cuda.device(device):
            return _made(device, ("--gpu-architecture=sm_90a", "-std=c++17", *defined))
    except (_Unavailable, OSError, AttributeError, ValueError) as error:
        _say(str(error))
        return None


@cache
def _say(obstacle: str) -> None:
    """Once in a process."""
    warnings.warn(f"Hopper's own kernel is left out, Triton's takes longer: {obstacle}", stacklevel=5)


def _made(device: int, options: tuple[str, ...]) -> _Kernel:
    nvrtc, source = _nvrtc(), _SOURCE.read_bytes()
    kept = _place(nvrtc, source, options)
    code = None if kept is None else _read(kept)
    if code is not None:
        return _Kernel(code, device)
    code = _compiled(nvrtc, source, options)
    kernel = _Kernel(code, device)
    if kept is not None:
        _keep(kept, code)
    return kernel


def _place(nvrtc: Any, source: bytes, options: tuple[str, ...]) -> Path | None:
    """Where the compiled source is kept: named by all that it depends on."""
    version = (ctypes.c_int * 2)()
    nvrtc.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, ctypes.sizeof(ctypes.c_int)))
    key = hashlib.sha256(b"\0".join((source, repr((options, *version)).encode()))).hexdigest()[:16]
    folder = cache_folder()
    return None if folder is None else folder / f"hopper-{key}.bin"


def _read(kept: Path) -> bytes | None:
    """Code that this user kept, if it is whole: the driver would die of less."""
    try:
        mine, whole = kept.stat().st_uid == os.getuid(), kept.read_bytes()
    except OSError:
        return None
    digest, code = whole[:_DIGEST], whole[_DIGEST:]
    return code if mine and hashlib.sha256(code).digest() == digest else None


def _keep(kept: Path, code: bytes) -> None:
    try:
        with replacing_file(kept) as beside:
            beside.write_bytes(hashlib.sha256(code).digest() + code)
    except OSError:
        pass  # the next process compiles it again


def _compiled(nvrtc: Any, source: bytes, options: tuple[str, ...]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if status := nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"hopper.cu", 0, None, None):
        raise _Unavailable(f"NVRTC failed ({status})")
    try:
        if status := nvrtc.nvrtcCompileProgram(program, len(options), given):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value or 1)
            nvrtc.nvrtcGetProgramLog(program, log)
            said = [line for line in log.value.decode(errors="replace").splitlines() if "error" in line]
            raise _Unavailable(f"NVRTC failed ({status}): {(said or ['no reason given'])[0]}")
        status = nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value or 1)
        if status or nvrtc.nvrtcGetCUBIN(program, code) or not code.raw.startswith(b"\x7fELF"):
            raise _Unavailable("NVRTC failed: it made no code")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _nvrtc() -> Any:
    """The library beside torch's own: loaded with one of torch's that needs it, and then found by its name; after what
    it looks for when it compiles, which it does not find by itself in CUDA 13's wheel."""
    installed = importlib.util.find_spec("nvidia")
    for folder in (installed.submodule_search_locations or []) if installed else []:
        for builtins in Path(folder).glob("*/lib/libnvrtc-builtins.so.*"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins))
    beside = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    if beside.is_file():
        ctypes.CDLL(str(beside))
    return ctypes.CDLL(f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}")


# ---- the driver ------------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = 2
_FOREIGN = (200, 209, 218, 222)  # code of another kind than the driver takes (CUresult)


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _use_context(device: int) -> None:
    """The device's own context for this thread, if it has none: torch gives a new thread one with its first kernel."""
    driver, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        _check(driver.cuDeviceGet(ctypes.byref(handle), device))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        _check(driver.cuCtxSetCurrent(context))


def _check(status: int) -> None:
    if status == _OUT_OF_MEMORY:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory, while a kernel was loaded or launched")
    if status:
        raise RuntimeError(f"CUDA's driver: {_text(status)}")


def _text(status: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({status})"
