from __future__ import annotations

import torch
import torch.nn.functional as F

from .scatter_live import scatter_live

__all__ = ["sparse_linear"]


def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None = None,
    pattern: torch.Tensor | None = None,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[..., O] = x[..., K] @ W^T + bias`` where W holds ``values`` at the live positions."""
    del pattern, transposed  # derived from words, for kernels
    return F.linear(x, scatter_live(values, words, (words.shape[0], x.shape[-1])), bias)
