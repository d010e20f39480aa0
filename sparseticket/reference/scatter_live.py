from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import canonical_shape, from_canonical, to_canonical
from .unpack_mask import unpack_mask

__all__ = ["scatter_live"]


def scatter_live(values: torch.Tensor, words: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of gather_live: a contiguous tensor of ``shape``, zero where nothing is live."""
    mask = to_canonical(unpack_mask(words, shape))
    dense = values.new_zeros(canonical_shape(shape))
    return from_canonical(dense.masked_scatter(mask, values), shape).contiguous()
