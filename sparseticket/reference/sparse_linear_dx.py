from __future__ import annotations

import torch

from .scatter_live import scatter_live

__all__ = ["sparse_linear_dx"]


def sparse_linear_dx(
    grad: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    k: int,
    pattern: torch.Tensor | None = None,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``dX[..., K] = grad[..., O] @ W``: the input gradient of sparse_linear."""
    del pattern, transposed
    return grad @ scatter_live(values, words, (words.shape[0], k))
