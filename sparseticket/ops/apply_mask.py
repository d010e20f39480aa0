from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape, channels_and_taps
from sparseticket.reference import apply_mask as _reference

from ._dispatch import C, cap, check_words, define, nthreads

__all__ = ["apply_mask", "apply_mask_cpu"]


def _cpu(dense, words, dtype=None):
    _meta(dense, words, dtype)
    out = apply_mask_cpu(dense, words)
    return out if dtype is None else out.to(dtype)


def apply_mask_cpu(dense, words):
    """The op's body for checked shapes."""
    if dense.element_size() not in (2, 4, 8):
        raise TypeError(f"apply_mask: dense: got {dense.dtype}, need 2-, 4- or 8-byte elements")
    channels, taps = channels_and_taps(dense.shape)
    memory_format = _format(dense)
    out = torch.empty_like(dense, memory_format=memory_format)
    dense = dense.contiguous(memory_format=memory_format)
    if taps > 1 and memory_format == torch.channels_last:
        channels, taps = channels * taps, 1  # memory order is canonical order
    C.apply_mask(
        cap(_flat(dense)),
        cap(words.contiguous()),
        cap(_flat(out)),
        words.shape[0],
        channels,
        taps,
        nthreads(),
    )
    return out


def _cuda(dense, words, dtype=None):
    from sparseticket.kernels.apply_mask import apply_mask as launch

    if not dense.is_floating_point():
        return _reference.apply_mask(dense, words, dtype)
    channels, taps = channels_and_taps(dense.shape)
    memory_format = _format(dense)
    out = torch.empty_like(dense, dtype=dtype, memory_format=memory_format)
    if taps > 1 and memory_format == torch.channels_last:
        channels, taps = channels * taps, 1  # memory order is canonical order
    dense = dense.contiguous(memory_format=memory_format)
    launch(_flat(dense), words.contiguous(), _flat(out), channels, taps)
    return out


def _flat(tensor):
    """A contiguous tensor as it is, a channels-last one as a 1-D view in memory order."""
    if tensor.is_contiguous():
        return tensor
    return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())


def _format(tensor):
    last = tensor.ndim == 4 and not tensor.is_contiguous()
    if last and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _meta(dense, words, dtype=None):
    check_words("apply_mask", words, *canonical_shape(dense.shape))
    if dtype is not None and not (dtype.is_floating_point and dense.is_floating_point()):
        raise TypeError(f"apply_mask: dtype: got {dtype} for {dense.dtype}, need floating-point")
    return torch.empty_like(dense, dtype=dtype, memory_format=_format(dense))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad):
    return apply_mask(grad, ctx.saved_tensors[0], ctx.dtype), None, None


apply_mask = define(
    "apply_mask(Tensor dense, Tensor words, ScalarType? dtype=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.apply_mask,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    cuda=_cuda,
)
