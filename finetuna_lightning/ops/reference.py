"""Every operator in plain torch: the truth that kernels are tested against.

An 8-bit matrix ``W`` [out, in] is stored as ``codes`` [out, in] (one byte each) and ``scale`` (float32), in a *scheme*:

``int8``            symmetric, one scale per row:  ``W = codes * scale[:, None]``, ``scale = max|W| / 127``
``int8-blockwise``  bitsandbytes' dynamic tree (arXiv 2110.02861), one absolute maximum per block of the flattened
matrix:
                    ``W.view(-1)[i] = tree[codes.view(-1)[i]] * scale[i // block_size]``
``fp8``             float8 e4m3, one scale per row: ``W = e4m3(codes) * scale[:, None]``, ``scale = max|W| / 448``

fp8 codes are kept as uint8, so that no cast of a module's floating-point tensors can touch them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

INT8_MAX = 127.0
FP8_MAX = 448.0
CHUNK_ELEMENTS = 1 << 18  # quantised at a time on a CPU: float32 temporaries of 1 MiB, which stay in the cache
CHUNK_ELEMENTS_GPU = 1 << 24  # elsewhere: temporaries of 64 MiB, so that launching costs nothing
FINGERPRINT_BYTES = 1 << 24  # read at a time, a multiple of 8


def code_dtype(scheme: str) -> torch.dtype:
    """The storage type of ``scheme``'s codes."""
    return torch.int8 if scheme == "int8" else torch.uint8


