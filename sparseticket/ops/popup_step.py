from __future__ import annotations

import math

import torch

from sparseticket.formats import canonical_shape
from sparseticket.reference import popup_step as _reference

from ._dispatch import C, Choice, cap, caps, check_words, define, nthreads
from .select_mask import (
    check_selection,
    check_static,
    global_with_floor,
    memory_order,
    raise_for_nan,
    select_mask,
)

__all__ = ["bind_step", "flat_like", "popup_step", "step_choice", "update_rule"]


def _cpu(
    scores,
    grads,
    momenta,
    variances,
    words,
    state,
    kept,
    signs,
    sigmas,
    lr,
    beta1=0.0,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    nesterov=False,
    step=1,
    scope="layer",
    transform="abs",
    min_keep=0,
):
    run = bind_step(
        scores, momenta, variances, words, state, kept, signs, scope, transform, min_keep
    )
    rule = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    run(grads, sigmas, nesterov, **rule, step=step)


def bind_step(
    scores,
    momenta,
    variances,
    words,
    state,
    kept,
    signs,
    scope="layer",
    transform="abs",
    min_keep=0,
):
    """A CPU step of these tensors, whose checks and capsules take as long as a small layer's
    update: ``run(grads, sigmas, nesterov, lr=..., ...)``, for as often as none of them moves in
    memory."""
    check_static("popup_step", scores, kept, scope, transform, min_keep)
    pairs = _check_bound(scores, momenta, variances, words, state, signs, scope)
    check_selection("popup_step", scores, kept, None, scope, min_keep)
    adam, floor = bool(variances), scope == "global" and min_keep > 0
    bound = [caps(flat for flat, _ in pairs), [layout for _, layout in pairs]]
    moments = [
        caps(_flat(name, m, s) for m, s in zip(tensors, scores, strict=bool(tensors)))
        for name, tensors in (("momenta", momenta), ("variances", variances))
    ]
    planes = [
        caps(w.detach() for w in words),
        [None if s is None else cap(s.detach().contiguous()) for s in signs],
    ]
    selecting = [[] if floor else list(kept), transform == "abs", scope == "global", cap(state)]
    written = [*scores, *momenta, *variances, *words, state]

    def run(grads, sigmas, nesterov=False, **rule):
        _check_grads(scores, grads, sigmas)
        grads = caps(flat_like(g.detach().float(), s) for g, s in zip(grads, scores, strict=True))
        settings = list(sigmas), adam, nesterov, update_rule(adam, **rule)
        nan = C.popup_step(*bound, grads, *moments, *planes, *settings, *selecting, nthreads())
        if floor:
            state.copy_(global_with_floor(scores, words, kept[0], None, transform, min_keep))
        torch.autograd.graph.increment_version(written)
        if nan or floor:
            raise_for_nan("popup_step", scores, state)

    return run


def _cuda(
    scores,
    grads,
    momenta,
    variances,
    words,
    state,
    kept,
    signs,
    sigmas,
    lr,
    beta1=0.0,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    nesterov=False,
    step=1,
    scope="layer",
    transform="abs",
    min_keep=0,
):
    """The update in one launch, then the selection; a NaN is in the state, as of select_mask."""
    from sparseticket.kernels.popup_step import popup_step as launch

    pairs = [memory_order(s) for s in scores]
    launch(
        [
            [flat for flat, _ in pairs],
            [flat_like(g.detach().float(), s) for g, s in zip(grads, scores, strict=True)],
            *([memory_order(m)[0] for m in moments] for moments in (momenta, variances)),
        ],
        [(r, c * t, 1) if canonical else (r, c, t) for _, (r, c, t, canonical) in pairs],
        [None if s is None else s.contiguous() for s in signs],
        [float(sigma) for sigma in sigmas],
        transform == "abs",
        nesterov,
        update_rule(bool(variances), lr, beta1, beta2, eps, weight_decay, step),
    )
    masks, new = select_mask(scores, kept, None, state, scope, transform, min_keep)
    for old, mask in zip(words, masks, strict=True):
        old.copy_(mask)
    state.copy_(new)
    torch.autograd.graph.increment_version([*scores, *momenta, *variances])


def step_choice(op, tensors, then):
    """What the fused update of these tensors runs as on CUDA."""
    from sparseticket.kernels.tuning import tuned

    total = sum(t.numel() for t in tensors)
    sizes = tuned(op, total, tensors[0].device if tensors else torch.device("cpu"))
    reason = f"{total} numbers in {len(tensors)} tensors, one launch{then}; {sizes}"
    return Choice(op, "Triton fused", reason)


