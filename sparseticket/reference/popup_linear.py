from __future__ import annotations

import torch

from .masked_linear import masked_linear
from .regenerate import regenerate

__all__ = ["popup_linear", "popup_score_grad"]


def popup_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scores: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    transform: str,
    seed: int,
    layer: int,
    sigma: float,
    raw_grad: bool = False,
) -> torch.Tensor:
    """masked_linear whose backward reaches the scores (:func:`popup_score_grad`).

    ``raw_grad``: it gives them the dense gradient of W*mask as it is; popup_step does the rest.
    Without ``weight``, the layer's signed-constant weights are regenerated from its seed.
    """
    del transform, raw_grad
    if weight is None:
        weight = regenerate(
            seed, layer, scores.shape, "signed_constant", sigma, dtype=x.dtype, device=x.device
        )
    return masked_linear(x, weight, words, bias)


def popup_score_grad(
    weight_grad: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, transform: str
) -> torch.Tensor:
    """Straight-through gradient ``G * W * sign(s)`` (``G * W`` for ``identity``), dense: dropped
    edges included; 0 where an ``abs`` score is exactly 0. In the scores' dtype."""
    grad = weight_grad.to(scores.dtype) * weight.to(scores.dtype)
    return grad * scores.sign() if transform == "abs" else grad
