from __future__ import annotations

import math

import torch

from .gather_live import gather_live

__all__ = ["sparse_linear_dw"]


def sparse_linear_dw(
    grad: torch.Tensor,
    x: torch.Tensor,
    words: torch.Tensor,
    kept: int,
    pattern: torch.Tensor | None = None,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``grad^T @ x`` at the live positions, 1-D: the gradient of sparse_linear's values."""
    del pattern, transposed
    rows = math.prod(x.shape[:-1])
    dense = grad.reshape(rows, grad.shape[-1]).t() @ x.reshape(rows, x.shape[-1])
    return gather_live(dense, words, kept)
