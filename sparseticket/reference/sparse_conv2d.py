from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .scatter_live import scatter_live

__all__ = ["sparse_conv2d"]


def sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    taps: torch.Tensor | None = None,
    flip: torch.Tensor | None = None,
    code: int = 0,
) -> torch.Tensor:
    """``conv2d(x[N, C, H, W], W, bias, ...)``, W zero but for ``values`` where ``words`` are 1."""
    del taps, flip, code
    weight = scatter_live(values, words, weight_shape)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
