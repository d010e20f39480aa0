from __future__ import annotations

import torch

from sparseticket.reference import subset_sum as _reference

from ._dispatch import C, cap, define, nthreads

__all__ = ["OBJECTIVES", "subset_sum"]

OBJECTIVES = ("min_card", "min_error")
FALLBACKS = ("dp", "none")
MOST = {"min_card": 64, "min_error": 40}  # elements; min_error needs 2**(n/2) sums


def _check(base, target, eps, lengths=None, objective="min_card", max_card=4, fallback="dp"):
    if objective not in OBJECTIVES:
        raise ValueError(f"subset_sum: objective: got {objective!r}, need one of {OBJECTIVES}")
    if fallback not in FALLBACKS:
        raise ValueError(f"subset_sum: fallback: got {fallback!r}, need one of {FALLBACKS}")
    if not 1 <= max_card <= 4:
        raise ValueError(f"subset_sum: max_card: got {max_card}, need 1 to 4")
    if base.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"subset_sum: base: got {base.dtype}, need float32 or float64")
    if target.dtype != base.dtype:
        raise TypeError(f"subset_sum: target: got {target.dtype}, need {base.dtype} as base")
    if base.ndim != 2 or target.ndim != 2 or base.shape[0] != target.shape[0]:
        raise ValueError(
            f"subset_sum: target: got {tuple(target.shape)} with base {tuple(base.shape)}, need "
            "base [R, n] and target [R, T]"
        )
    if base.shape[1] > MOST[objective]:
        raise ValueError(
            f"subset_sum: base: got {base.shape[1]} elements a row, {objective} takes up to "
            f"{MOST[objective]}"
        )
    if eps.dtype != torch.float64:
        raise TypeError(f"subset_sum: eps: got {eps.dtype}, need float64")
    if eps.ndim and eps.shape != target.shape:
        raise ValueError(
            f"subset_sum: eps: got {tuple(eps.shape)}, need () or {tuple(target.shape)} as target"
        )
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != base.shape[:1]):
        raise ValueError(
            f"subset_sum: lengths: got {lengths.dtype} {tuple(lengths.shape)}, need int64 "
            f"({base.shape[0]},)"
        )


def _check_values(base, eps, lengths) -> None:
    if eps.numel() and not bool(((eps >= 0) & eps.isfinite()).all()):
        raise ValueError("subset_sum: eps: need finite numbers >= 0")
    if lengths is not None and lengths.numel():
        least, most = (int(x) for x in torch.aminmax(lengths))
        if least < 0 or most > base.shape[1]:
            raise ValueError(
                f"subset_sum: lengths: got {least} to {most}, need 0 to {base.shape[1]}, the "
                "elements of a row of base"
            )


def _empty(target):
    return (
        target.new_empty(target.shape, dtype=torch.int64),
        target.new_empty(target.shape, dtype=torch.float64),
        target.new_empty(target.shape, dtype=torch.float64),
        target.new_empty(target.shape, dtype=torch.int8),
    )


def _meta(base, target, eps, lengths=None, objective="min_card", max_card=4, fallback="dp"):
    _check(base, target, eps, lengths, objective, max_card, fallback)
    return _empty(target)


def _cpu(base, target, eps, lengths=None, objective="min_card", max_card=4, fallback="dp"):
    _check(base, target, eps, lengths, objective, max_card, fallback)
    _check_values(base, eps, lengths)
    made = _empty(target)
    finite = C.subset_sum(
        cap(base.contiguous()),
        cap(target.contiguous()),
        cap(eps.contiguous()),
        None if lengths is None else cap(lengths.contiguous()),
        *(cap(t) for t in made),
        objective == "min_error",
        max_card,
        fallback == "dp",
        nthreads(),
    )
    for name, ok in zip(("base", "target"), finite, strict=True):
        if not ok:
            raise ValueError(f"subset_sum: {name}: got an infinite number or NaN, need finite ones")
    return made


def _backward(ctx, *grads):
    raise NotImplementedError(
        "subset_sum: has no gradient: it chooses a subset; detach base and target, and sum the "
        "chosen elements again where their gradient is meant"
    )


subset_sum = define(
    "subset_sum(Tensor base, Tensor target, Tensor eps, Tensor? lengths=None, "
    "str objective='min_card', int max_card=4, str fallback='dp') "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    reference=_reference.subset_sum,
    meta=_meta,
    backward=_backward,
)
