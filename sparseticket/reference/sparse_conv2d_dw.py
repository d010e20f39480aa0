from __future__ import annotations

from collections.abc import Sequence

import torch

from .gather_live import gather_live

__all__ = ["sparse_conv2d_dw"]


def sparse_conv2d_dw(
    x: torch.Tensor,
    grad: torch.Tensor,
    words: torch.Tensor,
    live: int,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Gradient ``[live]`` of a conv's weight at the live positions, canonical order; ``grad`` is
    that of its output."""
    if x.ndim == 3:
        x, grad = x.unsqueeze(0), grad.unsqueeze(0)
    full = torch.nn.grad.conv2d_weight(
        x, tuple(weight_shape), grad, stride, padding, dilation, groups
    )
    return gather_live(full, words, live)
