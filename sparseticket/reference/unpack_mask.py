from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import canonical_shape, from_canonical

__all__ = ["unpack_mask"]


def unpack_mask(words: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Contiguous bool mask of ``shape`` from its packed words."""
    rows, k = canonical_shape(shape)
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = ((words.unsqueeze(-1) >> place) & 1).reshape(rows, words.shape[1] * 32)[:, :k]
    return from_canonical(bits.bool(), shape).contiguous()
