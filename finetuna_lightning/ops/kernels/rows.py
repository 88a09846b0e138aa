"""One pass over rows: quantise them, transpose codes, read codes out, and the cheap parts of a decoder layer (RMSNorm,
rotary embedding, SwiGLU), each with its gradient, reading what it needs once. Arithmetic is in float32, rounded once.

Shapes: T tokens, d features of a row, H heads of D features, f intermediate features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetuna_lightning.ops.kernels.launch import Kernel, cdiv, next_power_of_2


@triton.jit
def _scale(top):
    """max|x| / 127 of a row; NaN where the row holds one (``top`` is then NaN in its place)."""
    scale = tl.max(top, 0) / 127.0
    return tl.where(tl.max((top != top).to(tl.int32), 0) > 0, float("nan"), scale)


@triton.jit
def _below(x, scale, inside):
    """How many numbers of a row are below its ``scale``."""
    return tl.sum(((tl.abs(x) < scale) & inside).to(tl.int32), 0)


@triton.jit
def _power_of_2(scale, below, d):
    """The next one, for two slices of a row of bfloat16: its numbers from max / 127 on are then cut exactly, and most
    rests end in zeros, which cost the products less power. The ``below``, of which that is not true, are cut more
    coarsely; where that would make the row's error larger (most are, beside a giant) it is ``scale`` itself."""
    power = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    coarser = power / scale  # NaN for a row of zeros, or one that is not finite
    return tl.where(below * coarser * coarser <= d, power, scale)


@triton.jit
def _scale_of_16_bits(x, inside, d, SLICES: tl.constexpr):
    """Of a row of bfloat16, that a program has whole."""
    scale = _scale(tl.abs(x))
    if SLICES == 2:
        scale = _power_of_2(scale, _below(x, scale, inside), d)
    return scale


@triton.jit
def _inverse(scale):
    return tl.where(scale > 1.2e-38, 1.0 / scale, 0.0)  # of less it would be infinite


@triton.jit
def _integer(x):
    """The nearest integer, ties to even, for |x| < 2^21, in the low 22 bits: 1.5 * 2^23 leaves no room for less."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _store_codes(codes_ptr, at, x, scale, inside, plane, SLICES: tl.constexpr):
    """Codes; and with two slices, ``plane`` further on, what they leave, in 256ths of their unit. Both are bytes of one
    integer, since |x| is at most 127 times ``scale``; where that is not finite they are no matter."""
    if SLICES == 1:
        tl.store(codes_ptr + at, _integer(x * _inverse(scale)).to(tl.int8), mask=inside)
    else:
        whole = _integer(x * _inverse(scale) * 256.0)
        tl.store(codes_ptr + at, ((whole + 128) >> 8).to(tl.int8), mask=inside)
        tl.store(codes_ptr + plane + at, whole.to(tl.int8), mask=inside)


@triton.jit
def _scaled(x_ptr, column_ptr, at, inside, COLUMN: tl.constexpr):
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if COLUMN:
        x = x * tl.load(column_ptr + at, mask=inside, other=0.0)
    return x


@Kernel
@triton.jit
def _quantize(x_ptr, codes_ptr, scale_ptr, column_ptr, d, stride_x, plane, COLUMN: tl.constexpr, SLICES: tl.constexpr,
              ONE_PASS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x_ptr += row * stride_x
    codes_ptr += row * d
    if ONE_PASS:
        x = _scaled(x_ptr, column_ptr, at, at < d, COLUMN)
        scale = _scale(tl.abs(x)) if COLUMN else _scale_of_16_bits(x, at < d, d, SLICES)
        _store_codes(codes_ptr, at, x, scale, at < d, plane, SLICES)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, d, BLOCK):
            x = _scaled(x_ptr, column_ptr, start + at, start + at < d, COLUMN)
            top = tl.maximum(top, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        scale = _scale(top)
        if SLICES == 2 and not COLUMN:
            below = 0
            for start in range(0, d, BLOCK):
                x = _scaled(x_ptr, column_ptr, start + at, start + at < d, COLUMN)
                below += _below(x, scale, start + at < d)
            scale = _power_of_2(scale, below, d)
        for start in range(0, d, BLOCK):
            x = _scaled(x_ptr, column_ptr, start + at, start + at < d, COLUMN)
            _store_codes(codes_ptr, start + at, x, scale, start + at < d, plane, SLICES)
    tl.store(scale_ptr + row, scale)


_ONE_PASS = 16384  # features of a row that one program keeps in registers


def _numbers(tokens: int, like: Tensor) -> Tensor:
    return torch.empty(tokens, dtype=torch.float32, device=like.device)


def _room(tokens: int, d: int, slices: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """For codes [T, d], or two slices [2, T, d], and their scales; without slices, for numbers of ``like``'s type."""
    if not slices:
        return torch.empty(tokens, d, dtype=like.dtype, device=like.device), None
    shape = (tokens, d) if slices == 1 else (slices, tokens, d)
    return torch.empty(shape, dtype=torch.int8, device=like.device), _numbers(tokens, like)


