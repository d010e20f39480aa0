from __future__ import annotations

import torch

from .layout import to_canonical, words_shape

__all__ = ["pack_mask"]


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """int32 words ``[O, 2*ceil(K/64)]`` of a bool mask shaped like a weight; bit i of word w is
    canonical column 32*w + i, padding bits are 0."""
    matrix = to_canonical(mask)
    rows, columns = words_shape(mask.shape)
    bits = torch.zeros(rows, columns * 32, dtype=torch.int64, device=mask.device)
    bits[:, : matrix.shape[1]] = matrix
    place = 1 << torch.arange(32, dtype=torch.int64, device=mask.device)
    words = (bits.view(rows, columns, 32) * place).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
