"""Several processes, one batch: each computes its own rows, and the adapters' gradients are those of all rows.

Lightning's DDP averages gradients over the processes. So that the sum over all rows, divided by the adapter's targets
in all rows, comes out, a process's loss is its own rows' sum times the number of processes, over the targets of all.
The backbone is loaded by every process itself and never sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from finetuna_lightning.errors import BackboneError, ConfigError

Piece = tuple[str, Tensor, Tensor, slice]
"""One adapter's part of a batch: name, summed loss, number of targets, rows."""


def check_strategy(trainer: Trainer) -> None:
    """Raise ConfigError for a strategy under which the adapters would not become what they become on one device."""
    strategy = trainer.strategy
    ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not ddp and not isinstance(strategy, SingleDeviceStrategy):
        raise ConfigError(
            f"{type(strategy).__name__} is not supported: it shards or moves weights that stay whole and frozen here; "
            "use Trainer(strategy='ddp'), or devices=1"
        )


def prepare_strategy(trainer: Trainer) -> None:
    """``check_strategy``, and let DDP meet adapters that have no rows on some process, or that have retired."""
    check_strategy(trainer)
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def never_sent(module: nn.Module, child: str) -> list[str]:
    """The names, as ``module`` knows them, of every parameter and buffer of its ``child``: what DDP must not send."""
    part = module.get_submodule(child)
    named = (*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False))
    return [f"{child}.{name}" for name, _ in named]


def check_same_backbone(trainer: Trainer, fingerprint: str | None) -> None:
    """Raise BackboneError where the processes loaded different backbones."""
    if trainer.world_size == 1:
        return
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, fingerprint)
    if len(set(found)) > 1:
        raise BackboneError(f"the processes loaded different backbones: fingerprints by rank are {', '.join(found)}")


def over_all_ranks(trainer: Trainer | None, names: Sequence[str], pieces: Iterable[Piece]) -> Iterator[Piece]:
    """``pieces`` with the loss and the targets of all processes' rows; on one process, as they are.

    The value is the joint one, the same everywhere; its gradient is that of this process's rows times the number of
    processes. An adapter whose rows are all elsewhere comes too, without a gradient and with no rows.
    """
    if trainer is None or trainer.world_size == 1:
        yield from pieces
        return
    # an adapter without a row here may have no loss at all: the mean of nothing
    own = {name: (total, count, cut) for name, total, count, cut in pieces if cut.stop > cut.start}
    device = next(iter(own.values()))[0].device
    sums = torch.zeros(3, len(names), dtype=torch.float64, device=device)
    for index, name in enumerate(names):
        if name in own:
            sums[0, index], sums[1, index] = own[name][0].detach(), own[name][1]
            sums[2, index] = 1
    torch.distributed.all_reduce(sums)
    present = sums[2].tolist()
    for index, name in enumerate(names):
        total, count, rows = sums[0, index].float(), sums[1, index].long(), slice(0, 0)
        if name in own:
            mine, _, rows = own[name]
            mine = mine * trainer.world_size
            total = mine + (total.to(mine.dtype) - mine).detach()
        if present[index]:
            yield name, total, count, rows


def on_any_rank(trainer: Trainer | None, flags: Mapping[str, bool]) -> dict[str, bool]:
    """Each flag, true where it is true on some process."""
    if trainer is None or trainer.world_size == 1 or not flags:
        return dict(flags)
    root = trainer.strategy.root_device
    found = torch.tensor(list(flags.values()), dtype=torch.int32, device=root)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return {name: bool(flag) for name, flag in zip(flags, found.tolist(), strict=True)}
