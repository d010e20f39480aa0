from __future__ import annotations

from sparseticket import prng
from sparseticket.reference import ticket_conv2d as _reference

from ._dispatch import C, cap, check_words, define, nthreads
from .masked_conv2d import (
    check_conv,
    conv_backward,
    conv_choice,
    conv_empty,
    dense_conv,
    fused_conv,
    strictly_channels_last,
)
from .regenerate import check_recipe, regenerate

__all__ = ["ticket_conv2d", "ticket_conv_kernel"]


def ticket_conv_kernel(words, signs, seed, layer, sigma):
    """The fused signed-constant kernel as ``kernel(x4d, bias or None, y4d, geometry)``."""
    key, high = prng.stream_key(seed, layer, "sign")

    def kernel(x, bias, y, geometry):
        planes = None if signs is None else cap(signs)
        C.ticket_conv2d(x, cap(words), planes, bias, y, geometry, sigma, key, high, nthreads())

    return kernel


def _weight(like, channels_last, words, seed, layer, dist, sigma, weight_shape):
    return regenerate(
        seed,
        layer,
        weight_shape,
        dist,
        sigma,
        dtype=like.dtype,
        device=like.device,
        words=words,
        channels_last=channels_last,
    )


def _check(x, words, bias, seed, dist, weight_shape, geometry, signs):
    check_recipe("ticket_conv2d", seed, dist)
    check_conv("ticket_conv2d", x, weight_shape, words, bias, *geometry)
    if signs is not None:
        check_words("ticket_conv2d", signs, words.shape[0], words.shape[1] * 32, name="signs")


def _choose(x, words, bias, seed, layer, dist, sigma, weight_shape, *rest):
    return conv_choice("ticket_conv2d", x, weight_shape, words, dist == "signed_constant")


def _cpu(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    weight_shape,
    stride,
    padding,
    dilation,
    groups,
    signs=None,
):
    geometry = (stride, padding, dilation, groups)
    _check(x, words, bias, seed, dist, weight_shape, geometry, signs)
    if _choose(x, words, bias, seed, layer, dist, sigma, weight_shape).kernel == "materialised":
        last = strictly_channels_last(x)
        weight = _weight(x, last, words, seed, layer, dist, sigma, weight_shape)
        return dense_conv(x, weight, bias, *geometry)
    signs = None if signs is None else signs.contiguous()
    kernel = ticket_conv_kernel(words.contiguous(), signs, seed, layer, sigma)
    last = strictly_channels_last(x)
    return fused_conv(kernel, x, weight_shape, bias, *geometry, last)


def _meta(
    x,
    words,
    bias,
    seed,
    layer,
    dist,
    sigma,
    weight_shape,
    stride,
    padding,
    dilation,
    groups,
    signs=None,
):
    geometry = (stride, padding, dilation, groups)
    _check(x, words, bias, seed, dist, weight_shape, geometry, signs)
    return conv_empty(x, weight_shape, stride, padding, dilation, strictly_channels_last(x))


def _setup(ctx, inputs, output):
    x, words, bias, *ctx.recipe = inputs[:8]
    ctx.geometry = inputs[8:12]
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.shape, ctx.channels_last = x.shape, strictly_channels_last(x)
    ctx.save_for_backward(words)


def _backward(ctx, grad):
    (words,) = ctx.saved_tensors
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    weight = _weight(grad, ctx.channels_last, words, *ctx.recipe)
    needs = [need_x, False, need_bias]
    like = grad.new_empty(1).expand(ctx.shape)  # its shape is read, its values are not
    gx, _, gb = conv_backward(grad, like, weight, ctx.bias_sizes, *ctx.geometry, needs)
    return gx, None, gb, *[None] * 10


ticket_conv2d = define(
    "ticket_conv2d(Tensor x, Tensor words, Tensor? bias, int seed, int layer, str dist,"
    " float sigma, SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups, Tensor? signs=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.ticket_conv2d,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
)
