from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape, channels_and_taps
from sparseticket.reference import unpack_mask as _reference

from ._dispatch import C, cap, check_words, define, nthreads

__all__ = ["unpack_mask"]


def _cpu(words, shape):
    rows, k = canonical_shape(shape)
    check_words("unpack_mask", words, rows, k)
    mask = words.new_empty(shape, dtype=torch.bool)
    C.unpack_mask(cap(words.contiguous()), cap(mask), rows, *channels_and_taps(shape), nthreads())
    return mask


def _cuda(words, shape):
    from sparseticket.kernels.unpack_mask import unpack_mask as launch

    mask = words.new_empty(shape, dtype=torch.bool)
    launch(words.contiguous(), mask, canonical_shape(shape)[0], *channels_and_taps(shape))
    return mask


def _meta(words, shape):
    check_words("unpack_mask", words, *canonical_shape(shape))
    return words.new_empty(shape, dtype=torch.bool)


unpack_mask = define(
    "unpack_mask(Tensor words, SymInt[] shape) -> Tensor",
    cpu=_cpu,
    reference=_reference.unpack_mask,
    meta=_meta,
    cuda=_cuda,
)
