from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape
from sparseticket.reference import sparse_conv2d as _reference

from ._dispatch import C, Choice, cap, define, nthreads
from .conv2d_flip import conv2d_flip, flipped_shape, split_flip
from .conv2d_taps import conv2d_taps
from .mask_ops import mask_ops
from .masked_conv2d import (
    check_conv,
    conv_backward,
    conv_empty,
    dense_conv,
    fused_conv,
    strictly_channels_last,
)
from .scatter_live import scatter_live
from .sparse_conv2d_dw import sparse_conv2d_dw

__all__ = ["conv2d_input_grad", "sparse_conv2d"]

# Up to this density the kernel beats a dense conv on the materialised weight; from the crossover
# rows of bench/results.
SPARSE_DENSITY = 0.3


def _check(x, values, words, bias, weight_shape, geometry, taps, flip):
    check_conv("sparse_conv2d", x, weight_shape, words, bias, *geometry)
    if values.ndim != 1 or values.dtype != x.dtype:
        raise ValueError(
            f"sparse_conv2d: values: got {values.dtype} {tuple(values.shape)}, need x's dtype "
            f"{x.dtype} and one dimension, a value for every live weight"
        )
    if taps is not None and (taps.dtype != torch.int32 or taps.ndim != 1):
        raise ValueError(
            f"sparse_conv2d: taps: got {taps.dtype} {tuple(taps.shape)}, need conv2d_taps' int32"
        )
    if flip is not None and (flip.dtype != torch.int32 or flip.ndim != 1):
        raise ValueError(
            f"sparse_conv2d: flip: got {flip.dtype} {tuple(flip.shape)}, need conv2d_flip's int32"
        )


def _check_count(values, words):
    live = int(mask_ops(words, None, "popcount"))
    if values.numel() != live:
        raise ValueError(
            f"sparse_conv2d: values: got {values.numel()}, the mask has {live} live weights"
        )


def _choose(x, values, words, bias, weight_shape, stride, padding, dilation, groups, *rest):
    if x.dtype != torch.float32:
        return Choice("sparse_conv2d", "materialised", f"the sparse kernel takes no {x.dtype}")
    rows, k = canonical_shape(weight_shape)
    density = values.numel() / max(rows * k, 1)
    if density > SPARSE_DENSITY:
        reason = f"density {density:.3f} > {SPARSE_DENSITY}: dense conv"
        return Choice("sparse_conv2d", "materialised", reason)
    return Choice("sparse_conv2d", f"sparse {C.isa()}", f"density {density:.3f}")


def _cpu(
    x,
    values,
    words,
    bias,
    weight_shape,
    stride,
    padding,
    dilation,
    groups,
    taps=None,
    flip=None,
    code=0,
):
    geometry = (stride, padding, dilation, groups)
    _check(x, values, words, bias, weight_shape, geometry, taps, flip)
    last = strictly_channels_last(x)
    if taps is None:  # taps know their number
        _check_count(values, words)
    if _choose(x, values, words, bias, weight_shape, *geometry).kernel == "materialised":
        y = dense_conv(x, scatter_live(values, words, weight_shape), bias, *geometry)
        return y.contiguous(memory_format=torch.channels_last) if last else y.contiguous()
    if taps is None:
        taps = conv2d_taps(words, weight_shape, x.shape[-2:], *geometry)
    v, t = values.contiguous(), taps.contiguous()
    return fused_conv(
        lambda x, b, y, flat: C.sparse_conv2d(x, cap(v), cap(t), b, y, flat, nthreads()),
        x,
        weight_shape,
        bias,
        *geometry,
        last,
    )


def _meta(
    x,
    values,
    words,
    bias,
    weight_shape,
    stride,
    padding,
    dilation,
    groups,
    taps=None,
    flip=None,
    code=0,
):
    geometry = (stride, padding, dilation, groups)
    _check(x, values, words, bias, weight_shape, geometry, taps, flip)
    return conv_empty(x, weight_shape, stride, padding, dilation, strictly_channels_last(x))


def _setup(ctx, inputs, output):
    x, values, words, _, *ctx.geometry = inputs[:9]
    ctx.save_for_backward(x, values, words, inputs[10])


def conv2d_input_grad(
    grad, x, values, words, weight_shape, stride, padding, dilation, groups, flip=None
):
    """Gradient of a conv's input: a sparse conv of ``grad`` with the flipped, transposed pattern
    where strides and padding allow, dense otherwise. Of ``x`` only the shape is read."""
    turned = [d * (k - 1) - p for d, k, p in zip(dilation, weight_shape[2:], padding, strict=True)]
    if max(stride) > 1 or min(turned) < 0 or grad.numel() == 0:
        weight = scatter_live(values, words, weight_shape)
        geometry = (stride, padding, dilation, groups)
        like = grad.new_empty(1).expand(x.shape)
        return conv_backward(grad, like, weight, None, *geometry, [True, False, False])[0]
    if flip is None:
        flip = conv2d_flip(words, weight_shape, groups, values.numel())
    flip_words, order = split_flip(flip, weight_shape, groups)
    shape = flipped_shape(weight_shape, groups)
    return torch.ops.sparseticket.sparse_conv2d(
        grad, values[order], flip_words, None, shape, (1, 1), turned, dilation, groups
    )


def _backward(ctx, grad):
    x, values, words, flip = ctx.saved_tensors
    need_x, need_values, _, need_bias, *_ = ctx.needs_input_grad
    gx = gv = gb = None
    if need_x:
        gx = conv2d_input_grad(grad, x, values, words, *ctx.geometry, flip)
    if need_values:
        gv = sparse_conv2d_dw(x, grad, words, values.numel(), *ctx.geometry)
    if need_bias:
        gb = grad.sum((-1, -2) if grad.ndim == 3 else (0, -1, -2))
    return gx, gv, None, gb, *[None] * 8


sparse_conv2d = define(
    "sparse_conv2d(Tensor x, Tensor values, Tensor words, Tensor? bias, SymInt[] weight_shape,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, Tensor? taps=None,"
    " Tensor? flip=None, int code=0) -> Tensor",
    cpu=_cpu,
    reference=_reference.sparse_conv2d,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
)
