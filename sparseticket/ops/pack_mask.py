from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape, channels_and_taps, words_shape
from sparseticket.reference import pack_mask as _reference

from ._dispatch import C, cap, define, nthreads

__all__ = ["pack_mask"]


def _cpu(mask):
    _check(mask)
    words = mask.new_empty(words_shape(mask.shape), dtype=torch.int32)
    rows, layout = canonical_shape(mask.shape)[0], channels_and_taps(mask.shape)
    C.pack_mask(cap(mask.contiguous()), cap(words), rows, *layout, nthreads())
    return words


def _cuda(mask):
    from sparseticket.kernels.pack_mask import pack_mask as launch

    words = mask.new_empty(words_shape(mask.shape), dtype=torch.int32)
    rows, layout = canonical_shape(mask.shape)[0], channels_and_taps(mask.shape)
    launch(mask.contiguous(), words, rows, *layout)
    return words


def _meta(mask):
    _check(mask)
    return mask.new_empty(words_shape(mask.shape), dtype=torch.int32)


def _check(mask):
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_mask: mask: got {mask.dtype}, need torch.bool")


pack_mask = define(
    "pack_mask(Tensor mask) -> Tensor",
    cpu=_cpu,
    reference=_reference.pack_mask,
    meta=_meta,
    cuda=_cuda,
)
