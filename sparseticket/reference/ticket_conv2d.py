from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .regenerate import regenerate

__all__ = ["ticket_conv2d"]


def ticket_conv2d(
    x: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    seed: int,
    layer: int,
    dist: str,
    sigma: float,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    signs: torch.Tensor | None = None,
) -> torch.Tensor:
    """``conv2d(x[N, C, H, W], W, bias, ...)`` with W of ``weight_shape`` regenerated and masked."""
    del signs
    weight = regenerate(
        seed, layer, weight_shape, dist, sigma, dtype=x.dtype, device=x.device, words=words
    )
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
