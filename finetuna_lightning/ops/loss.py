"""A frozen output head and the cross entropy after it, as one operator that never holds the logits of all tokens.

For the tokens of a chunk, with ``h`` [tokens, d], the head ``W`` [V, d] and the label ``y`` of each:

    logits = h W^T + bias               in h's type
    loss   = log sum exp(logits) - logits[y]        in float32
    G      = softmax(logits) - onehot(y)            over the logits, in h's type
    dh     = G W                                    in h's type

The head has no gradient, so ``dh`` is all that a backward pass needs: it is made in the forward pass, while the logits
are there, and the backward pass scales its rows. Products are computed in h's type, whatever the head is stored in: the
differences between probabilities would not survive 8 bits. But from an int8 head on a Hopper GPU the logits are
computed with h in two int8 slices (``hopper.product``), which are bfloat16 h itself but for its smallest numbers
(``rows.quantize``). G's rows, one number near 1 and a hundred thousand near 0, are never cut.

A row takes part in no other row's result, and what is ignored is selected away, never multiplied by 0: a NaN stays in
its row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.ops import native
from finetuna_lightning.ops.library import has_joint_kernels, read_out
from finetuna_lightning.ops.tiling import tiling

IGNORED = -100
CHUNK, CPU_CHUNK = 1024, 512  # tokens whose logits stand at a time
PIECE_ELEMENTS = 1 << 18  # of logits in float32 at a time, where there is no kernel: they stay in the CPU's cache


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def on_host(x: Tensor) -> bool:
    """Whether products with ``x`` are few and small at little cost, and values can be asked for without a wait."""
    return x.device.type == "cpu"


def may_hold_any(mask: Tensor) -> bool:
    """Whether ``mask`` is true anywhere, or may be: a GPU is not asked."""
    return not on_host(mask) or bool(mask.any())


def cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """Write the cross entropy of each row into ``losses`` and, with ``gradient``, its derivative over ``logits``.

    Args:
        logits: [rows, V]; without ``gradient`` left as they are, or not, as is cheaper.
        labels: [rows] int64, below V, or ``IGNORED``: such a row has loss 0 and gradient 0, whatever its logits are.
        losses: [rows], float32, or float64 for float64 logits.

    Raises:
        IndexError: by the CPU's own kernel, for a label that is neither.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and _has_triton():
        from finetuna_lightning.ops.kernels import loss as kernel

        with torch.cuda.device_of(logits):  # Triton launches on the current one
            kernel.cross_entropy_(logits, labels, losses, IGNORED, gradient)
    elif _has_kernel(logits, labels, losses):
        wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= logits.shape[1])]
        if len(wrong):
            raise IndexError(f"label {int(wrong[0])}: labels are {IGNORED}, or 0 to {logits.shape[1] - 1}")
        native.run("cross_entropy", logits, labels, losses, *logits.shape, logits.stride(0), IGNORED, gradient)
    else:
        _cross_entropy_(logits, labels, losses, gradient)


def _has_kernel(logits: Tensor, labels: Tensor, losses: Tensor) -> bool:
    if not native.takes(logits):
        return False
    rows = logits.shape[:1]
    return native.holds(labels, torch.int64, rows) and native.holds(losses, torch.float32, rows)


