"""The norms of many adapters' gradients: torch takes tensor by tensor, which for some ten thousand is slower than the
step; where Triton runs, a kernel finds them by their addresses."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

from finetuna_lightning.ops.library import has_triton


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each of ``tensors`` stands: int64, on the host."""
    return torch.frombuffer(array("q", map(Tensor.data_ptr, tensors)), dtype=torch.int64)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to ``device``, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True)


def norms_at(at: Tensor, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """The norm of each owner's gradients, 0-dim; they are contiguous, in float32, of ``sizes`` elements, and stand on
    ``device`` at ``at``: int64 [owners, tensors], on the host. Needs Triton."""
    from finetuna_lightning.ops.kernels import adam

    table, lengths = _tables(sizes, device)
    with torch.cuda.device(device):  # Triton launches on the current one
        return list(adam.norms(table, lengths, sent(at, device), aligned=not bool((at & 15).any())).unbind())


def gradient_norms(owners: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The Euclidean norm of all tensors of each owner together, 0-dim. No owner's depends, in any bit, on another's."""
    norms: list[Tensor | None] = [None] * len(owners)
    alike: dict[tuple[torch.device, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, own in enumerate(owners):
        device, plain = own[0].device, set(map(attrgetter("dtype"), own)) == {torch.float32}
        plain = plain and has_triton(device) and set(map(Tensor.get_device, own)) == {device.index}
        if plain and all(map(Tensor.is_contiguous, own)):
            alike[device, tuple(map(Tensor.numel, own))].append(index)
        else:
            norms[index] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(own))))
    for (device, sizes), indices in alike.items():
        at = addresses([*chain.from_iterable(owners[index] for index in indices)]).view(len(indices), -1)
        for index, norm in zip(indices, norms_at(at, sizes, device), strict=True):
            norms[index] = norm
    return [norm for norm in norms if norm is not None]


@lru_cache(maxsize=64)
def _tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    from finetuna_lightning.ops.kernels import adam

    return adam.programs(sizes, adam.NORM_ROWS).to(device), torch.tensor(sizes).to(device)
