from __future__ import annotations

import torch

from .unpack_mask import unpack_mask

__all__ = ["apply_mask"]


def apply_mask(dense: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """``dense`` where its mask bit is 1, else 0 (exactly 0, also where ``dense`` is not finite)."""
    return torch.where(unpack_mask(words, dense.shape), dense, torch.zeros_like(dense))