def _cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """``cross_entropy_`` in plain torch, by pieces that are copied to ``losses``' type; what is one number a row is
    done for all rows together."""
    ignored, at = labels == IGNORED, labels.clamp(min=0)[:, None]
    count = max(1, -(-logits.numel() // PIECE_ELEMENTS))
    for piece, own_at, chance in zip(*(part.chunk(count) for part in (logits, at, losses[:, None])), strict=True):
        wide = piece.to(losses.dtype)
        wide.sub_(wide.amax(1, keepdim=True))
        torch.gather(wide, 1, own_at, out=chance)
        total = wide.exp_().sum(1, keepdim=True)  # one exponential each; after a log_softmax there would be two
        chance.sub_(total.log())
        if gradient:
            piece.copy_(wide.div_(total))
    if gradient:
        # scatter_ takes a pass over all of the logits
        logits[torch.arange(len(labels), device=labels.device), at.squeeze(1)] = (losses.exp() - 1).to(logits.dtype)
    losses.neg_().masked_fill_(ignored, 0)
    if gradient and may_hold_any(ignored):
        logits.masked_fill_(ignored[:, None], 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None,
                stored: tuple[Tensor, Tensor] | None, parts: Sequence[int], chunk: int,
                gradient: bool) -> Tensor:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        slopes = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if gradient else None
        logits = _room(hidden, min(chunk, max(parts, default=0)), weight.shape[0])
        stop = 0
        for size in parts:
            cut, stop = slice(stop, stop + size), stop + size
            own = hidden[cut], labels[cut], weight, bias, logits, losses[cut], None if slopes is None else slopes[cut]
            if on_host(hidden):
                _counted_rows(*own)
            else:
                _by_chunk(*own, stored)
        if slopes is not None:
            ctx.save_for_backward(slopes, labels == IGNORED)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes, ignored = ctx.saved_tensors
        weights = grad.masked_fill(ignored, 0)  # also where the mean of no token at all makes it infinite
        return (slopes * weights[:, None]).to(slopes.dtype), None, None, None, None, None, None, None


def rows_that_count(labels: Tensor) -> Tensor:
    """The rows whose loss is wanted."""
    return (labels != IGNORED).nonzero().squeeze(1)


def _room(hidden: Tensor, rows: int, vocabulary: int) -> Tensor:
    """For the logits of a chunk, which are written over by those of the next."""
    # on a GPU each row begins at a multiple of 16 bytes, or matrix units and loads go at a fraction of their speed
    width = -(-vocabulary // 16) * 16 if hidden.is_cuda else vocabulary
    return hidden.new_empty(rows, width)[:, :vocabulary]


def _counted_rows(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor,
                  losses: Tensor, slopes: Tensor | None) -> None:  # fmt: skip
    """``_by_chunk`` of the rows that count alone: only the host's own memory can be asked which without a wait."""
    rows = rows_that_count(labels)
    if len(rows) == len(labels):
        _by_chunk(hidden, labels, weight, bias, room, losses, slopes)
        return
    some, some_slopes = losses[rows], None if slopes is None else slopes[rows]
    _by_chunk(hidden[rows], labels[rows], weight, bias, room, some, some_slopes)
    losses.zero_()[rows] = some
    if slopes is not None and some_slopes is not None:
        slopes.zero_()[rows] = some_slopes


def _by_chunk(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor,
              losses: Tensor, slopes: Tensor | None, stored: tuple[Tensor, Tensor] | None = None) -> None:  # fmt: skip
    """Fill ``losses`` and ``slopes``, chunk by chunk of as many tokens as ``room`` has rows; the logits from the int8
    codes and scales of the head as it is ``stored``, where given."""
    count, chunk = len(labels), len(room)
    multiply = _tiled_product if _takes_tiles(hidden, weight) else _product
    for first in range(0, count, max(chunk, 1)):
        cut = slice(first, min(first + chunk, count))
        logits = room[: cut.stop - cut.start]
        if stored is None:
            multiply(hidden[cut], weight, logits, bias, False)
        else:
            _sliced_product(hidden[cut], *stored, logits, bias)
        cross_entropy_(logits, labels[cut], losses[cut], slopes is not None)
        if slopes is not None:
            multiply(logits, weight, slopes[cut], None, True)


def _product(a: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, backward: bool) -> None:
    """Fill ``out`` with ``a W^T + bias``, or ``backward`` with ``a W``."""
    if bias is None:
        torch.mm(a, weight if backward else weight.t(), out=out)
    else:
        torch.addmm(bias, a, weight.t(), out=out)


def _takes_tiles(hidden: Tensor, weight: Tensor) -> bool:
    """Whether ``_tiled_product`` takes these: a GPU that has it, 16 bits, rows that begin at multiples of 16 bytes."""
    if torch.compiler.is_compiling() or not has_joint_kernels(hidden.device):
        return False
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    apart = hidden.stride(0) >= hidden.shape[1] and hidden.stride(0) % 8 == 0
    rows = hidden.stride(1) == 1 and apart and hidden.data_ptr() % 16 == 0
    return half and rows and weight.is_contiguous() and weight.shape[1] % 16 == 0


def _tiled_product(a: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, backward: bool) -> None:
    """The same by the kernel of joint layers, in which a row's bits do not depend on how many rows there are, and which
    is no slower (benchmarks/LOG.md)."""
    from finetuna_lightning.ops.kernels.gemm import gemm

    if len(a):
        with torch.cuda.device_of(a):  # Triton launches on the current one
            gemm(a, weight, out, tiling([("", 0, len(a))], a.device).tiles, bias=bias, b_is_kn=backward)


def _takes_slices(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, scheme: str | None
) -> bool:
    """Whether ``_sliced_product`` takes a head of ``scheme``."""
    if torch.compiler.is_compiling() or scheme != "int8" or hidden.dtype != torch.bfloat16 or hidden.stride(1) != 1:
        return False
    if not has_joint_kernels(hidden.device) or scale is None or scale.dtype != torch.float32:
        return False
    given = [t for t in (weight, scale, bias) if t is not None]
    if weight.shape[0] % 8 or weight.shape[1] % 16:
        return False
    if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in given):
        return False
    from finetuna_lightning.ops.kernels import hopper

    return weight.shape[1] <= hopper.LONGEST_SLICED and hopper.takes_slices(hidden.device, hidden.dtype)


def _sliced_product(a: Tensor, codes: Tensor, scale: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """``_tiled_product`` forwards, of the head as it is stored: faster, and W is not rounded."""
    from finetuna_lightning.ops.kernels import rows
    from finetuna_lightning.ops.kernels.gemm import gemm

    if len(a):
        with torch.cuda.device_of(a):
            values, own = rows.quantize(a, slices=2)
            tiles = tiling([("", 0, len(a))], a.device).tiles
            gemm(values, codes, out, tiles, row_scale=own, column_scale=scale, bias=bias)


def linear_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scheme: str | None = None,
    block_size: int = 64,
    parts: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The cross entropy of each token after a frozen linear head: differentiable in ``hidden``.

    Args:
        hidden: [..., d], the head's input; under autocast in autocast's type.
        labels: [...] int64, below V, or -100 where a token has no part.
        weight: [V, d]; with ``scheme``, its codes, and ``scale`` their scales (see ``ops.reference``).
        bias: [V] or None.
        parts: tokens of each part, one after another; no chunk has tokens of two, so that the products of one are the
            same, bit for bit, whatever else there is. None: all are one part.
        chunk: tokens whose logits stand at a time, in hidden's type: chunk x V numbers, beside V x d of the head. None:
            512 on the CPU, 1024 elsewhere. Results of different chunks differ by rounding alone.

    Returns:
        [...] float32 (float64 for float64 ``hidden``), 0 where a token has no part. Mean, sum and the cut into adapters
        are the caller's.

    Raises:
        ValueError: for a weight or bias that requires grad, or shapes that do not fit.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the head requires grad, but only the gradient of its input is computed here")
    if chunk is None:
        chunk = CPU_CHUNK if on_host(hidden) else CHUNK
    parts = [labels.numel()] if parts is None else list(parts)
    fit = sum(parts) == labels.numel() and min(parts, default=0) >= 0 and chunk >= 1
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[1] or not fit:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, head {tuple(weight.shape)}, parts "
            f"{parts} and chunk {chunk} do not fit: [..., d], [...], [V, d], all tokens and at least 1 are expected"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    flat, targets, shape = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous(), labels.shape
    dtype = flat.dtype
    with torch.no_grad():
        added = None if bias is None else bias.to(dtype)
        stored = (weight, scale) if _takes_slices(flat, weight, scale, added, scheme) else None
        if scheme is None:
            matrix = weight.to(dtype)
        elif stored is None or gradient:
            matrix = read_out(weight, scale, scheme, block_size, dtype)  # type: ignore[arg-type]
        else:
            matrix = weight  # the logits come from the codes, and nothing else is multiplied
    losses: Tensor = _LinearCrossEntropy.apply(flat, targets, matrix, added, stored, parts, chunk, gradient)  # type: ignore[no-untyped-call]
    return losses.view(shape)
