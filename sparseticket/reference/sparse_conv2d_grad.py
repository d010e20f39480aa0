from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import to_canonical
from .unpack_mask import unpack_mask

__all__ = ["sparse_conv2d_grad"]


def sparse_conv2d_grad(
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
    values = to_canonical(full)[to_canonical(unpack_mask(words, weight_shape))]
    if values.numel() != live:
        raise ValueError(f"sparse_conv2d_grad: live: got {live}, the mask has {values.numel()}")
    return values
