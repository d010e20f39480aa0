from __future__ import annotations

import math

from sparseticket.formats import canonical_shape, words_shape
from sparseticket.reference import conv2d_flip as _reference
from sparseticket.reference.conv2d_flip import flipped_shape

from ._dispatch import check_words, define
from .mask_ops import mask_ops

__all__ = ["conv2d_flip", "flipped_shape", "split_flip"]


def _words_size(weight_shape, groups):
    return math.prod(words_shape(flipped_shape(weight_shape, groups)))


def split_flip(flip, weight_shape, groups):
    """``(mask words, order)`` of what conv2d_flip gave."""
    size = _words_size(weight_shape, groups)
    return flip[:size].view(words_shape(flipped_shape(weight_shape, groups))), flip[size:]


def _meta(words, weight_shape, groups, live):
    check_words("conv2d_flip", words, *canonical_shape(weight_shape))
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(
            f"conv2d_flip: groups: got {groups}, need a divisor of {weight_shape[0]} outputs"
        )
    return words.new_empty(_words_size(weight_shape, groups) + live)


def _cpu(words, weight_shape, groups, live):
    _meta(words, weight_shape, groups, live)
    count = int(mask_ops(words, None, "popcount"))
    if count != live:
        raise ValueError(f"conv2d_flip: live: got {live}, the mask has {count}")
    return _reference.conv2d_flip(words, weight_shape, groups, live)


conv2d_flip = define(
    "conv2d_flip(Tensor words, SymInt[] weight_shape, SymInt groups, SymInt live) -> Tensor",
    cpu=_cpu,
    reference=_reference.conv2d_flip,
    meta=_meta,
)
