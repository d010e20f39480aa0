from __future__ import annotations

import torch

from .layout import to_canonical
from .unpack_mask import unpack_mask

__all__ = ["gather_live"]


def gather_live(dense: torch.Tensor, words: torch.Tensor, kept: int) -> torch.Tensor:
    """The ``kept`` live values of ``dense``, 1-D, in row-major order of the canonical [O, K]."""
    del kept  # known without looking at the mask, so that shapes are
    return to_canonical(dense)[to_canonical(unpack_mask(words, dense.shape))]
