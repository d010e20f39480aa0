from __future__ import annotations

from sparseticket.formats import canonical_shape
from sparseticket.reference import popup_weight as _reference
from sparseticket.reference.popup_linear import popup_score_grad

from ._dispatch import check_words, define
from .apply_mask import apply_mask, apply_mask_cpu

__all__ = ["popup_weight"]


def _check(weight, scores, words, transform):
    if transform not in ("abs", "identity"):
        raise ValueError(f"popup_weight: transform: got {transform!r}, accepted: abs, identity")
    if not scores.dtype.is_floating_point:
        raise TypeError(f"popup_weight: scores: got {scores.dtype}, need a floating-point dtype")
    if weight.shape != scores.shape or not weight.dtype.is_floating_point:
        raise ValueError(
            f"popup_weight: weight: got {weight.dtype} {tuple(weight.shape)}, need a "
            f"floating-point dtype and {tuple(scores.shape)} like the scores"
        )
    check_words("popup_weight", words, *canonical_shape(scores.shape))


def _cpu(weight, scores, words, transform, raw_grad=False):
    _check(weight, scores, words, transform)
    return apply_mask_cpu(weight, words)


def _cuda(weight, scores, words, transform, raw_grad=False):
    return apply_mask(weight, words)


def _meta(weight, scores, words, transform, raw_grad=False):
    _check(weight, scores, words, transform)
    return apply_mask(weight, words)


def _setup(ctx, inputs, output):
    weight, scores, words, ctx.transform, ctx.raw_grad = inputs
    ctx.save_for_backward(weight, scores, words)


def _backward(ctx, grad):
    weight, scores, words = ctx.saved_tensors
    need_weight, need_scores, *_ = ctx.needs_input_grad
    gw = apply_mask(grad, words) if need_weight else None
    gs = None
    if need_scores and ctx.raw_grad:
        gs = grad.to(scores.dtype)
    elif need_scores:
        gs = popup_score_grad(grad, weight, scores, ctx.transform)
    return gw, gs, None, None, None


popup_weight = define(
    "popup_weight(Tensor weight, Tensor scores, Tensor words, str transform,"
    " bool raw_grad=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.popup_weight,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    cuda=_cuda,
)
