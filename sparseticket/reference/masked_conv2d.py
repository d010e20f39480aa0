from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .apply_mask import apply_mask

__all__ = ["masked_conv2d"]


def masked_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_grad: bool = False,
    shadow: torch.Tensor | None = None,
) -> torch.Tensor:
    """``conv2d(x[N, C, H, W], weight * mask, bias, ...)``; ``dense_grad`` and ``shadow`` as in
    masked_linear."""
    del dense_grad
    masked = apply_mask(weight, words) if shadow is None else shadow
    return F.conv2d(x, masked, bias, stride, padding, dilation, groups)
