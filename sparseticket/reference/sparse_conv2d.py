from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .layout import canonical_shape, from_canonical, to_canonical
from .unpack_mask import unpack_mask

__all__ = ["sparse_conv2d", "weight_of_values"]


def weight_of_values(
    values: torch.Tensor, words: torch.Tensor, weight_shape: Sequence[int]
) -> torch.Tensor:
    """The dense weight of ``values``, one a live position of ``words`` in canonical order."""
    mask = to_canonical(unpack_mask(words, weight_shape))
    matrix = values.new_zeros(canonical_shape(weight_shape)).masked_scatter(mask, values)
    return from_canonical(matrix, weight_shape)


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
    flip_words: torch.Tensor | None = None,
    flip_order: torch.Tensor | None = None,
    code: int = 0,
) -> torch.Tensor:
    """``conv2d(x[N, C, H, W], W, bias, ...)``, W zero but for ``values`` where ``words`` are 1."""
    del taps, flip_words, flip_order, code
    weight = weight_of_values(values, words, weight_shape)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
