"""One optimizer for all adapters, with a parameter group for each: its own learning rate, decay, schedule and
clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetuna_lightning.configs import AdapterConfig, OptimConfig


def schedule_factor(kind: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate's factor after ``step`` optimizer steps.

    Linear from 0 to 1 over ``warmup_steps`` (the first step already moves), then ``constant``, or ``linear`` or
    ``cosine`` decay to 0 at ``total_steps``.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if kind == "constant":
            return 1.0
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        return left if kind == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))

    return factor


def build_optimizer(
    parameters: Mapping[str, Iterable[nn.Parameter]], adapters: Mapping[str, AdapterConfig], optim: OptimConfig
) -> Optimizer:
    """AdamW over all adapters, one group a name; ``group["name"]`` and ``group["max_grad_norm"]`` say whose it is and
    how it is clipped."""
    groups = [
        {
            "params": [p for p in parameters[name] if p.requires_grad],
            "name": name,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
        }
        for name, config in adapters.items()
    ]
    betas = (optim.betas[0], optim.betas[1])
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=optim.eps)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit  # slow to import, and only these two need it

    kind = AdamW8bit if optim.name == "adamw8bit" else PagedAdamW8bit
    optimizer: Optimizer = kind(groups, betas=betas, eps=optim.eps)
    return optimizer


def build_scheduler(optimizer: Optimizer, adapters: Mapping[str, AdapterConfig], total_steps: int) -> LambdaLR:
    """One ``LambdaLR`` with a function for each adapter's group; an adapter's own ``max_steps`` ends its schedule."""
    factors = [
        schedule_factor(
            adapters[group["name"]].schedule,
            adapters[group["name"]].warmup_steps,
            min(total_steps, adapters[group["name"]].max_steps or total_steps),
        )
        for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, factors)


def clip_each_group(optimizer: Optimizer) -> dict[str, Tensor]:
    """Clip every adapter's own gradient norm to its ``max_grad_norm``; the norms before clipping, by name."""
    norms: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        having = [p for p in group["params"] if p.grad is not None]
        if having:
            limit = group["max_grad_norm"]
            norms[group["name"]] = nn.utils.clip_grad_norm_(having, math.inf if limit is None else limit)
    return norms


def optimizer_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of optimizer state by group name (shared lookup tables of 8-bit optimizers are counted where first met)."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for group in optimizer.param_groups:
        total = 0
        for parameter in group["params"]:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in seen:
                    seen.add(value.untyped_storage().data_ptr())
                    total += value.untyped_storage().nbytes()
        sizes[group["name"]] = total
    return sizes
