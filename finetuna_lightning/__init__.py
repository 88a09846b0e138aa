"""finetuna_lightning: many LoRA adapters trained side by side over one frozen 8-bit backbone.

The names below are the public face; ``import finetuna_lightning as ft``. They are loaded when first used, so that the
command lines answer ``--help`` and a mistake without waiting for torch."""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from finetuna_lightning.adapters import Adapter, AdapterBank
    from finetuna_lightning.backbone import load_backbone, quantize_model_, save_backbone
    from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig, OptimConfig
    from finetuna_lightning.errors import FinetunaError
    from finetuna_lightning.finetuned import (
        EmbeddingAdapterConfig,
        Finetuned,
        LinearAdapterConfig,
        finetuned_from_bank,
        get_lora_adaptable_modules,
        get_model_mem_consumption,
        load_finetuned,
        load_state_dict,
        new_finetuned,
        prepare_base_model,
        state_dict,
    )
    from finetuna_lightning.memory_estimate import MemoryEstimate, Sequences, estimate_memory
    from finetuna_lightning.nn.routing import Route, checkpoint_contexts
    from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
    from finetuna_lightning.training.callbacks.early_stopping import AdapterEarlyStopping
    from finetuna_lightning.training.callbacks.freeze import FreezeQuantizedWeights
    from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
    from finetuna_lightning.training.callbacks.progress import AdapterProgress
    from finetuna_lightning.training.callbacks.trainer_state import TrainerCheckpoint
    from finetuna_lightning.training.checkpoint_io import SafeCheckpointIO
    from finetuna_lightning.training.data import AdapterDataModule
    from finetuna_lightning.training.module import MultiAdapterModule
    from finetuna_lightning.training.precision import EightBitPrecision

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapters",
    "AdapterBank": "adapters",
    "AdapterCheckpoint": "training.callbacks.checkpoint",
    "AdapterConfig": "configs",
    "AdapterDataModule": "training.data",
    "AdapterEarlyStopping": "training.callbacks.early_stopping",
    "AdapterMemoryMonitor": "training.callbacks.memory",
    "AdapterProgress": "training.callbacks.progress",
    "BackboneConfig": "configs",
    "DataConfig": "configs",
    "EightBitPrecision": "training.precision",
    "EmbeddingAdapterConfig": "finetuned",
    "FinetunaError": "errors",
    "Finetuned": "finetuned",
    "FreezeQuantizedWeights": "training.callbacks.freeze",
    "LinearAdapterConfig": "finetuned",
    "MemoryEstimate": "memory_estimate",
    "MultiAdapterModule": "training.module",
    "OptimConfig": "configs",
    "Route": "nn.routing",
    "SafeCheckpointIO": "training.checkpoint_io",
    "Sequences": "memory_estimate",
    "TrainerCheckpoint": "training.callbacks.trainer_state",
    "checkpoint_contexts": "nn.routing",
    "estimate_memory": "memory_estimate",
    "finetuned_from_bank": "finetuned",
    "get_lora_adaptable_modules": "finetuned",
    "get_model_mem_consumption": "finetuned",
    "load_backbone": "backbone",
    "load_finetuned": "finetuned",
    "load_state_dict": "finetuned",
    "new_finetuned": "finetuned",
    "prepare_base_model": "finetuned",
    "quantize_model_": "backbone",
    "save_backbone": "backbone",
    "state_dict": "finetuned",
}
__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterCheckpoint",
    "AdapterConfig",
    "AdapterDataModule",
    "AdapterEarlyStopping",
    "AdapterMemoryMonitor",
    "AdapterProgress",
    "BackboneConfig",
    "DataConfig",
    "EightBitPrecision",
    "EmbeddingAdapterConfig",
    "FinetunaError",
    "Finetuned",
    "FreezeQuantizedWeights",
    "LinearAdapterConfig",
    "MemoryEstimate",
    "MultiAdapterModule",
    "OptimConfig",
    "Route",
    "SafeCheckpointIO",
    "Sequences",
    "TrainerCheckpoint",
    "checkpoint_contexts",
    "estimate_memory",
    "finetuned_from_bank",
    "get_lora_adaptable_modules",
    "get_model_mem_consumption",
    "load_backbone",
    "load_finetuned",
    "load_state_dict",
    "new_finetuned",
    "prepare_base_model",
    "quantize_model_",
    "save_backbone",
    "state_dict",
]


def __getattr__(name: str) -> typing.Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
