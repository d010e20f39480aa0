"""The canonical [O, K] matrix form of a weight and the shape of its packed words.

O is dimension 0; K runs over (spatial..., dimension 1), i.e. channels-last order. Linear weights
are their own canonical form; tensors of at most one dimension have O = 1. Packed masks are int32
words ``[O, 2*ceil(K/64)]``, LSB first, padding bits 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["canonical_shape", "channels_and_taps", "from_canonical", "to_canonical", "words_shape"]


def canonical_shape(shape: Sequence[int]) -> tuple[int, int]:
    """``(O, K)`` of a weight of this shape."""
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def channels_and_taps(shape: Sequence[int]) -> tuple[int, int]:
    """``(C, S)`` with K = S*C: channels (dimension 1) and spatial taps of a weight."""
    if len(shape) <= 2 or 0 in shape[1:]:
        return canonical_shape(shape)[1], 1
    return shape[1], math.prod(shape[2:])


def words_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the packed words of a weight of this shape."""
    rows, k = canonical_shape(shape)
    return rows, 2 * ((k + 63) // 64)


def to_canonical(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as ``[O, K]``; a view where strides allow (channels-last convolutions do)."""
    rows, k = canonical_shape(tensor.shape)
    if tensor.ndim > 2:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(rows, k)


def from_canonical(matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of :func:`to_canonical`: a view of ``matrix`` in ``shape`` (channels-last)."""
    if len(shape) <= 2:
        return matrix.reshape(tuple(shape))
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
