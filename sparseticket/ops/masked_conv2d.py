from __future__ import annotations

import torch
import torch.nn.functional as F

from sparseticket.formats import canonical_shape
from sparseticket.reference import masked_conv2d as _reference

from ._dispatch import C, Choice, cap, check_words, define, nthreads
from .apply_mask import apply_mask
from .conv2d_taps import output_size
from .mask_ops import mask_ops
from .masked_linear import check_shadow, dense_choice

__all__ = [
    "FUSED_DENSITY",
    "check_conv",
    "conv_backward",
    "conv_channels_last",
    "conv_choice",
    "conv_empty",
    "dense_conv",
    "fused_conv",
    "masked_conv2d",
    "strictly_channels_last",
]

# Up to this density, walking the live taps beats a dense conv on W*mask; up to that one where the
# images of a call have few pixels to share the decoding of the mask. From crossover rows.
FUSED_DENSITY = 0.15
FEW_PIXELS, FEW_DENSITY = 128, 0.1


def conv_choice(op, x, weight_shape, words, fused_weights=True) -> Choice:
    """Fused or materialised, by the static table. ``x``: ``[N, C, H, W]`` or ``[C, H, W]``."""
    if not fused_weights:
        return Choice(op, "materialised", "only signed_constant weights are decoded in the kernel")
    if x.dtype != torch.float32:
        return Choice(op, "materialised", f"the fused kernel takes no {x.dtype}")
    rows, k = canonical_shape(weight_shape)
    density = int(mask_ops(words, None, "popcount")) / max(rows * k, 1)
    pixels = x.numel() // max(x.shape[-3], 1)
    most = FEW_DENSITY if pixels < FEW_PIXELS else FUSED_DENSITY
    if density > most:
        reason = f"density {density:.3f} > {most} at {pixels} pixels: dense conv"
        return Choice(op, "materialised", reason)
    return Choice(op, f"fused {C.isa()}", f"density {density:.3f} <= {most} at {pixels} pixels")


def check_conv(op, x, weight_shape, words, bias, stride, padding, dilation, groups):
    """Raise for what a conv op cannot take."""
    if len(weight_shape) != 4:
        raise ValueError(f"{op}: weight: got {tuple(weight_shape)}, need [O, C/groups, kh, kw]")
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(f"{op}: groups: got {groups}, need a divisor of {weight_shape[0]} outputs")
    if x.ndim not in (3, 4) or x.shape[-3] != weight_shape[1] * groups:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)}, need [N, C, H, W] or [C, H, W] with "
            f"C = {weight_shape[1] * groups}"
        )
    if 0 in x.shape[-3:] or 0 in tuple(weight_shape):
        raise ValueError(
            f"{op}: x, weight: got {tuple(x.shape)}, {tuple(weight_shape)}; only the batch may be 0"
        )
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x: got {x.dtype}, need a floating-point dtype")
    check_words(op, words, *canonical_shape(weight_shape))
    if bias is not None and (tuple(bias.shape) != (weight_shape[0],) or bias.dtype != x.dtype):
        raise ValueError(
            f"{op}: bias: got {bias.dtype} {tuple(bias.shape)}, need {x.dtype} ({weight_shape[0]},)"
        )
    for name, pair, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op}: {name}: got {tuple(pair)}, need two integers >= {least}")
    size = output_size(x.shape[-2:], weight_shape, stride, padding, dilation)
    if min(size) <= 0:
        raise ValueError(
            f"{op}: x: got shape {tuple(x.shape)}, smaller than the kernel of "
            f"{tuple(weight_shape)}, padding {tuple(padding)}, dilation {tuple(dilation)}"
        )


def strictly_channels_last(tensor) -> bool:
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def conv_channels_last(x, weight) -> bool:
    """Whether a conv of these gives a channels-last output; ``weight``: or its like."""
    return strictly_channels_last(x) or (x.ndim == 4 and strictly_channels_last(weight))


def conv_empty(x, weight_shape, stride, padding, dilation, channels_last):
    """Uninitialised conv2d output, channels-last if so asked."""
    high, wide = output_size(x.shape[-2:], weight_shape, stride, padding, dilation)
    channels = weight_shape[0]
    size = (*x.shape[:-3], channels, high, wide)
    # where both layouts are one, torch keeps the strides of the usual one
    if not channels_last or channels == 1 or high * wide == 1 or 0 in size:
        return x.new_empty(size)
    return x.new_empty(size[0], high, wide, channels).permute(0, 3, 1, 2)


