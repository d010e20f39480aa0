from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .popup_linear import popup_score_grad
from .select_mask import select_mask
from .unpack_mask import unpack_mask

__all__ = ["popup_step"]


def popup_step(
    scores: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    variances: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor],
    state: torch.Tensor,
    kept: Sequence[int],
    signs: Sequence[torch.Tensor | None],
    sigmas: Sequence[float],
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: int = 1,
    scope: str = "layer",
    transform: str = "abs",
    min_keep: int = 0,
) -> None:
    """One optimizer step on ``scores``, then ``select_mask`` of them into ``words``; in place.

    SGD with momentum ``beta1`` (dampening 0; ``momenta`` empty: none) or, where ``variances`` are
    given, AdamW: torch's formulas. Where ``signs`` are given, ``grads[i]`` is the dense gradient G
    of W*mask for W = sigma * (1 - 2*sign bit), and the update takes G*W*sign(s); else it is the
    scores' own. ``state``: as select_mask gives it; a hint that becomes the new state.
    """
    for i, s in enumerate(scores):
        grad = grads[i].to(s.dtype)
        if signs[i] is not None:
            weight = frozen_sign_weight(signs[i], sigmas[i], s)
            grad = popup_score_grad(grad, weight, s, transform)
        update_scores(
            s,
            grad,
            momenta[i] if momenta else None,
            variances[i] if variances else None,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            nesterov,
            step,
        )
    masks, new = select_mask(scores, kept, None, None, scope, transform, min_keep)
    for old, mask in zip(words, masks, strict=True):
        old.copy_(mask)
    state.copy_(new)


def frozen_sign_weight(signs: torch.Tensor, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """+sigma where the sign bit is 0, -sigma where it is 1, in ``like``'s shape."""
    return torch.where(unpack_mask(signs, like.shape), -sigma, sigma).to(like.dtype)


def update_scores(
    score: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor | None,
    variance: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
    step: int,
) -> None:
    """torch.optim.SGD's or AdamW's formula for one tensor, in place."""
    if variance is None:
        grad = grad + weight_decay * score
        if momentum is not None:
            momentum.mul_(beta1).add_(grad)
            grad = grad + beta1 * momentum if nesterov else momentum
        score.sub_(lr * grad)
        return
    score.mul_(1 - lr * weight_decay)
    momentum.lerp_(grad, 1 - beta1)
    variance.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = variance.sqrt() / math.sqrt(1 - beta2**step)
    score.sub_(lr / (1 - beta1**step) * momentum / (root + eps))