def _choose_cuda(scores, *rest, **options):
    return step_choice("popup_step", scores, ", then select_mask")


def update_rule(adam, lr, beta1=0.0, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1):
    """The kernel's eight numbers; products of settings are taken in float64, as torch does."""
    if not adam:
        return [lr, weight_decay, beta1, 0.0, 0.0, 0.0, 0.0, 1.0]
    decay, rate = 1 - lr * weight_decay, lr / (1 - beta1**step)
    return [rate, decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, math.sqrt(1 - beta2**step)]


def flat_like(tensor, scores):
    """``tensor`` flat in the memory order of the dense ``scores``, a copy only where its own is
    another."""
    if tensor.stride() != scores.stride():
        tensor = torch.empty_like(scores, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _flat(name, tensor, scores):
    if tensor.shape != scores.shape or tensor.dtype != torch.float32:
        raise ValueError(
            f"popup_step: {name}: got {tensor.dtype} {tuple(tensor.shape)}, need torch.float32 "
            f"{tuple(scores.shape)} like the scores"
        )
    if tensor.numel() and tensor.stride() != scores.stride():
        raise ValueError(
            f"popup_step: {name}: got strides {tensor.stride()}, need {scores.stride()}, those of "
            "the scores"
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def _check_lengths(scores, lists):
    for name, given in lists.items():
        if len(given) != len(scores):
            raise ValueError(
                f"popup_step: {name}: got {len(given)} for {len(scores)} score tensors"
            )


def _check_grads(scores, grads, sigmas):
    _check_lengths(scores, {"grads": grads, "sigmas": sigmas})
    for s, g in zip(scores, grads, strict=True):
        if g.shape != s.shape:
            raise ValueError(
                f"popup_step: grads: got shape {tuple(g.shape)}, need {tuple(s.shape)}"
            )


def _check_bound(scores, momenta, variances, words, state, signs, scope):
    """The scores in memory order, see there; raises for what the op cannot take."""
    pairs = []
    moments = {k: v for k, v in (("momenta", momenta), ("variances", variances)) if v}
    _check_lengths(scores, {"words": words, "signs": signs, **moments})
    if variances and not momenta:
        raise ValueError("popup_step: momenta: AdamW (variances are given) needs them too")
    for s, w, sign in zip(scores, words, signs, strict=True):
        if s.dtype != torch.float32:
            raise TypeError(f"popup_step: scores: got {s.dtype}, need float32, updated in place")
        pairs.append(memory_order(s, copies=False))
        if pairs[-1] is None:
            raise ValueError(
                f"popup_step: scores: got strides {s.stride()} for shape {tuple(s.shape)}; they "
                "are updated in place and need to be contiguous or channels-last"
            )
        matrix = canonical_shape(s.shape)
        check_words("popup_step", w, *matrix)
        if not w.is_contiguous():
            raise ValueError("popup_step: words: need contiguous tensors, written in place")
        if sign is not None:
            check_words("popup_step", sign, *matrix, name="signs")
    groups = len(scores) if scope == "layer" else 1
    if state.dtype != torch.int32 or tuple(state.shape) != (groups, 2):
        raise ValueError(
            f"popup_step: state: got {state.dtype} {tuple(state.shape)}, need int32 ({groups}, 2)"
        )
    return pairs


def _check_device(
    scores,
    grads,
    momenta,
    variances,
    words,
    state,
    kept,
    signs,
    sigmas,
    lr,
    beta1=0.0,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    nesterov=False,
    step=1,
    scope="layer",
    transform="abs",
    min_keep=0,
):
    """Without the counts, which wait for the device; select_mask checks what it is given."""
    check_static("popup_step", scores, kept, scope, transform, min_keep)
    _check_bound(scores, momenta, variances, words, state, signs, scope)
    _check_grads(scores, grads, sigmas)
    for name, tensors in (("momenta", momenta), ("variances", variances)):
        for tensor, s in zip(tensors, scores, strict=bool(tensors)):
            _flat(name, tensor, s)


def _meta(scores, grads, momenta, variances, words, state, kept, signs, sigmas, *rest, **options):
    return None


popup_step = define(
    "popup_step(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] variances,"
    " Tensor(d!)[] words, Tensor(e!) state, SymInt[] kept, Tensor?[] signs, float[] sigmas,"
    " float lr, float beta1=0.0, float beta2=0.999, float eps=1e-08, float weight_decay=0.0,"
    ' bool nesterov=False, int step=1, str scope="layer", str transform="abs", int min_keep=0)'
    " -> ()",
    cpu=_cpu,
    reference=_reference.popup_step,
    meta=_meta,
    check=_check_device,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
