from __future__ import annotations

import torch

from .unpack_mask import unpack_mask

__all__ = ["sparse_pattern"]


def sparse_pattern(
    words: torch.Tensor, k: int, kept: int, transposed: bool = False
) -> torch.Tensor:
    """int32: how many live weights lie before each row of the mask ``[O, k]``, then their columns,
    row after row; ``transposed``: the same of ``[k, O]``, then which live weight of the mask each
    is. What kernels are given says the same in blocks of their own."""
    mask = unpack_mask(words, (words.shape[0], k))
    order = (mask.flatten().cumsum(0) - 1).view(mask.shape)
    mask, order = (mask.t(), order.t()) if transposed else (mask, order)
    starts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    parts = [starts, mask.nonzero()[:, 1], *([order[mask]] if transposed else [])]
    if int(starts[-1]) != kept:
        raise ValueError(f"sparse_pattern: kept: got {kept}, the mask keeps {int(starts[-1])}")
    return torch.cat(parts).int()
