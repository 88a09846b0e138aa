"""What stands in memory: the logits that an operation makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sizes(TorchDispatchMode):
    """The rows of the largest tensor that has as many columns as there are words, by its type."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, dict[torch.dtype, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[-1] == self.vocabulary:
                rows = leaf.numel() // self.vocabulary
                self.rows[leaf.dtype] = max(rows, self.rows.get(leaf.dtype, 0))
        return out
