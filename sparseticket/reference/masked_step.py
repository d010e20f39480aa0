from __future__ import annotations

from collections.abc import Sequence

import torch

from .popup_step import update_scores
from .unpack_mask import unpack_mask

__all__ = ["masked_step"]


def masked_step(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    variances: Sequence[torch.Tensor],
    shadows: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor],
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: int = 1,
) -> None:
    """One optimizer step on the weights that the masks ``words`` keep; in place.

    SGD with momentum ``beta1`` (dampening 0; ``momenta`` empty: none) or, where ``variances`` are
    given, AdamW: torch's formulas. Of a dead weight the gradient counts as 0 (whatever it is, NaN
    too), the moments are set to 0 and the weight stays. ``shadows``, if any, become weight * mask.
    """
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        live = unpack_mask(words[i], weight.shape)
        momentum = momenta[i] if momenta else None
        variance = variances[i] if variances else None
        states = [s for s in (momentum, variance) if s is not None]
        for state in states:
            state.copy_(_kept(state, live))
        made = weight.clone()
        update_scores(
            made, _kept(grad.to(weight.dtype), live), momentum, variance,
            lr, beta1, beta2, eps, weight_decay, nesterov, step,
        )  # fmt: skip
        for state in states:
            state.copy_(_kept(state, live))
        weight.copy_(torch.where(live, made, weight))
        if shadows:
            shadows[i].copy_(_kept(weight, live))


def _kept(tensor: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    return torch.where(live, tensor, torch.zeros_like(tensor))
