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
) -> torch.Tensor:
    """``conv2d(x[N, C, H, W], weight * mask, bias, ...)``; ``dense_grad`` as in masked_linear."""
    del dense_grad
    return F.conv2d(x, apply_mask(weight, words), bias, stride, padding, dilation, groups)
