from __future__ import annotations

from sparseticket.reference import popup_linear as _reference

from ._dispatch import Choice, define
from .apply_mask import apply_mask
from .masked_conv2d import strictly_channels_last
from .masked_linear import (
    check_linear,
    grad_bias,
    grad_weight,
    masked_linear,
    masked_linear_choice,
    masked_linear_cpu,
)
from .popup_linear_ds import popup_linear_ds
from .regenerate import check_recipe, regenerate
from .ticket_linear import cuda_choice, ticket_choice, ticket_linear, ticket_linear_cpu

__all__ = ["frozen_weight", "popup_linear", "score_grads"]

score_grad = _reference.popup_score_grad  # plain torch, differentiable by autograd


def frozen_weight(x, weight, scores, words, seed, layer, sigma):
    """The masked weight in x's dtype: from ``weight``, or regenerated and masked in one write."""
    if weight is not None:
        return apply_mask(weight, words)
    return regenerate(
        seed,
        layer,
        scores.shape,
        "signed_constant",
        sigma,
        dtype=x.dtype,
        device=x.device,
        words=words,
        channels_last=strictly_channels_last(scores),
    )


def score_grads(ctx, dense_grad, x, weight, scores, words):
    """(weight gradient or None, score gradient or None) from the dense gradient of W*mask.

    With ``ctx.raw_grad`` the scores get that gradient itself; popup_step finishes it.
    """
    _, need_weight, need_scores, *_ = ctx.needs_input_grad
    gs = None
    if need_scores and ctx.raw_grad:
        gs = dense_grad.to(scores.dtype)
    elif need_scores:
        seed, layer, sigma = ctx.recipe
        if weight is None:
            dense = regenerate(
                seed, layer, scores.shape, "signed_constant", sigma, dtype=x.dtype, device=x.device
            )
        else:
            dense = weight
        gs = score_grad(dense_grad, dense, scores, ctx.transform)
    return apply_mask(dense_grad, words) if need_weight else None, gs


def _check(x, weight, scores, words, bias, transform, seed):
    if scores.ndim != 2:
        raise ValueError(f"popup_linear: scores: got shape {tuple(scores.shape)}, need [O, K]")
    check_frozen("popup_linear", x, weight, scores, transform, seed)
    check_linear("popup_linear", x, *scores.shape, words, bias)


def check_frozen(op, x, weight, scores, transform, seed):
    if weight is None:
        check_recipe(op, seed, "signed_constant")
    if transform not in ("abs", "identity"):
        raise ValueError(f"{op}: transform: got {transform!r}, accepted: abs, identity")
    if not scores.dtype.is_floating_point:
        raise TypeError(f"{op}: scores: got {scores.dtype}, need a floating-point dtype")
    if weight is not None and (weight.shape != scores.shape or weight.dtype != x.dtype):
        raise ValueError(
            f"{op}: weight: got {weight.dtype} {tuple(weight.shape)}, need {x.dtype} "
            f"{tuple(scores.shape)} like the scores"
        )


def _choose(x, weight, scores, words, *rest) -> Choice:
    if weight is None:
        return ticket_choice(
            "popup_linear", x, scores.shape[0], "signed_constant", words, None, None
        )
    return masked_linear_choice("popup_linear", x, weight, words)


def _cpu(x, weight, scores, words, bias, transform, seed, layer, sigma, raw_grad=False):
    _check(x, weight, scores, words, bias, transform, seed)
    if weight is None:
        recipe = seed, layer, "signed_constant", sigma
        return ticket_linear_cpu(x, words, bias, *scores.shape, *recipe)
    return masked_linear_cpu(x, weight, words, bias)


def _choose_cuda(x, weight, scores, words, *rest) -> Choice:
    if weight is None:
        return cuda_choice("popup_linear", x, "signed_constant")
    return Choice("popup_linear", "masked_linear", "a dense weight: see explain of that op")


def _cuda(x, weight, scores, words, bias, transform, seed, layer, sigma, raw_grad=False):
    if weight is None:
        return ticket_linear(x, words, bias, seed, layer, "signed_constant", sigma)
    return masked_linear(x, weight, words, bias)


def _meta(x, weight, scores, words, bias, transform, seed, layer, sigma, raw_grad=False):
    _check(x, weight, scores, words, bias, transform, seed)
    return x.new_empty(*x.shape[:-1], scores.shape[0])


def _setup(ctx, inputs, output):
    x, weight, scores, words, _, ctx.transform, *ctx.recipe, ctx.raw_grad = inputs
    ctx.save_for_backward(x, weight, scores, words)


def _grad_input(grad, weight, scores, words, seed, layer, sigma):
    if weight is not None:
        return masked_linear(grad, weight, words, transposed=True)
    recipe = (seed, layer, "signed_constant", sigma)
    return ticket_linear(grad, words, None, *recipe, columns=scores.shape[1])


def _backward(ctx, grad):
    x, weight, scores, words = ctx.saved_tensors
    need_x, need_weight, need_scores, _, need_bias, *_ = ctx.needs_input_grad
    gx = _grad_input(grad, weight, scores, words, *ctx.recipe) if need_x else None
    gw = gs = None
    if weight is None and not ctx.raw_grad:
        gs = popup_linear_ds(grad, x, scores, ctx.transform, *ctx.recipe) if need_scores else None
    elif need_weight or need_scores:
        gw, gs = score_grads(ctx, grad_weight(grad, x), x, weight, scores, words)
    return gx, gw, gs, None, grad_bias(grad) if need_bias else None, *[None] * 5


popup_linear = define(
    "popup_linear(Tensor x, Tensor? weight, Tensor scores, Tensor words, Tensor? bias,"
    " str transform, int seed, int layer, float sigma, bool raw_grad=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.popup_linear,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
