from __future__ import annotations

import torch

from .popup_linear import popup_score_grad
from .regenerate import regenerate

__all__ = ["popup_linear_ds"]


def popup_linear_ds(
    grad: torch.Tensor,
    x: torch.Tensor,
    scores: torch.Tensor,
    transform: str,
    seed: int,
    layer: int,
    sigma: float,
) -> torch.Tensor:
    """Score gradient ``[O, K]`` of popup_linear with weights from the seed: popup_score_grad of
    the dense weight gradient ``grad[..., O]^T @ x[..., K]``."""
    rows, k = scores.shape
    dense = grad.flatten(0, -2).t() @ x.flatten(0, -2) if x.ndim > 1 else torch.outer(grad, x)
    recipe = (seed, layer, (rows, k), "signed_constant", sigma)
    weight = regenerate(*recipe, dtype=x.dtype, device=x.device)
    return popup_score_grad(dense, weight, scores, transform)
