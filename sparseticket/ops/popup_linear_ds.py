from __future__ import annotations

import math

import torch

from sparseticket import prng
from sparseticket.reference import popup_linear_ds as _reference
from sparseticket.reference.popup_linear import popup_score_grad

from ._dispatch import C, Choice, cap, define, nthreads
from .masked_linear import grad_weight
from .regenerate import check_recipe, regenerate
from .ticket_linear import as_stored

__all__ = ["popup_linear_ds"]

# On a GPU: weights from which the fused kernel has a tile for every multiprocessor of a large one.
FUSED_WEIGHTS = 2**22


def _check(grad, x, scores, transform, seed):
    check_recipe("popup_linear_ds", seed, "signed_constant")
    if transform not in ("abs", "identity"):
        raise ValueError(f"popup_linear_ds: transform: got {transform!r}, accepted: abs, identity")
    if (*grad.shape[:-1], *scores.shape) != (*x.shape[:-1], *grad.shape[-1:], *x.shape[-1:]):
        raise ValueError(
            f"popup_linear_ds: grad, x, scores: got {tuple(grad.shape)}, {tuple(x.shape)}, "
            f"{tuple(scores.shape)}, need [..., O], [..., K], [O, K]"
        )


def _cpu(grad, x, scores, transform, seed, layer, sigma):
    _check(grad, x, scores, transform, seed)
    dense = grad_weight(grad, x).to(scores.dtype)
    if dense.dtype != torch.float32:
        weight = regenerate(seed, layer, scores.shape, "signed_constant", sigma, dtype=x.dtype)
        return popup_score_grad(dense, weight, scores, transform).contiguous()
    dense = dense.contiguous()  # our own product: scaled in place, one pass
    key, high = prng.stream_key(seed, layer, "sign")
    C.popup_linear_ds(
        cap(dense), cap(scores.contiguous()), transform == "abs", sigma, key, high, nthreads()
    )
    return dense


def cuda_choice(x, scores) -> Choice:
    """Fused or composed, on a GPU. Computed, not measured yet."""
    op, weights = "popup_linear_ds", scores.numel()
    if x.dtype not in (torch.float16, torch.bfloat16):
        return Choice(op, "composed", f"{x.dtype}: dense product, then W*sign(s)")
    if weights < FUSED_WEIGHTS:
        return Choice(op, "composed", f"{weights} weights < {FUSED_WEIGHTS}: too few tiles")
    from sparseticket.kernels.tuning import tuned

    config = tuned(op, x.numel() // x.shape[-1], x.device)
    reason = f"{weights} weights: signs in the epilogue of the product; {config}"
    return Choice(op, "Triton fused", reason)


def _choose_cuda(grad, x, scores, *rest) -> Choice:
    return cuda_choice(x, scores)


def _cuda(grad, x, scores, transform, seed, layer, sigma):
    if cuda_choice(x, scores).kernel == "composed":
        recipe = (seed, layer, scores.shape, "signed_constant", sigma)
        weight = regenerate(*recipe, dtype=x.dtype, device=x.device)
        return popup_score_grad(grad_weight(grad, x), weight, scores, transform).contiguous()
    from sparseticket.kernels.popup_linear_ds import popup_linear_ds as launch

    grad2d, x2d = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).contiguous() for t in (grad, x))
    out = torch.empty(scores.shape, dtype=scores.dtype, device=x.device)
    key, high = prng.stream_key(seed, layer, "sign")
    launch(
        grad2d,
        x2d,
        scores.contiguous(),
        out,
        transform == "abs",
        as_stored(sigma, x.dtype),
        key,
        high,
    )
    return out


def _meta(grad, x, scores, transform, seed, layer, sigma):
    _check(grad, x, scores, transform, seed)
    return scores.new_empty(scores.shape)


def _setup(ctx, inputs, output):
    grad, x, scores, ctx.transform, *ctx.recipe = inputs
    ctx.save_for_backward(grad, x, scores)


def _backward(ctx, outer):
    """The op is linear in grad and in x, and constant in the scores almost everywhere."""
    grad, x, scores = ctx.saved_tensors
    seed, layer, sigma = ctx.recipe
    need_grad, need_x, *_ = ctx.needs_input_grad
    weight = regenerate(
        seed, layer, scores.shape, "signed_constant", sigma, dtype=x.dtype, device=x.device
    )
    inner = popup_score_grad(outer, weight, scores, ctx.transform).to(x.dtype)
    return (
        x @ inner.t() if need_grad else None,
        grad @ inner if need_x else None,
        *[None] * 5,
    )


popup_linear_ds = define(
    "popup_linear_ds(Tensor grad, Tensor x, Tensor scores, str transform, int seed, int layer,"
    " float sigma) -> Tensor",
    cpu=_cpu,
    reference=_reference.popup_linear_ds,
    meta=_meta,
    backward=_backward,
    setup_context=_setup,
    cuda=_cuda,
    choose_cuda=_choose_cuda,
)
