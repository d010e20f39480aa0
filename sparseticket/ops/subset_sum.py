from __future__ import annotations

import torch

from sparseticket.reference import subset_sum as _reference

from ._dispatch import C, Choice, cap, define, nthreads

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


def _snap(base, target, lengths):
    """Integers ``[R, n + 1]`` and ``[R, T]`` on the grid of each row, its inverse ``[R, 1]``, and
    which targets lie on it with their row. Elements that do not count, and the last, are 0."""
    counts = torch.ones_like(base, dtype=torch.bool)
    if lengths is not None:
        counts = torch.arange(base.shape[1], device=base.device) < lengths[:, None]
    a = torch.where(counts, base, 0.0).double()
    for name, numbers in (("base", a), ("target", target)):
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"subset_sum: {name}: got an infinite number or NaN, need finite ones")
    a = torch.nn.functional.pad(a, (0, 1))
    fraction, exponent = torch.frexp(a.abs().amax(1, keepdim=True))
    exponent = (exponent - (fraction == 0.5).int()).clamp_min(_reference.SMALLEST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(fraction), _reference.GRID_BITS - exponent)
    scaled = a * scale
    q, wanted = scaled.round(), target.double() * scale
    t = wanted.clamp(-_reference.LIMIT, _reference.LIMIT).round()
    exact = (q == scaled).all(1, keepdim=True) & (t == wanted)
    return q.int(), t.int(), scale, exact


def _cuda(base, target, eps, lengths=None, objective="min_card", max_card=4, fallback="dp"):
    """Few elements, or the least error of a few, by Triton; the rest, below 1 % of usual
    instances, visits the CPU."""
    from sparseticket.kernels import subset_sum as kernel

    _check_values(base, eps, lengths)
    q, t, scale, exact = _snap(base, target, lengths)
    row = torch.arange(base.shape[0], device=base.device).repeat_interleave(target.shape[1])
    flat_eps = eps.expand(target.shape).reshape(-1)
    if objective == "min_card":
        units = (flat_eps.view(target.shape) * scale).clamp_max(_reference.LIMIT).floor()
        kept_back = torch.where(exact, 0, (max_card + 2) // 2)
        radius = (units - kept_back).clamp_min(0).int().flatten()
        mask, left = kernel.few(q, row, t.flatten() - radius, 2 * radius, max_card)
    elif base.shape[1] <= kernel.LEAST_MAX:
        mask, left = kernel.least(q, row, t.flatten()), row[:0]
    else:
        mask, left = torch.zeros_like(row), torch.arange(len(row), device=row.device)
    if len(left):
        rest = (base[row[left]], target.reshape(-1, 1)[left], flat_eps[left][:, None])
        counts = None if lengths is None else lengths[row[left]].cpu()
        found = _cpu(*(part.cpu() for part in rest), counts, objective, max_card, fallback)
        mask[left] = found[0][:, 0].to(mask.device)
    return _evaluate(base, target, eps, mask.view(target.shape))


def _evaluate(base, target, eps, mask):
    """``mask`` and what it gives: sums in the order of the elements, as every backend adds."""
    value = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    for i in range(base.shape[1]):
        taken = (mask >> i & 1).bool()
        value += torch.where(taken, base[:, i : i + 1].double(), 0.0)
    error = (value - target.double()).abs()
    return mask, value, error, (error > eps).to(torch.int8)


def _choose_cuda(base, target, eps, lengths=None, objective="min_card", *rest):
    if objective == "min_error" and base.shape[1] > 16:
        return Choice("subset_sum", f"{C.isa()} C++", "least error of more than 16 elements: a CPU")
    return Choice("subset_sum", "Triton", "what it leaves unsolved goes to a CPU")


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
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
