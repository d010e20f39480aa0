from __future__ import annotations

import torch.nn.functional as F

from sparseticket import prng
from sparseticket.reference import ticket_linear as _reference

from ._dispatch import C, cap, check_words, define, nthreads
from .masked_linear import check_linear, fused_linear, grad_bias, is_fused, linear_choice
from .regenerate import check_recipe, regenerate

__all__ = ["ticket_kernel", "ticket_linear"]


def ticket_kernel(words, signs, seed, layer, sigma):
    """The fused kernel for signed-constant weights as ``kernel(x2d, bias or None, y2d)``."""
    key, high = prng.stream_key(seed, layer, "sign")

    def kernel(x, bias, y):
        planes = None if signs is None else cap(signs)
        C.ticket_linear(x, cap(words), planes, bias, y, sigma, key, high, nthreads())

    return kernel


def _weight(x, words, seed, layer, dist, sigma):
    return regenerate(
        seed,
        layer,
        (words.shape[0], x.shape[-1]),
        dist,
        sigma,
        dtype=x.dtype,
        device=x.device,
        words=words,
    )


def _choose(x, words, bias, seed, layer, dist, sigma, signs=None):
    return linear_choice("ticket_linear", x, "seed", dist)


def _check(x, words, bias, seed, dist, signs):
    check_recipe("ticket_linear", seed, dist)
    check_linear("ticket_linear", x, words.shape[0], x.shape[-1] if x.ndim else 0, words, bias)
    if signs is not None:
        check_words("ticket_linear", signs, words.shape[0], x.shape[-1], name="signs")


def _cpu(x, words, bias, seed, layer, dist, sigma, signs=None):
    _check(x, words, bias, seed, dist, signs)
    if not is_fused(x, "seed", dist):
        return F.linear(x, _weight(x, words, seed, layer, dist, sigma), bias)
    signs = None if signs is None else signs.contiguous()
    kernel = ticket_kernel(words.contiguous(), signs, seed, layer, sigma)
    return fused_linear(kernel, x, words.shape[0], bias)


def _meta(x, words, bias, seed, layer, dist, sigma, signs=None):
    _check(x, words, bias, seed, dist, signs)
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _setup(ctx, inputs, output):
    x, words, _, *ctx.recipe, _ = inputs
    ctx.like = x.new_empty(0, x.shape[-1])  # dtype, device and K without keeping x
    ctx.save_for_backward(words)


def _backward(ctx, grad):
    (words,) = ctx.saved_tensors
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    gx = grad @ _weight(ctx.like, words, *ctx.recipe) if need_x else None
    return gx, None, grad_bias(grad) if need_bias else None, None, None, None, None, None


ticket_linear = define(
    "ticket_linear(Tensor x, Tensor words, Tensor? bias, int seed, int layer, str dist,"
    " float sigma, Tensor? signs=None) -> Tensor",
    cpu=_cpu,
    reference=_reference.ticket_linear,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
)
