"""The precision plugin: an 8-bit backbone, activations in one floating type, adapters in float32."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from finetuna_lightning.adapters import output_head
from finetuna_lightning.backbone import cast_, quantize_model_, quantized_layers
from finetuna_lightning.configs import BLOCK_SIZES, DTYPES, SCHEMES
from finetuna_lightning.errors import ConfigError, one_of
from finetuna_lightning.ops import cpu
from finetuna_lightning.ops.library import has_joint_kernels

COMPUTE = ("auto", "16bit", "int8", "fp8")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type called ``name``; ``auto`` is float32 on the CPU and bfloat16 on a GPU (float16 where it has none)."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def has_fp8(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices in float8: a CUDA GPU of compute capability 8.9 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def has_int8(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices in int8 here: a CUDA GPU of compute capability 9.0 or newer where Triton
    is installed, or a CPU with AMX or VNNI."""
    return has_joint_kernels(device) or cpu.has_int8(device)


# what compute in 8 bits needs; each is called as the scheme that it is for
_NEEDS = {
    "int8": "a CPU with AMX or VNNI, or a CUDA GPU of compute capability 9.0 or newer with Triton",
    "fp8": "a CUDA GPU of compute capability 8.9 or newer",
}


class EightBitPrecision(Precision):
    """Quantises the backbone and leaves the adapters alone.

    Lightning's ``BitsandbytesPrecision`` would quantise LoRA's own linear layers, and refuses the CPU; this one
    converts ``module.backbone`` only, in place, and does nothing to what is quantised already.

    Args:
        scheme, block_size, skip_modules: for a backbone that came as a plain module. A ``BackboneConfig`` has its own.
        dtype: of activations and of what is not quantised: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        compute: ``16bit`` computes in ``dtype``, or in 16-bit fixed point (see ``nn.joint``), from 8-bit storage;
            ``int8`` and ``fp8`` multiply in 8 bits, where the device can and the scheme is the same, activations and
            gradients quantised per token; ``auto`` is ``int8`` for int8 storage and 16-bit activations on a GPU that
            has it, else ``16bit``.
        fuse: put kernels for whole parts of a decoder layer before the model's own, where they compute the same.
    """

    precision: Any = "8-bit"

    def __init__(self, scheme: str = "int8", block_size: int = 64, dtype: str = "auto", compute: str = "auto",
                 skip_modules: list[str] | None = None, fuse: bool = True) -> None:  # fmt: skip
        super().__init__()
        for what, value, options in (
            ("scheme", scheme, SCHEMES),
            ("dtype", dtype, DTYPES),
            ("compute", compute, COMPUTE),
        ):
            if value not in options:
                raise ConfigError(one_of(f"EightBitPrecision.{what}", value, options))
        if block_size not in BLOCK_SIZES:
            raise ConfigError(f"EightBitPrecision.block_size must be one of {BLOCK_SIZES}, not {block_size!r}")
        self.scheme, self.block_size, self.dtype, self.compute = scheme, block_size, dtype, compute
        self.skip_modules, self.fuse = list(skip_modules or ()), fuse

    def set_compute(self, backbone: nn.Module, device: torch.device | None = None) -> None:
        """Say to every quantised matrix how products with it are computed (on ``device``, by default where it is).
        Those with the output head are in the activations' own type (but see ``ops.loss``): its gradients are
        probabilities, one near 1 and thousands that add up, of which fixed point would keep nothing."""
        head = getattr(output_head(backbone), "quantized", None)
        for quantized in quantized_layers(backbone).values():
            quantized.sliced = quantized is not head
            if quantized is head:
                quantized.compute = "16bit"
            elif self.compute == "auto":
                at = device or quantized.codes.device
                narrow = quantized.scheme == "int8" and quantized.dtype != torch.float32
                quantized.compute = "int8" if narrow and has_joint_kernels(at) else "16bit"
            else:
                quantized.compute = self.compute

    def check_device(self, device: torch.device, scheme: str) -> None:
        """Raise ConfigError where ``compute`` is not to be had on ``device`` for a backbone stored in ``scheme``."""
        if self.compute not in _NEEDS:
            return
        if not (has_fp8(device) if self.compute == "fp8" else has_int8(device)):
            raise ConfigError(
                f"compute={self.compute!r} needs {_NEEDS[self.compute]}, but this run is on {device}: "
                "use compute='auto'"
            )
        if scheme != self.compute:
            raise ConfigError(f"compute={self.compute!r} needs backbone.scheme={self.compute!r}, not {scheme!r}")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantise ``module.backbone``, whatever of it is not yet; the adapters stay as they are."""
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise ConfigError(
                f"EightBitPrecision quantises module.backbone, but {type(module).__name__} has none: name it so, or "
                f"use "
                "MultiAdapterModule"
            )
        trainer = module.trainer if isinstance(module, LightningModule) else None
        device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
        if not getattr(module, "backbone_is_prepared", False):
            quantize_model_(backbone, self.scheme, self.block_size, self.skip_modules)
            cast_(backbone, resolve_dtype(self.dtype, device))
        self.set_compute(backbone, device if trainer is not None else None)
        if self.compute == "auto" and any(q.compute == "int8" for q in quantized_layers(backbone).values()):
            rank_zero_info("the backbone's products are computed in int8; EightBitPrecision(compute='16bit') does not")
        if any(
            q.compute == "16bit" and q.dtype == torch.bfloat16
            and cpu.lacks_bfloat16(q.codes.device if trainer is None else device)
            for q in quantized_layers(backbone).values()
        ):  # fmt: skip
            rank_zero_info(
                "this CPU multiplies bfloat16 slower than float32: use dtype='float32', of the backbone if it has its "
                "own, or else of EightBitPrecision"
            )
        return module

    def clip_gradients(self, optimizer: Any, clip_val: Any = 0.0, gradient_clip_algorithm: Any = None) -> None:
        """Refused: see ``refuse_joint_clipping``."""
        refuse_joint_clipping(clip_val)


def refuse_joint_clipping(value: float | None) -> None:
    """Raise ConfigError for a ``gradient_clip_val``: it clips the joint norm, which couples the adapters."""
    if value:
        raise ConfigError(
            f"Trainer(gradient_clip_val={value}) clips the norm over all adapters together, so that each would "
            f"depend on its "
            f"company: leave it out and set max_grad_norm={value} in AdapterConfig"
        )
