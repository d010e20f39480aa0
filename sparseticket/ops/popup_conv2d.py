from __future__ import annotations

from sparseticket.reference import popup_conv2d as _reference

from ._dispatch import C, Choice, cap, define, nthreads
from .masked_conv2d import (
    check_conv,
    conv_backward,
    conv_channels_last,
    conv_choice,
    conv_empty,
    dense_conv,
    fused_conv,
)
from .popup_linear import check_frozen, frozen_weight, score_grads
from .ticket_conv2d import ticket_conv_kernel

__all__ = ["popup_conv2d"]


def _check(x, weight, scores, words, bias, transform, seed, *geometry):
    check_frozen("popup_conv2d", x, weight, scores, transform, seed)
    check_conv("popup_conv2d", x, scores.shape, words, bias, *geometry)


def _choose(x, weight, scores, words, *rest):
    return conv_choice("popup_conv2d", x, scores.shape, words)


def _cpu(
    x,
    weight,
    scores,
    words,
    bias,
    transform,
    seed,
    layer,
    sigma,
    stride,
    padding,
    dilation,
    groups,
    raw_grad=False,
):
    geometry = (stride, padding, dilation, groups)
    _check(x, weight, scores, words, bias, transform, seed, *geometry)
    if conv_choice("popup_conv2d", x, scores.shape, words).kernel == "materialised":
        dense = frozen_weight(x, weight, scores, words, seed, layer, sigma)
        return dense_conv(x, dense, bias, *geometry)
    m = words.contiguous()
    if weight is None:
        kernel = ticket_conv_kernel(m, None, seed, layer, sigma)
    else:
        w = weight.contiguous()

        def kernel(x, b, y, geometry):
            C.masked_conv2d(x, cap(w), cap(m), b, y, geometry, nthreads())

    last = conv_channels_last(x, scores if weight is None else weight)
    return fused_conv(kernel, x, scores.shape, bias, *geometry, last)


def _choose_cuda(x, weight, *rest) -> Choice:
    source = "regenerated" if weight is None else "masked"
    return Choice("popup_conv2d", "materialised", f"cuDNN on W*mask, {source} in one launch")


def _cuda(
    x,
    weight,
    scores,
    words,
    bias,
    transform,
    seed,
    layer,
    sigma,
    stride,
    padding,
    dilation,
    groups,
    raw_grad=False,
):
    dense = frozen_weight(x, weight, scores, words, seed, layer, sigma)
    return dense_conv(x, dense, bias, stride, padding, dilation, groups)


def _meta(
    x,
    weight,
    scores,
    words,
    bias,
    transform,
    seed,
    layer,
    sigma,
    stride,
    padding,
    dilation,
    groups,
    raw_grad=False,
):
    _check(x, weight, scores, words, bias, transform, seed, stride, padding, dilation, groups)
    last = conv_channels_last(x, scores if weight is None else weight)
    return conv_empty(x, scores.shape, stride, padding, dilation, last)


def _setup(ctx, inputs, output):
    x, weight, scores, words, bias, ctx.transform, *ctx.recipe = inputs[:9]
    ctx.geometry, ctx.raw_grad = inputs[9:13], inputs[13]
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.save_for_backward(x, weight, scores, words)


def _backward(ctx, grad):
    x, weight, scores, words = ctx.saved_tensors
    need_x, need_weight, need_scores, _, need_bias, *_ = ctx.needs_input_grad
    needs = [need_x, need_weight or need_scores, need_bias]
    masked = frozen_weight(x, weight, scores, words, *ctx.recipe)
    gx, dense_grad, gb = conv_backward(grad, x, masked, ctx.bias_sizes, *ctx.geometry, needs)
    gw = gs = None
    if needs[1]:
        gw, gs = score_grads(ctx, dense_grad, x, weight, scores, words)
    return gx, gw, gs, None, gb, *[None] * 9


popup_conv2d = define(
    "popup_conv2d(Tensor x, Tensor? weight, Tensor scores, Tensor words, Tensor? bias,"
    " str transform, int seed, int layer, float sigma, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups, bool raw_grad=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.popup_conv2d,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
