"""Frozen 8-bit layers. One ``QuantizedWeight`` is one stored matrix; a layer holds it as a child, and tied layers (an
embedding and the output head) hold the same child, so that there is one storage whatever is cast, moved or copied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetuna_lightning.ops import reference
from finetuna_lightning.ops.library import quantized_linear, read_out


class QuantizedWeight(nn.Module):
    """One matrix in 8 bits.

    Args:
        codes: [rows, columns], one byte each.
        scale: float32, one per row or per block (see ``ops.reference``).
        scheme: the storage format of ``codes``.
        block_size: elements per scale of ``int8-blockwise``.
        dtype: the type in which the matrix is read out where no activation says otherwise.

    The buffers are not persistent: a checkpoint of adapters never holds the backbone. Casts (``.half()``,
    ``.to(dtype)``) change ``dtype`` alone; moves between devices move the bytes.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, scheme: str, block_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.block_size, self.dtype = scheme, block_size, dtype
        self.compute = "16bit"  # how products with it are computed: see ops.library and nn.joint
        self.sliced = False  # whether "16bit" may be fixed point: see nn.joint
        self.joined_scales: tuple[Any, ...] | None = None  # with those of its neighbours: see nn.joint
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def from_weight(cls, weight: Tensor, scheme: str, block_size: int = 64) -> QuantizedWeight:
        """Quantise ``weight`` [rows, columns]; one without storage gives one without. Raises ValueError when it is not
        finite."""
        if weight.device.type == "meta":
            return cls.empty((weight.shape[0], weight.shape[1]), scheme, block_size, weight.dtype)
        codes, scale = reference.quantize(weight.detach(), scheme, block_size)
        return cls(codes, scale, scheme, block_size, weight.dtype)

    @classmethod
    def empty(cls, shape: tuple[int, int], scheme: str, block_size: int, dtype: torch.dtype) -> QuantizedWeight:
        """A matrix without storage (on the meta device), to be filled by a loader."""
        codes = torch.empty(shape, dtype=reference.code_dtype(scheme), device="meta")
        scale = torch.empty(reference.scale_shape(shape, scheme, block_size), device="meta")
        return cls(codes, scale, scheme, block_size, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The matrix [rows, columns] in ``dtype``, or in ``out``, which is then filled."""
        dtype = out.dtype if out is not None else dtype or self.dtype
        return read_out(self.codes, self.scale, self.scheme, self.block_size, dtype, out)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [...]: [..., columns]."""
        return reference.dequantize_rows(self.codes, self.scale, ids, self.scheme, self.block_size, self.dtype)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change whenever a code, a scale or the scheme does."""
        sums = (reference.fingerprint(self.codes), reference.fingerprint(self.scale))
        text = f"{self.scheme}:{self.block_size}:{tuple(self.shape)}:{sums[0]:016x}:{sums[1]:016x}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        codes, scale = self.codes, self.scale
        self.joined_scales = None  # would stay where they are
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        if self.scale.dtype != torch.float32:  # a cast: keep the values, follow to the device alone
            self.scale = scale.to(self.scale.device)
        if self.codes.dtype != codes.dtype:  # Module.type() casts integers too
            self.codes = codes.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.scheme}"


class _Unread(torch.Tensor):
    """What ``layer.weight`` gives: shape, type and device for nothing, the values only to an operation that uses
    them."""

    quantized: QuantizedWeight

    @staticmethod
    def __new__(cls, quantized: QuantizedWeight) -> _Unread:
        unread: _Unread = torch.Tensor._make_wrapper_subclass(
            cls, quantized.shape, dtype=quantized.dtype, device=quantized.codes.device
        )
        unread.quantized = quantized
        return unread

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(
            _Unread, lambda unread: unread.quantized.dequantize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<8-bit weight, {self.quantized.extra_repr()}>"


class QuantizedLinear(nn.Linear):
    """``y = x W^T + bias`` with a frozen 8-bit W; x [..., in], y [..., out] in x's type.

    ``conv1d`` says that the layer was a transformers ``Conv1D``, whose checkpoint keeps W transposed; the codes here
    are always [out, in]. Made by ``quantize_linear_``.
    """

    quantized: QuantizedWeight
    conv1d: bool

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None, conv1d: bool = False) -> None:
        nn.Module.__init__(self)
        self._fill(quantized, bias, conv1d)

    def _fill(self, quantized: QuantizedWeight, bias: Tensor | None, conv1d: bool) -> None:
        self.out_features, self.in_features = quantized.shape
        self.quantized, self.conv1d = quantized, conv1d
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [out, in], read out only by an operation on it."""
        return _Unread(self.quantized)

    def forward(self, input: Tensor) -> Tensor:
        q = self.quantized
        return quantized_linear(
            input, q.codes, q.scale, self.bias, scheme=q.scheme, block_size=q.block_size, compute=q.compute
        )

    def reset_parameters(self) -> None:
        """Frozen: there is nothing to initialise."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Embedding):
    """Rows of a frozen 8-bit matrix. Subclasses of ``nn.Embedding`` keep their own forward (a scale, an offset) around
    this one's: see ``quantize_embedding_``."""

    quantized: QuantizedWeight

    def __init__(self, quantized: QuantizedWeight, padding_idx: int | None = None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.padding_idx, self.max_norm = padding_idx, None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.quantized = quantized

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table [num_embeddings, embedding_dim], read out only by an operation on it."""
        return _Unread(self.quantized)

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized.rows(input)

    def reset_parameters(self) -> None:
        """Frozen: there is nothing to initialise."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``: a linear layer that keeps its weight as [in, out]."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")  # also a routed one


def quantizable(module: nn.Module) -> bool:
    """Whether ``module`` can be replaced: a linear layer, a ``Conv1D`` or an embedding that is not quantised yet.

    ``nn.MultiheadAttention``'s output projection is left alone: its parent uses the weight without calling the layer.
    So are embeddings with ``max_norm``, which rewrite their own table.
    """
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        return False
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _own_forward_is_plain(module: nn.Module, weight: Tensor) -> bool:
    """Whether a linear subclass computes ``x W^T + b`` and nothing else, tried on a small input."""
    if type(module).forward is nn.Linear.forward or weight.device.type == "meta":
        return True
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    with torch.no_grad():
        given, wanted = module.forward(x), nn.functional.linear(x, weight, bias)
    return torch.allclose(given.float(), wanted.float(), rtol=1e-2, atol=1e-2)


def quantize_linear_(module: nn.Module, quantized: QuantizedWeight, *, checked: bool = False) -> nn.Module:
    """Turn a linear layer or ``Conv1D``, in place, into a ``QuantizedLinear`` over ``quantized`` [out, in].

    In place, because models refer to one layer from several parents.

    Raises:
        TypeError: for a subclass of ``nn.Linear`` whose forward computes something else.
    """
    conv1d = is_conv1d(module)
    if not conv1d and not checked:
        weight = module.weight
        if not _own_forward_is_plain(module, weight):  # type: ignore[arg-type]
            raise TypeError(f"{type(module).__name__} is a linear layer with a forward of its own")
    bias = module.bias
    for name in ("weight", "bias"):
        module._parameters.pop(name, None)
    module.__class__ = QuantizedLinear
    module._fill(quantized, bias, conv1d)  # type: ignore[operator]
    return module


def quantize_embedding_(module: nn.Embedding, quantized: QuantizedWeight) -> nn.Embedding:
    """Turn an embedding, in place, into one over ``quantized`` [num_embeddings, embedding_dim].

    A subclass (scaled as in Gemma and BART, offset as in OPT) keeps its forward: the new class inherits from it first
    and from ``QuantizedEmbedding`` next, so that its ``super().forward(ids)`` looks the rows up in 8 bits.
    """
    module._parameters.pop("weight", None)
    module.__class__ = mixed(type(module), QuantizedEmbedding)
    module.quantized = quantized
    return module


_MIXED: dict[tuple[type, type], type] = {}


def mixed(cls: type, layer: type) -> type:
    """The class that puts ``layer`` between ``cls``'s own methods and those of ``torch.nn``'s layer beneath it."""
    if (cls, layer) not in _MIXED:
        plain = cls in (nn.Embedding, *layer.__mro__)
        bases = (layer,) if plain else (cls, layer)
        name = layer.__name__ if plain else f"{layer.__name__}[{cls.__name__}]"
        _MIXED[cls, layer] = layer if plain else type(name, bases, {"__module__": cls.__module__})
    return _MIXED[cls, layer]


def quantize_(module: nn.Module, scheme: str, block_size: int = 64) -> nn.Module:
    """Quantise one ``quantizable`` layer in place, from its own weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        return quantize_embedding_(module, QuantizedWeight.from_weight(weight, scheme, block_size))
    matrix = weight.t() if is_conv1d(module) else weight
    return quantize_linear_(module, QuantizedWeight.from_weight(matrix, scheme, block_size))


def dequantize_(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a quantised layer, in place, a real weight and its own class back; other modules are left as they are.

    What was a ``Conv1D`` becomes an ``nn.Linear`` with the weight as [out, in].
    """
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        weight = module.quantized.dequantize(dtype)
        del module.quantized
        own = (base for base in type(module).__mro__ if not issubclass(base, QuantizedLinear | QuantizedEmbedding))
        plain: type = nn.Linear if isinstance(module, QuantizedLinear) else next(own)
        object.__setattr__(module, "__class__", plain)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return module
