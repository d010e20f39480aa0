from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import canonical_shape, from_canonical, to_canonical
from .pack_mask import pack_mask
from .unpack_mask import unpack_mask

__all__ = ["conv2d_flip", "flipped_shape"]


def flipped_shape(weight_shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """``[O, C/g, kh, kw]`` to ``[C, O/g, kh, kw]``, the weight of the gradient's convolution."""
    return (weight_shape[1] * groups, weight_shape[0] // groups, *weight_shape[2:])


def conv2d_flip(
    words: torch.Tensor, weight_shape: Sequence[int], groups: int, live: int
) -> torch.Tensor:
    """The flipped, transposed pattern with which a convolution of the output's gradient gives the
    input's. int32: its mask words, then ``order [live]``; its values are ``values[order]``."""
    mask = unpack_mask(words, weight_shape)
    rank = torch.full(canonical_shape(weight_shape), -1, dtype=torch.int32, device=words.device)
    rank[to_canonical(mask)] = torch.arange(live, dtype=torch.int32, device=words.device)
    outputs, channels, *kernel = weight_shape
    grouped = from_canonical(rank, weight_shape).reshape(
        groups, outputs // groups, channels, *kernel
    )
    shape = flipped_shape(weight_shape, groups)
    flipped = to_canonical(grouped.transpose(1, 2).reshape(shape).flip(-1, -2))
    order = flipped[flipped >= 0]
    return torch.cat([pack_mask(from_canonical(flipped >= 0, shape)).flatten(), order])