def scale_shape(shape: tuple[int, int], scheme: str, block_size: int) -> tuple[int]:
    """The shape of the scales of a matrix of ``shape`` [out, in]."""
    rows, columns = shape
    return (-(-rows * columns // block_size),) if scheme == "int8-blockwise" else (rows,)


@cache
def dynamic_tree() -> tuple[float, ...]:
    """The 256 values of bitsandbytes' signed dynamic data type, ascending (arXiv 2110.02861, section 1.3)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        values += (10.0 ** (exponent - 6) * means).tolist()
        values += (-(10.0 ** (exponent - 6)) * means).tolist()
    return tuple(sorted(values))


@cache
def _tree(device: torch.device) -> Tensor:
    return torch.tensor(dynamic_tree(), dtype=torch.float32, device=device)


@cache
def _tree_midpoints(device: torch.device) -> Tensor:
    tree = _tree(device)
    return (tree[1:] + tree[:-1]) / 2


def _quantize_rows(rows: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    limit = INT8_MAX if scheme == "int8" else FP8_MAX
    top = rows.abs().amax(dim=1)
    scale = top / top.new_full((), limit)  # by a number, CUDA multiplies with its reciprocal: other bits than a CPU's
    normalised = rows / torch.where(scale == 0, 1.0, scale)[:, None]
    if scheme == "int8":
        return normalised.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale
    return normalised.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _quantize_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = blocks.abs().amax(dim=1)
    normalised = blocks / torch.where(scale == 0, 1.0, scale)[:, None]
    return torch.bucketize(normalised, _tree_midpoints(blocks.device), out_int32=True).to(torch.uint8), scale


def group_size(columns: int, scheme: str, block_size: int) -> int:
    """How many neighbours of the flattened matrix share a scale: a row, or a block."""
    return block_size if scheme == "int8-blockwise" else columns


def _chunk(device: torch.device) -> int:
    return CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS_GPU


def quantize_groups(flat: Tensor, codes: Tensor, scale: Tensor, scheme: str, group: int) -> None:
    """Quantise a part of a flattened matrix, ``flat`` [n], into ``codes`` [n] and ``scale`` [n / group, rounded up].

    The part starts where a group does; it ends where one does, or where the matrix ends. Nothing is checked: what is
    not finite gives a scale that is not. So a matrix can be quantised while the rest of it is still being read.
    """
    step = max(1, _chunk(flat.device) // max(group, 1)) * max(group, 1)
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].float()
        whole = piece if piece.numel() % group == 0 else torch.nn.functional.pad(piece, (0, -piece.numel() % group))
        groups = whole.view(-1, group)
        got, got_scale = _quantize_blocks(groups) if scheme == "int8-blockwise" else _quantize_rows(groups, scheme)
        codes[start : start + piece.numel()] = got.view(-1)[: piece.numel()]
        scale[start // group : start // group + groups.shape[0]] = got_scale


def quantize(weight: Tensor, scheme: str, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantise ``weight`` [out, in] of any floating type; ``(codes [out, in], scale)``.

    Works through the matrix in pieces, so that no float32 copy of it ever stands.

    Raises:
        ValueError: when the matrix holds a NaN or an infinity.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=code_dtype(scheme), device=weight.device)
    scale = torch.empty(scale_shape((rows, columns), scheme, block_size), dtype=torch.float32, device=weight.device)
    group = group_size(columns, scheme, block_size)
    if scheme == "int8-blockwise" or weight.is_contiguous():
        quantize_groups(weight.reshape(-1), codes.view(-1), scale, scheme, group)
    else:  # a transposed one: rows are gathered a few at a time, not the whole
        step = max(1, _chunk(weight.device) // max(columns, 1))
        for start in range(0, rows, step):
            piece = weight[start : start + step].reshape(-1)
            quantize_groups(piece, codes[start : start + step].view(-1), scale[start : start + step], scheme, group)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("the weight holds NaN or infinity")
    return codes, scale


def _values(codes: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    if scheme == "int8-blockwise":
        return _tree(codes.device)[codes.to(torch.int32)].to(dtype)
    return (codes if scheme == "int8" else codes.view(torch.float8_e4m3fn)).to(dtype)


def dequantize(codes: Tensor, scale: Tensor, scheme: str, block_size: int, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in ``dtype``; products are rounded once, from float32 (or wider)."""
    if scheme == "int8-blockwise":
        wide = torch.promote_types(dtype, torch.float32)
        values = _values(codes, scheme, wide).view(-1)  # in memory of its own, so scaled in place
        blocks = values.numel() // block_size
        values[: blocks * block_size].view(-1, block_size).mul_(scale[:blocks, None])
        values[blocks * block_size :].mul_(scale[blocks:])  # the last block, where it is not a whole one
        return values.view(codes.shape).to(dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    left = codes if scheme == "int8" else codes.view(torch.float8_e4m3fn).to(dtype)
    return torch.mul(left, scale.to(torch.promote_types(dtype, torch.float32))[:, None], out=out)


def dequantize_rows(
    codes: Tensor, scale: Tensor, ids: Tensor, scheme: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Rows ``ids`` [...] of the matrix: [..., in] in ``dtype``. Only those rows are read."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = _values(codes[ids], scheme, wide)
    if scheme == "int8-blockwise":
        columns = codes.shape[1]
        at = ids.unsqueeze(-1) * columns + torch.arange(columns, device=ids.device)
        return (rows * scale[at // block_size]).to(dtype)
    return (rows * scale[ids].unsqueeze(-1)).to(dtype)


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, scheme: str, block_size: int) -> Tensor:
    """``x W^T + bias``: x [..., in], result [..., out], computed in x's type."""
    weight = dequantize(codes, scale, scheme, block_size, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, scheme: str, block_size: int) -> Tensor:
    """The gradient of ``linear`` with respect to x: grad [..., out], result [..., in]."""
    return grad @ dequantize(codes, scale, scheme, block_size, grad.dtype)


def _mix_(words: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), in place: one-to-one, every bit depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        words ^= (words >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts in the sign: mask it off
        words *= factor - (1 << 64) if factor >> 63 else factor
    return words


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit sum over the bytes of ``tensor`` in which any change of a single 8-byte word shows with certainty, and
    any other change, a swap included, but for a chance of about 2^-64. Computed where the tensor lies, in integers: the
    same everywhere."""
    data = tensor.detach().contiguous().view(torch.uint8).view(-1)
    total = data.numel()
    for start in range(0, data.numel(), FINGERPRINT_BYTES):
        piece = data[start : start + FINGERPRINT_BYTES]
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        at = torch.arange(start // 8, start // 8 + words.numel(), device=words.device, dtype=torch.int64)
        total += int(_mix_(words + at * 0x1E3779B97F4A7C15).sum().item())  # no linear hash: its differences cancel
    return total % (1 << 64)