def quantize(x: Tensor, column_scale: Tensor | None = None, slices: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, d], times ``column_scale`` [d] where given, in int8 with one scale a row: (codes [T, d], scale [T]). The
    scale of a row that holds a NaN or an infinity is not finite, so that the row's products are not either.

    In two ``slices`` [2, T, d] it is ``(codes + rest / 256) * scale``: 16 bits, of which the codes are nearest to x,
    and the rest is from -128 to 127. Without ``column_scale`` the scale is a power of two, so that bfloat16 x is met
    exactly from a 127th of its row's largest on, but for rows that have more below that than it would do good."""
    tokens, d = x.shape
    codes, scale = _room(tokens, d, slices, x)
    assert scale is not None
    block = min(next_power_of_2(d), _ONE_PASS)
    _quantize(
        (tokens,), x, codes, scale, column_scale, d, x.stride(0), tokens * d, COLUMN=column_scale is not None,
        SLICES=slices, ONE_PASS=d <= block, BLOCK=block, num_warps=_row_warps(block),
    )  # fmt: skip
    return codes, scale


@triton.jit
def _transpose_one(x_ptr, y_ptr, block, rows, columns, stride_x, stride_y, BLOCK: tl.constexpr):
    r = block * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * stride_x + c[None, :], mask=live, other=0)
    live = (c < columns)[:, None] & (r < rows)[None, :]
    tl.store(y_ptr + c.to(tl.int64)[:, None] * stride_y + r[None, :], x.T, mask=live)


