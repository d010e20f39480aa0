from __future__ import annotations

import torch
import torch.nn.functional as F

from .apply_mask import apply_mask

__all__ = ["masked_linear"]


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None = None,
    dense_grad: bool = False,
    transposed: bool = False,
    shadow: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[..., O] = x[..., K] @ (weight * mask)^T + bias``, or if ``transposed``
    ``y[..., K] = x[..., O] @ (weight * mask) + bias``. ``dense_grad`` only acts in backward: the
    weight's gradient then ignores the mask (RigL). ``shadow``: weight * mask in the dtype of ``x``,
    used in its place."""
    del dense_grad
    masked = apply_mask(weight, words) if shadow is None else shadow
    return F.linear(x, masked.t() if transposed else masked, bias)
