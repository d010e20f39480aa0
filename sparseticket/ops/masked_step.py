from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape
from sparseticket.reference import masked_step as _reference

from ._dispatch import C, caps, check_words, define, nthreads
from .apply_mask import apply_mask
from .popup_step import flat_like, step_choice, update_rule
from .select_mask import memory_order

__all__ = ["masked_step"]

_SHADOWS = (torch.bfloat16, torch.float16)


def _cpu(weights, grads, momenta, variances, shadows, words, lr, *args, **options):
    _check(weights, grads, momenta, variances, shadows, words)
    native = all(s.dtype == torch.bfloat16 for s in shadows)  # float16: written afterwards
    _run(_kernel, weights, grads, momenta, variances, shadows if native else [], words, lr, *args,
         **options)  # fmt: skip
    if not native:
        for shadow, weight, mask in zip(shadows, weights, words, strict=True):
            shadow.copy_(apply_mask(weight.detach(), mask))


def _kernel(flat, layouts, words, adam, nesterov, rule):
    weights, *others = flat
    C.masked_step(
        caps(weights),
        layouts,
        *(caps(tensors) for tensors in others),
        caps(words),
        adam,
        nesterov,
        rule,
        nthreads(),
    )


def _cuda(weights, grads, momenta, variances, shadows, words, lr, *args, **options):
    from sparseticket.kernels.masked_step import masked_step as launch

    _run(launch, weights, grads, momenta, variances, shadows, words, lr, *args, **options)


def _run(
    kernel,
    weights,
    grads,
    momenta,
    variances,
    shadows,
    words,
    lr,
    beta1=0.0,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    nesterov=False,
    step=1,
):
    """``kernel`` on everything flat, in the memory order of the weights."""
    rows = [memory_order(w)[1] for w in weights]
    layouts = [(r, c * t, 1) if canonical else (r, c, t) for r, c, t, canonical in rows]
    grads = [flat_like(g.detach().float(), w) for g, w in zip(grads, weights, strict=True)]
    flat = [[_flat(t) for t in tensors] for tensors in (weights, momenta, variances, shadows)]
    adam = bool(variances)
    rule = update_rule(adam, lr, beta1, beta2, eps, weight_decay, step)
    masks = [w.contiguous() for w in words]
    kernel([flat[0], grads, *flat[1:]], layouts, masks, adam, nesterov, rule)
    torch.autograd.graph.increment_version([*weights, *momenta, *variances, *shadows])


def _flat(tensor):
    return torch.as_strided(tensor.detach(), (tensor.numel(),), (1,))


def _check(weights, grads, momenta, variances, shadows, words):
    count = len(weights)
    for name, given, optional in (
        ("grads", grads, False),
        ("momenta", momenta, True),
        ("variances", variances, True),
        ("shadows", shadows, True),
        ("words", words, False),
    ):
        if len(given) != count and (given or not optional):
            raise ValueError(f"masked_step: {name}: got {len(given)} for {count} weights")
    if variances and not momenta:
        raise ValueError("masked_step: momenta: AdamW (variances are given) needs them too")
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        if weight.dtype != torch.float32:
            raise TypeError(
                f"masked_step: weights: got {weight.dtype}, need float32, updated in place"
            )
        if not memory_order(weight, copies=False):
            raise ValueError(
                f"masked_step: weights: got strides {weight.stride()} for shape "
                f"{tuple(weight.shape)}; they are updated in place and need to be contiguous or "
                "channels-last"
            )
        if grad.shape != weight.shape:
            raise ValueError(
                f"masked_step: grads: got shape {tuple(grad.shape)}, need {tuple(weight.shape)}"
            )
        for name, given in (("momenta", momenta), ("variances", variances)):
            if given:
                _check_like(name, given[i], weight, (torch.float32,))
        if shadows:
            _check_like("shadows", shadows[i], weight, _SHADOWS)
        check_words("masked_step", words[i], *canonical_shape(weight.shape))


def _check_like(name, tensor, weight, dtypes):
    if tensor.dtype not in dtypes or tensor.shape != weight.shape:
        accepted = " or ".join(map(str, dtypes))
        raise ValueError(
            f"masked_step: {name}: got {tensor.dtype} {tuple(tensor.shape)}, need {accepted} "
            f"{tuple(weight.shape)}"
        )
    if tensor.numel() and tensor.stride() != weight.stride():
        raise ValueError(
            f"masked_step: {name}: got strides {tensor.stride()}, need {weight.stride()}, those "
            "of the weight"
        )


def _meta(weights, grads, momenta, variances, shadows, words, lr, *args, **options):
    _check(weights, grads, momenta, variances, shadows, words)


def _choose_cuda(weights, *rest, **options):
    return step_choice("masked_step", weights, "")


masked_step = define(
    "masked_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta,"
    " Tensor(c!)[] variances, Tensor(d!)[] shadows, Tensor[] words, float lr, float beta1=0.0,"
    " float beta2=0.999, float eps=1e-08, float weight_decay=0.0, bool nesterov=False,"
    " int step=1) -> ()",
    cpu=_cpu,
    reference=_reference.masked_step,
    meta=_meta,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
