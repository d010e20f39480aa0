from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape, channels_and_taps
from sparseticket.reference import gather_live as _reference

from ._dispatch import C, cap, check_words, define, nthreads

__all__ = ["gather_live"]


def _check(dense, words, kept):
    if dense.element_size() not in (2, 4, 8):
        raise TypeError(f"gather_live: dense: got {dense.dtype}, need 2-, 4- or 8-byte elements")
    check_words("gather_live", words, *canonical_shape(dense.shape))
    if kept < 0:
        raise ValueError(f"gather_live: kept: got {kept}, need the number of live weights")


def _cpu(dense, words, kept):
    _check(dense, words, kept)
    values = dense.new_empty(kept)
    layout = (words.shape[0], *channels_and_taps(dense.shape))
    C.gather_live(
        cap(dense.contiguous()), cap(words.contiguous()), cap(values), *layout, nthreads()
    )
    return values


def _meta(dense, words, kept):
    _check(dense, words, kept)
    return dense.new_empty(kept)


def _setup(ctx, inputs, output):
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    scatter_live = torch.ops.sparseticket.scatter_live  # each is the other's backward
    return scatter_live(grad, ctx.saved_tensors[0], ctx.shape), None, None


gather_live = define(
    "gather_live(Tensor dense, Tensor words, SymInt kept) -> Tensor",
    cpu=_cpu,
    reference=_reference.gather_live,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
)
