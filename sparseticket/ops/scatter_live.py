from __future__ import annotations

from sparseticket.formats import canonical_shape, channels_and_taps
from sparseticket.reference import scatter_live as _reference

from ._dispatch import C, cap, check_words, define, nthreads
from .gather_live import gather_live

__all__ = ["check_values", "scatter_live"]


def check_values(op, values, rows, k):
    if values.ndim != 1:
        raise ValueError(f"{op}: values: got shape {tuple(values.shape)}, need one dimension")
    if values.numel() > rows * k:
        raise ValueError(f"{op}: values: got {values.numel()} for a weight of {rows * k} elements")


def _check(values, words, shape):
    check_words("scatter_live", words, *canonical_shape(shape))
    check_values("scatter_live", values, *canonical_shape(shape))
    if values.element_size() not in (2, 4, 8):
        raise TypeError(f"scatter_live: values: got {values.dtype}, need 2-, 4- or 8-byte elements")


def _cpu(values, words, shape):
    _check(values, words, shape)
    dense = values.new_empty(shape)
    layout = (words.shape[0], *channels_and_taps(shape))
    C.scatter_live(
        cap(values.contiguous()), cap(words.contiguous()), cap(dense), *layout, nthreads()
    )
    return dense


def _meta(values, words, shape):
    _check(values, words, shape)
    return values.new_empty(shape)


def _setup(ctx, inputs, output):
    ctx.kept = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    return gather_live(grad, ctx.saved_tensors[0], ctx.kept), None, None


scatter_live = define(
    "scatter_live(Tensor values, Tensor words, SymInt[] shape) -> Tensor",
    cpu=_cpu,
    reference=_reference.scatter_live,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
)
