from __future__ import annotations

from sparseticket.formats import canonical_shape
from sparseticket.reference import popup_weight as _reference

from ._dispatch import Choice, check_words, define
from .apply_mask import apply_mask, apply_mask_cpu
from .popup_linear import check_frozen, score_grad

__all__ = ["popup_weight"]


def _check(weight, scores, words, transform, raw_grad=False):
    check_frozen("popup_weight", weight, weight, scores, transform, 0)
    check_words("popup_weight", words, *canonical_shape(weight.shape))


def _cpu(weight, scores, words, transform, raw_grad=False):
    _check(weight, scores, words, transform)
    return apply_mask_cpu(weight, words)


def _composed(weight, scores, words, transform, raw_grad=False):
    _check(weight, scores, words, transform)
    return apply_mask(weight, words)


def _setup(ctx, inputs, output):
    weight, scores, words, ctx.transform, ctx.raw_grad = inputs
    ctx.scores_dtype = scores.dtype
    if not ctx.raw_grad or weight.requires_grad:
        ctx.save_for_backward(weight, scores, words)


def _backward(ctx, grad):
    need_weight, need_scores, *_ = ctx.needs_input_grad
    if ctx.raw_grad and not need_weight:  # nothing was saved
        return None, grad.to(ctx.scores_dtype), None, None, None
    weight, scores, words = ctx.saved_tensors
    gs = None
    if need_scores:
        raw = ctx.raw_grad
        gs = grad.to(scores.dtype) if raw else score_grad(grad, weight, scores, ctx.transform)
    return apply_mask(grad, words) if need_weight else None, gs, None, None, None


def _choose(*args) -> Choice:
    return Choice("popup_weight", "apply_mask", "its backward is a few dense products")


popup_weight = define(
    "popup_weight(Tensor weight, Tensor scores, Tensor words, str transform,"
    " bool raw_grad=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.popup_weight,
    meta=_composed,
    backward=_backward,
    setup_context=_setup,
    choose=_choose,
    cuda=_composed,
    choose_cuda=_choose,
)