@Kernel
@triton.jit
def _transpose(a_ptr, b_ptr, c_ptr, y_ptr, rows_a, rows_b, rows_c, columns, stride_x, stride_y, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    blocks_a = tl.cdiv(rows_a, BLOCK)
    blocks_b = tl.cdiv(rows_b, BLOCK)
    if pid < blocks_a:
        _transpose_one(a_ptr, y_ptr, pid, rows_a, columns, stride_x, stride_y, BLOCK)
    elif pid < blocks_a + blocks_b:
        _transpose_one(b_ptr, y_ptr + rows_a, pid - blocks_a, rows_b, columns, stride_x, stride_y, BLOCK)
    else:
        pid -= blocks_a + blocks_b
        _transpose_one(c_ptr, y_ptr + rows_a + rows_b, pid, rows_c, columns, stride_x, stride_y, BLOCK)


def transpose(codes: Sequence[Tensor]) -> Tensor:
    """One to three matrices [rows, columns] turned, side by side: [columns, all rows]."""
    columns, rows = codes[0].shape[1], [part.shape[0] for part in codes]
    out = torch.empty(columns, sum(rows), dtype=codes[0].dtype, device=codes[0].device)
    a, b, c = (*codes, codes[0], codes[0])[:3]
    counts = (*rows, 0, 0)[:3]
    grid = sum(cdiv(count, 128) for count in rows), cdiv(columns, 128)
    _transpose(grid, a, b, c, out, *counts, columns, codes[0].stride(0), out.stride(0), BLOCK=128, num_warps=8)
    return out


@Kernel
@triton.jit
def _dequantize(codes_ptr, scale_ptr, out_ptr, columns, stride_c, stride_o, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    codes = tl.load(codes_ptr + row * stride_c + at, mask=inside, other=0).to(tl.float32)
    out = codes * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * stride_o + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` [rows, columns] with the int8 matrix in its type, rounded once."""
    rows, columns = codes.shape
    grid, block = (rows, cdiv(columns, 4096)), min(4096, next_power_of_2(columns))
    _dequantize(grid, codes, scale, out, columns, codes.stride(0), out.stride(0), BLOCK=block, num_warps=4)
    return out


@Kernel
@triton.jit
def _norm(x_ptr, weight_ptr, y_ptr, scale_ptr, rstd_ptr, d, eps, stride_x, plane, SLICES: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    given = tl.load(x_ptr + row * stride_x + at, mask=inside, other=0.0)
    x = given.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / d + eps)
    tl.store(rstd_ptr + row, rstd)
    y = (x * rstd).to(given.dtype).to(tl.float32)  # rounded where transformers' own RMSNorm rounds
    y = (y * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(given.dtype)
    if SLICES:
        y = y.to(tl.float32)
        scale = _scale_of_16_bits(y, inside, d, SLICES)
        _store_codes(y_ptr + row * d, at, y, scale, inside, plane, SLICES)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(y_ptr + row * d + at, y, mask=inside)


@Kernel
@triton.jit
def _norm_backward(grad_ptr, x_ptr, weight_ptr, rstd_ptr, residual_ptr, out_ptr, d, stride_g, stride_x, stride_r,
                   RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    grad = tl.load(grad_ptr + row * stride_g + at, mask=inside, other=0.0).to(tl.float32)
    grad = grad * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    hat = tl.load(x_ptr + row * stride_x + at, mask=inside, other=0.0).to(tl.float32) * rstd
    out = rstd * (grad - hat * (tl.sum(grad * hat, 0) / d))
    if RESIDUAL:
        out += tl.load(residual_ptr + row * stride_r + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * d + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def _row_warps(block: int) -> int:
    return max(1, min(16, block // 1024))


def norm(x: Tensor, weight: Tensor, eps: float, slices: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """RMSNorm of x [T, d] (arXiv 1910.07467): (``x / rms(x) * weight`` [T, d], None, ``1 / rms(x)`` float32 [T]); in
    ``slices``, the first two are its codes and their scale, as ``quantize`` gives them."""
    tokens, d = x.shape
    (y, scale), rstd = _room(tokens, d, slices, x), _numbers(tokens, x)
    block = next_power_of_2(d)
    _norm((tokens,), x, weight, y, scale, rstd, d, eps, x.stride(0), tokens * d, SLICES=slices, BLOCK=block,
          num_warps=_row_warps(block))  # fmt: skip
    return y, scale, rstd


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
    """The gradient of ``norm`` with respect to x, plus ``residual`` [T, d]."""
    tokens, d = x.shape
    out = torch.empty(tokens, d, dtype=x.dtype, device=x.device)
    block = next_power_of_2(d)
    _norm_backward((tokens,), grad, x, weight, rstd, residual, out, d, grad.stride(0), x.stride(0),
                   0 if residual is None else residual.stride(0), RESIDUAL=residual is not None, BLOCK=block,
                   num_warps=_row_warps(block))  # fmt: skip
    return out


@triton.jit
def _turned(x_ptr, cos_ptr, sin_ptr, h, i, live, tokens, stride_xb, stride_xt, stride_xh, stride_c, D: tl.constexpr,
            TURN: tl.constexpr):  # fmt: skip
    """Both halves of the heads of one token; ``TURN``: 1 turns them, -1 back, 0 lets them be."""
    pid = tl.program_id(0).to(tl.int64)  # of all tokens of all rows
    x = x_ptr + pid // tokens * stride_xb + pid % tokens * stride_xt + h * stride_xh + i
    first = tl.load(x, mask=live, other=0.0)
    second = tl.load(x + D // 2, mask=live, other=0.0)
    if TURN != 0:
        low = first.to(tl.float32)
        high = second.to(tl.float32)
        c = pid * stride_c + i
        inside = i < D // 2
        cos1 = tl.load(cos_ptr + c, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sin_ptr + c, mask=inside, other=0.0).to(tl.float32)
        cos2 = tl.load(cos_ptr + c + D // 2, mask=inside, other=0.0).to(tl.float32)
        sin2 = tl.load(sin_ptr + c + D // 2, mask=inside, other=0.0).to(tl.float32)
        if TURN == 1:
            first = (low * cos1 - high * sin1).to(first.dtype)
            second = (high * cos2 + low * sin2).to(first.dtype)
        else:
            first = (low * cos1 + high * sin2).to(first.dtype)
            second = (high * cos2 - low * sin1).to(first.dtype)
    return first, second


@triton.jit
def _rotate_one(x_ptr, y_ptr, cos_ptr, sin_ptr, tokens, stride_xb, stride_xt, stride_xh, stride_yt, stride_c, heads,
                D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    live = (h < heads) & (i < D // 2)
    first, second = _turned(
        x_ptr, cos_ptr, sin_ptr, h, i, live, tokens, stride_xb, stride_xt, stride_xh, stride_c, D, TURN
    )
    y = y_ptr + tl.program_id(0).to(tl.int64) * stride_yt + h * D + i
    tl.store(y, first, mask=live)
    tl.store(y + D // 2, second, mask=live)


@triton.jit
def _rotate_back_one(x_ptr, y_ptr, column_ptr, cos_ptr, sin_ptr, tokens, stride_xb, stride_xt, stride_xh, stride_c,
                     heads, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """Stores both halves of the heads; and gives them times ``column``, with the scale that their own codes had."""
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    live = (h < heads) & (i < D // 2)
    at = h * D + i
    first, second = _turned(
        x_ptr, cos_ptr, sin_ptr, h, i, live, tokens, stride_xb, stride_xt, stride_xh, stride_c, D, TURN
    )
    tl.store(y_ptr + at, first, mask=live)
    tl.store(y_ptr + at + D // 2, second, mask=live)
    one = first.to(tl.float32) * tl.load(column_ptr + at, mask=live, other=0.0)
    two = second.to(tl.float32) * tl.load(column_ptr + at + D // 2, mask=live, other=0.0)
    scale = _scale(tl.ravel(tl.maximum(tl.abs(one), tl.abs(two), propagate_nan=tl.PropagateNan.ALL)))
    return one, two, scale


@triton.jit
def _store_heads(codes_ptr, one, two, scale, plane, heads, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
                 SLICES: tl.constexpr):  # fmt: skip
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    live = (h < heads) & (i < D // 2)
    _store_codes(codes_ptr, h * D + i, one, scale, live, plane, SLICES)
    _store_codes(codes_ptr + D // 2, h * D + i, two, scale, live, plane, SLICES)


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _rotate_back(q_ptr, k_ptr, v_ptr, y_ptr, codes_ptr, scale_ptr, column_ptr, cos_ptr, sin_ptr, qb, qt, qh, kb, kt, kh,
                 vb, vt, vh, stride_c, heads, kv_heads, d, plane, tokens, D: tl.constexpr, HALF: tl.constexpr,
                 HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SLICES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k0 = heads * D
    v0 = k0 + kv_heads * D
    y_ptr += row * d
    q1, q2, scale_q = _rotate_back_one(q_ptr, y_ptr, column_ptr, cos_ptr, sin_ptr, tokens, qb, qt, qh, stride_c, heads,
                                       D, HALF, HEADS, -1)  # fmt: skip
    k1, k2, scale_k = _rotate_back_one(k_ptr, y_ptr + k0, column_ptr + k0, cos_ptr, sin_ptr, tokens, kb, kt, kh,
                                       stride_c, kv_heads, D, HALF, KV_HEADS, -1)  # fmt: skip
    v1, v2, scale_v = _rotate_back_one(v_ptr, y_ptr + v0, column_ptr + v0, cos_ptr, sin_ptr, tokens, vb, vt, vh,
                                       stride_c, kv_heads, D, HALF, KV_HEADS, 0)  # fmt: skip
    scale = tl.maximum(scale_q, tl.maximum(scale_k, scale_v, propagate_nan=tl.PropagateNan.ALL),
                       propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
    codes_ptr += row * d
    _store_heads(codes_ptr, q1, q2, scale, plane, heads, D, HALF, HEADS, SLICES)
    _store_heads(codes_ptr + k0, k1, k2, scale, plane, kv_heads, D, HALF, KV_HEADS, SLICES)
    _store_heads(codes_ptr + v0, v1, v2, scale, plane, kv_heads, D, HALF, KV_HEADS, SLICES)
    tl.store(scale_ptr + row, scale)


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _rotate(q_ptr, k_ptr, v_ptr, yq_ptr, yk_ptr, yv_ptr, cos_ptr, sin_ptr, qb, qt, qh, kb, kt, kh, vb, vt, vh,
            stride_yq, stride_yk, stride_yv, stride_c, heads, kv_heads, tokens, D: tl.constexpr, HALF: tl.constexpr,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    if tl.program_id(1) == 0:
        _rotate_one(
            q_ptr, yq_ptr, cos_ptr, sin_ptr, tokens, qb, qt, qh, stride_yq, stride_c, heads, D, HALF, HEADS, TURN
        )
    elif tl.program_id(1) == 1:
        _rotate_one(k_ptr, yk_ptr, cos_ptr, sin_ptr, tokens, kb, kt, kh, stride_yk, stride_c, kv_heads, D, HALF,
                    KV_HEADS, TURN)  # fmt: skip
    else:
        _rotate_one(v_ptr, yv_ptr, cos_ptr, sin_ptr, tokens, vb, vt, vh, stride_yv, stride_c, kv_heads, D, HALF,
                    KV_HEADS, 0)  # fmt: skip


def rotate(given: Sequence[Tensor], out: Sequence[Tensor], cos: Tensor, sin: Tensor, *, backward: bool = False) -> None:
    """Rotary embedding (arXiv 2104.09864, the two halves of a head as in transformers' Llama) of queries and keys, or
    its gradient.

    Args:
        given: q and k, [B, T, H, D] each, any strides but the last's, which is 1; a third, v, is copied only.
        out: [B * T, H * D] for each, heads contiguous, any row stride; may be ``given`` themselves.
        cos, sin: [B * T, D] (or one row of tokens for all rows, expanded), rows contiguous.
    """
    rows, tokens, heads, size = given[0].shape
    kv_heads = given[1].shape[2]
    q, k, v = (given[0], given[1], given[-1])
    _rotate(
        (rows * tokens, len(given)), q, k, v, out[0], out[1], out[-1], cos, sin, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], out[0].stride(0), out[1].stride(0), out[-1].stride(0), cos.stride(0), heads, kv_heads, tokens,
        D=size, HALF=next_power_of_2(size // 2), HEADS=next_power_of_2(heads), KV_HEADS=next_power_of_2(kv_heads),
        TURN=-1 if backward else 1, num_warps=4,
    )  # fmt: skip


def rotate_back(
    given: Sequence[Tensor], cos: Tensor, sin: Tensor, column_scale: Tensor | None, slices: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of ``rotate``, of q, k and v side by side: (the numbers [T, d]; and where there are to be slices,
    the same times ``column_scale`` [d] in int8, and one scale a row, as ``quantize`` gives them).

    Args:
        given: the gradients of q, k and v, as ``rotate`` takes them.
    """
    (rows, tokens, heads, size), kv_heads = given[0].shape, given[1].shape[2]
    widths = [heads * size, kv_heads * size, kv_heads * size]
    count, d = rows * tokens, sum(widths)
    out = torch.empty(count, d, dtype=given[0].dtype, device=given[0].device)
    if not slices:
        rotate(given, out.split(widths, 1), cos, sin, backward=True)
        return out, None, None
    codes, scale = _room(count, d, slices, out)
    q, k, v = given
    _rotate_back(
        (count,), q, k, v, out, codes, scale, column_scale, cos, sin, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], cos.stride(0), heads, kv_heads, d, count * d, tokens, D=size, HALF=next_power_of_2(size // 2),
        HEADS=next_power_of_2(heads), KV_HEADS=next_power_of_2(kv_heads), SLICES=slices,
        num_warps=max(4, min(16, next_power_of_2(d) // 1024)),
    )  # fmt: skip
    return out, codes, scale


@triton.jit
def _gated(gate_ptr, up_ptr, at, inside):
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    return (wide * tl.sigmoid(wide) * up.to(tl.float32)).to(gate.dtype)


@Kernel
@triton.jit
def _swiglu(gate_ptr, up_ptr, h_ptr, scale_ptr, f, plane, SLICES: tl.constexpr, ONE_PASS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * f
    up_ptr += row * f
    at = tl.arange(0, BLOCK)
    h_ptr += row * f
    if not SLICES:
        for start in range(0, f, BLOCK):
            h = _gated(gate_ptr, up_ptr, start + at, start + at < f)
            tl.store(h_ptr + start + at, h, mask=start + at < f)
    elif ONE_PASS:
        h = _gated(gate_ptr, up_ptr, at, at < f).to(tl.float32)
        scale = _scale_of_16_bits(h, at < f, f, SLICES)
        _store_codes(h_ptr, at, h, scale, at < f, plane, SLICES)
        tl.store(scale_ptr + row, scale)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, f, BLOCK):
            h = _gated(gate_ptr, up_ptr, start + at, start + at < f).to(tl.float32)
            top = tl.maximum(top, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
        scale = _scale(top)
        if SLICES == 2:
            below = 0
            for start in range(0, f, BLOCK):
                h = _gated(gate_ptr, up_ptr, start + at, start + at < f).to(tl.float32)
                below += _below(h, scale, start + at < f)
            scale = _power_of_2(scale, below, f)
        for start in range(0, f, BLOCK):
            h = _gated(gate_ptr, up_ptr, start + at, start + at < f).to(tl.float32)
            _store_codes(h_ptr, start + at, h, scale, start + at < f, plane, SLICES)
        tl.store(scale_ptr + row, scale)


def swiglu(gate: Tensor, up: Tensor, slices: int) -> tuple[Tensor, Tensor | None]:
    """``silu(gate) * up`` of [T, f] (arXiv 2002.05202), and None; or in ``slices`` its codes and their scale, as
    ``quantize`` gives them."""
    tokens, f = gate.shape
    h, scale = _room(tokens, f, slices, gate)
    block = _gated_block(f)
    _swiglu((tokens,), gate, up, h, scale, f, tokens * f, SLICES=slices, ONE_PASS=f <= block, BLOCK=block,
            num_warps=max(1, block // 512))  # fmt: skip
    return h, scale


def _gated_block(f: int) -> int:
    block = next_power_of_2(f)
    return block if block <= _ONE_PASS else 4096


@triton.jit
def _gated_backward(grad_ptr, gate_ptr, up_ptr, out_ptr, f, at, inside):
    """d_gate and d_up, rounded and stored; the gradient is overwritten with ``silu(gate) * up``."""
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    kind = grad.dtype
    s = tl.sigmoid(gate)
    silu = gate * s
    d_up = (grad.to(tl.float32) * silu).to(kind)
    d_gate = (grad.to(tl.float32) * up * (s + silu * (1.0 - s))).to(kind)
    tl.store(out_ptr + at, d_gate, mask=inside)
    tl.store(out_ptr + f + at, d_up, mask=inside)
    tl.store(grad_ptr + at, (silu * up).to(kind), mask=inside)
    return d_gate.to(tl.float32), d_up.to(tl.float32)


@Kernel
@triton.jit
def _swiglu_backward(
    grad_ptr, gate_ptr, up_ptr, out_ptr, codes_ptr, scale_ptr, column_ptr, f, plane, SLICES: tl.constexpr,
    ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * f
    gate_ptr += row * f
    up_ptr += row * f
    out_ptr += row * 2 * f
    at = tl.arange(0, BLOCK)
    if ONE_PASS:
        inside = at < f
        d_gate, d_up = _gated_backward(grad_ptr, gate_ptr, up_ptr, out_ptr, f, at, inside)
        if SLICES:
            d_gate = d_gate * tl.load(column_ptr + at, mask=inside, other=0.0)
            d_up = d_up * tl.load(column_ptr + f + at, mask=inside, other=0.0)
            scale = _scale(tl.maximum(tl.abs(d_gate), tl.abs(d_up), propagate_nan=tl.PropagateNan.ALL))
            codes_ptr += row * 2 * f
            _store_codes(codes_ptr, at, d_gate, scale, inside, plane, SLICES)
            _store_codes(codes_ptr + f, at, d_up, scale, inside, plane, SLICES)
            tl.store(scale_ptr + row, scale)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, f, BLOCK):
            inside = start + at < f
            d_gate, d_up = _gated_backward(grad_ptr, gate_ptr, up_ptr, out_ptr, f, start + at, inside)
            if SLICES:
                d_gate = d_gate * tl.load(column_ptr + start + at, mask=inside, other=0.0)
                d_up = d_up * tl.load(column_ptr + f + start + at, mask=inside, other=0.0)
                top = tl.maximum(top, tl.abs(d_gate), propagate_nan=tl.PropagateNan.ALL)
                top = tl.maximum(top, tl.abs(d_up), propagate_nan=tl.PropagateNan.ALL)
        if SLICES:
            scale = _scale(top)
            tl.debug_barrier()  # what other threads of this program wrote above
            codes_ptr += row * 2 * f
            for start in range(0, 2 * f, BLOCK):
                x = _scaled(out_ptr, column_ptr, start + at, start + at < 2 * f, True)
                _store_codes(codes_ptr, start + at, x, scale, start + at < 2 * f, plane, SLICES)
            tl.store(scale_ptr + row, scale)


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, column_scale: Tensor | None, slices: int,
    options: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of ``swiglu``: (d_gate and d_up side by side [T, 2f]; and where there are to be slices, the same
    times ``column_scale`` [2f] in int8, and one scale a row for both). ``grad`` [T, f] is overwritten with
    ``silu(gate) * up``."""
    tokens, f = gate.shape
    out = torch.empty(tokens, 2 * f, dtype=gate.dtype, device=gate.device)
    codes, scale = _room(tokens, 2 * f, slices, gate) if slices else (None, None)
    chosen = options or {"BLOCK": min(4096, next_power_of_2(f)), "num_warps": 16}  # 8 warps: 715 us, 16: 584
    _swiglu_backward((tokens,), grad, gate, up, out, codes, scale, column_scale, f, 2 * tokens * f, SLICES=slices,
                     ONE_PASS=f <= chosen["BLOCK"], **chosen)  # fmt: skip
    return out, codes, scale
