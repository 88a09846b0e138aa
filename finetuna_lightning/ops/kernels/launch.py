"""Launching Triton's kernels a thousand times a step.

``function[grid](...)`` asks Triton at each call for a dozen settings, writes all options into a string, and looks up
what it compiled by that; descriptors are checked each time. A GPU waits for it where layers are small. Here only what
Triton compiles for is looked at, and the compiled kernel launched by itself, as in Triton's tutorials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class Kernel:
    """A ``triton.jit`` function, called as ``kernel(grid, *args, **constants)``.

    ``args`` are in order its arguments that are no ``tl.constexpr``, of which those of ``do_not_specialize`` come last
    and are below 2^31; ``constants``, in one order always, the others and Triton's options. A compiled kernel is kept
    by device, types, whether addresses and numbers are multiples of 16 and numbers 1, and constants: by no less than
    Triton compiles for.

    Raises:
        ValueError: if an argument that is specialised stands behind one that is not.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
        self._kept = isinstance(function, JITFunction)  # Triton's interpreter compiles nothing
        if self._kept:
            self._constants = [p.name for p in function.params if p.is_constexpr]
            varying = [p.do_not_specialize for p in function.params if not p.is_constexpr]
            self._fixed = varying.count(False)
            if any(varying[: self._fixed]):
                raise ValueError(f"{function.__name__}: what is not specialised must come last")

    def __call__(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if not self._kept:
            self._function[grid](*args, **constants)
            return
        key = (torch.cuda.current_device(), *map(_kind, args[: self._fixed]), *constants.values())
        found = self._compiled.get(key)
        if found is None:
            for value in args:
                if isinstance(value, TensorDescriptor):
                    value.__post_init__()
            compiled = self._function[grid](*args, **constants)
            self._compiled[key] = compiled, [constants[name] for name in self._constants]
        else:
            compiled, rest = found
            compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _kind(value: Any) -> Any:
    """What Triton may compile an argument's kernel for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if isinstance(value, int):
        return value == 1 or -1, value & 15 == 0, value >> 31
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return type(value)


def descriptor(base: Tensor, shape: Sequence[int], stride: int, block: Sequence[int]) -> TensorDescriptor:
    """What the bulk copy engine is told of a matrix of ``shape``, rows ``stride`` apart, read by ``block``: unchecked
    here, and checked when a kernel is first launched with such a one, and by the driver."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = base, list(shape), [stride, 1], list(block)
    return made


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``. (Triton's own, and its ``next_power_of_2``, take a microsecond.)"""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is no less than ``size``, which is positive."""
    return 1 << (size - 1).bit_length()