def dense_conv(x, weight, bias, stride, padding, dilation, groups):
    """torch's conv2d with the output's memory format pinned to what Meta promises."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=_format(conv_channels_last(x, weight)))


def fused_conv(kernel, x, weight_shape, bias, stride, padding, dilation, groups, channels_last):
    """Run ``kernel(x4d, bias or None, y4d, geometry)`` on contiguous NCHW input."""
    y = conv_empty(x, weight_shape, stride, padding, dilation, False)
    x4d = x.unsqueeze(0) if x.ndim == 3 else x
    y4d = y.unsqueeze(0) if x.ndim == 3 else y
    geometry = (*weight_shape[2:], *stride, *padding, *dilation, groups)
    kernel(
        cap(x4d.contiguous()), None if bias is None else cap(bias.contiguous()), cap(y4d), geometry
    )
    return y.contiguous(memory_format=_format(channels_last))


def conv_backward(grad, x, weight, bias_sizes, stride, padding, dilation, groups, needs):
    """(x, weight, bias) gradients of a dense conv2d, None where ``needs`` is False."""
    batched = x.ndim == 4
    if not batched:
        grad, x = grad.unsqueeze(0), x.unsqueeze(0)
    gx, gw, gb = torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, needs
    )
    return gx if batched or gx is None else gx.squeeze(0), gw, gb


def _format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def _check(x, weight, words, bias, *geometry, shadow):
    if shadow is None and weight.dtype != x.dtype:
        raise TypeError(f"masked_conv2d: weight: got {weight.dtype}, need x's dtype {x.dtype}")
    check_conv("masked_conv2d", x, weight.shape, words, bias, *geometry)
    check_shadow("masked_conv2d", shadow, x, weight)


def _choose(
    x, weight, words, bias, stride, padding, dilation, groups, dense_grad=False, shadow=None
):
    if shadow is not None:
        return Choice("masked_conv2d", "shadow", "the masked weight is at hand: dense conv on it")
    return conv_choice("masked_conv2d", x, weight.shape, words)


def _choose_cuda(
    x, weight, words, bias, stride, padding, dilation, groups, dense_grad=False, shadow=None
):
    return dense_choice("masked_conv2d", "conv", shadow)


def _cpu(x, weight, words, bias, stride, padding, dilation, groups, dense_grad=False, shadow=None):
    _check(x, weight, words, bias, stride, padding, dilation, groups, shadow=shadow)
    if shadow is not None:
        return dense_conv(x, shadow, bias, stride, padding, dilation, groups)
    if conv_choice("masked_conv2d", x, weight.shape, words).kernel == "materialised":
        masked = apply_mask(weight, words)
        return dense_conv(x, masked, bias, stride, padding, dilation, groups)
    w, m = weight.contiguous(), words.contiguous()
    return fused_conv(
        lambda x, b, y, geometry: C.masked_conv2d(x, cap(w), cap(m), b, y, geometry, nthreads()),
        x,
        weight.shape,
        bias,
        stride,
        padding,
        dilation,
        groups,
        conv_channels_last(x, weight),
    )


def _cuda(x, weight, words, bias, stride, padding, dilation, groups, dense_grad=False, shadow=None):
    masked = apply_mask(weight, words) if shadow is None else shadow
    return dense_conv(x, masked, bias, stride, padding, dilation, groups)


def _meta(x, weight, words, bias, stride, padding, dilation, groups, dense_grad=False, shadow=None):
    _check(x, weight, words, bias, stride, padding, dilation, groups, shadow=shadow)
    last = conv_channels_last(x, weight)
    return conv_empty(x, weight.shape, stride, padding, dilation, last)


def _setup(ctx, inputs, output):
    x, weight, words, bias, *ctx.geometry, ctx.dense_grad, shadow = inputs
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.save_for_backward(x, weight, words, shadow)


def _backward(ctx, grad):
    x, weight, words, shadow = ctx.saved_tensors
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    gx, gw, gb = conv_backward(
        grad,
        x,
        apply_mask(weight, words) if shadow is None else shadow,
        ctx.bias_sizes,
        *ctx.geometry,
        [need_x, need_weight, need_bias],
    )
    if need_weight:
        gw = gw.to(weight.dtype) if ctx.dense_grad else apply_mask(gw, words, weight.dtype)
    return gx, gw, None, gb, None, None, None, None, None, None


masked_conv2d = define(
    "masked_conv2d(Tensor x, Tensor weight, Tensor words, Tensor? bias, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation, SymInt groups, bool dense_grad=False,"
    " Tensor? shadow=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.masked_conv2d,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
