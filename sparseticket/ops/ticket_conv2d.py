from __future__ import annotations

import math

import torch

from sparseticket import prng
from sparseticket.reference import ticket_conv2d as _reference

from ._dispatch import C, Choice, cap, check_words, define, nthreads
from .conv2d_taps import output_size
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
from .ticket_linear import as_stored, ticket_linear_cuda
from .ticket_linear import cuda_choice as linear_choice

__all__ = ["ticket_conv2d", "ticket_conv_kernel"]

# On a GPU: output pixels of a call up to which decoding in the kernel beats writing W*mask first
# and reading it again; computed, not measured yet.
GPU_PIXELS = 1024


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


def cuda_choice(x, dist, weight_shape, stride, padding, dilation, groups) -> Choice:
    """Which kernel runs on a GPU, and why. Computed, not measured yet."""
    op = "ticket_conv2d"
    _, channels, *size = weight_shape
    point = tuple(size) == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    if dist != "signed_constant":
        return Choice(op, "materialised", f"only signed_constant is decoded in the kernel: {dist}")
    if groups != 1 or not strictly_channels_last(x):
        return Choice(op, "materialised", "the Triton kernels take channels-last x and no groups")
    if point:
        flat = x.movedim(1, -1).flatten(0, -2)
        return linear_choice(op, flat, dist)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return Choice(op, "materialised", f"{x.dtype}: cuDNN on W*mask")
    if channels % 64:
        return Choice(op, "materialised", f"{channels} channels: the kernel takes multiples of 64")
    pixels = x.shape[0] * math.prod(
        output_size(x.shape[-2:], weight_shape, stride, padding, dilation)
    )
    if pixels > GPU_PIXELS:
        return Choice(op, "materialised", f"{pixels} pixels > {GPU_PIXELS}: cuDNN on W*mask")
    from sparseticket.kernels.tuning import tuned

    reason = f"{pixels} pixels: weights decoded in the kernel; {tuned(op, pixels, x.device)}"
    return Choice(op, "Triton implicit GEMM", reason)


def _choose_cuda(x, words, bias, seed, layer, dist, sigma, weight_shape, *rest) -> Choice:
    return cuda_choice(x, dist, weight_shape, *rest[:4])


def _cuda(
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
    kernel = cuda_choice(x, dist, weight_shape, *geometry).kernel
    if kernel == "materialised":
        last = strictly_channels_last(x)
        weight = _weight(x, last, words, seed, layer, dist, sigma, weight_shape)
        return dense_conv(x, weight, bias, *geometry)
    recipe = (seed, layer, sigma)
    if kernel != "Triton implicit GEMM":  # 1x1: every pixel is a row
        y = ticket_linear_cuda(x.movedim(1, -1), words, signs, bias, *recipe, weight_shape[0])
        return y.movedim(-1, 1)
    return _implicit_gemm(x, words, signs, bias, *recipe, weight_shape, *geometry[:3])


def _implicit_gemm(x, words, signs, bias, seed, layer, sigma, weight_shape, *geometry):
    from sparseticket.kernels.ticket_conv2d import ticket_conv2d as launch

    y = conv_empty(x, weight_shape, *geometry, True)
    words, signs, bias = (None if t is None else t.contiguous() for t in (words, signs, bias))
    launch(
        x.movedim(1, -1),
        words,
        signs,
        bias,
        y.movedim(1, -1),
        tuple(weight_shape[2:]),
        *(tuple(pair) for pair in geometry),
        as_stored(sigma, x.dtype),
        *prng.stream_key(seed, layer, "sign"),
    )
    return y


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
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
