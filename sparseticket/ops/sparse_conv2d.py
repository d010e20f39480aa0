from __future__ import annotations

import math

import torch

from sparseticket.formats import canonical_shape
from sparseticket.reference import sparse_conv2d as _reference

from ._dispatch import C, Choice, cap, define, nthreads
from .conv2d_flip import conv2d_flip, flipped_shape, split_flip
from .conv2d_taps import conv2d_taps, output_size
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
from .sparse_conv2d_dw import narrow_groups, sparse_conv2d_dw

__all__ = ["compile_conv2d", "conv2d_input_grad", "release_code", "sparse_conv2d"]

# Up to this density the kernel beats a dense conv on the materialised weight; from the crossover
# rows of bench/results.
SPARSE_DENSITY = 0.3
# From so many outputs a group and pixels a call on, machine code beats the portable kernel.
_CODE_OUTPUTS, _CODE_PIXELS = 8, 128


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


def compile_conv2d(words, weight_shape, image, stride, padding, dilation, groups, batch=0) -> int:
    """Handle of the mask's machine code for images of ``[H, W]``: to be passed as ``code``, in the
    end given back to :func:`release_code`.

    0, none: without AVX-512, with SPARSETICKET_JIT=0, where too few outputs share an input, and
    where ``batch`` images would run it for too few pixels to pay for its way into the caches.
    """
    size = output_size(image, weight_shape, stride, padding, dilation)
    if weight_shape[0] // groups < _CODE_OUTPUTS or 0 < batch * math.prod(size) < _CODE_PIXELS:
        return 0
    x = (1, weight_shape[1] * groups, *image)
    y = (1, weight_shape[0], *size)
    geometry = (*weight_shape[2:], *stride, *padding, *dilation, groups)
    return C.compile_conv(cap(words.contiguous()), x, y, geometry)


def release_code(code: int) -> None:
    """Free machine code once no call uses it; 0 and unknown handles are ignored."""
    C.release_code(code)


def _choose(
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
    if x.dtype != torch.float32:
        return Choice("sparse_conv2d", "materialised", f"the sparse kernel takes no {x.dtype}")
    if reason := narrow_groups(weight_shape, groups):
        return Choice("sparse_conv2d", "materialised", reason)
    rows, k = canonical_shape(weight_shape)
    density = values.numel() / max(rows * k, 1)
    if density > SPARSE_DENSITY:
        reason = f"density {density:.3f} > {SPARSE_DENSITY}: dense conv"
        return Choice("sparse_conv2d", "materialised", reason)
    kernel = "machine code" if code and C.isa() == "avx512" else C.isa()
    return Choice("sparse_conv2d", f"sparse {kernel}", f"density {density:.3f}")


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
    kernel = _choose(x, values, words, bias, weight_shape, *geometry, code=code).kernel
    if kernel == "materialised":
        return dense_conv(x, scatter_live(values, words, weight_shape), bias, *geometry)
    v = values.contiguous()
    if kernel == "sparse machine code":
        run, pattern = C.run_conv_code, code
    else:
        run, pattern = C.sparse_conv2d, _taps(taps, values, words, weight_shape, x, geometry)
    return fused_conv(
        lambda x, b, y, flat: run(x, cap(v), pattern, b, y, flat, nthreads()),
        x,
        weight_shape,
        bias,
        *geometry,
        last,
    )


def _taps(taps, values, words, weight_shape, x, geometry):
    if taps is None:
        _check_count(values, words)
        taps = conv2d_taps(words, weight_shape, x.shape[-2:], *geometry)
    return cap(taps.contiguous())


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
