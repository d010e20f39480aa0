from __future__ import annotations

import torch

from .unpack_mask import unpack_mask

__all__ = ["apply_mask"]


def apply_mask(
    dense: torch.Tensor, words: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``dense`` where its mask bit is 1, else 0 (exactly 0, also where ``dense`` is not finite);
    in ``dtype``, by default its own."""
    kept = torch.where(unpack_mask(words, dense.shape), dense, torch.zeros_like(dense))
    return kept if dtype is None else kept.to(dtype)
