from __future__ import annotations

from collections.abc import Sequence

import torch

from .masked_conv2d import masked_conv2d
from .regenerate import regenerate

__all__ = ["popup_conv2d"]


def popup_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scores: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    transform: str,
    seed: int,
    layer: int,
    sigma: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    raw_grad: bool = False,
) -> torch.Tensor:
    """masked_conv2d whose backward reaches the scores; see popup_linear."""
    del transform, raw_grad
    if weight is None:
        weight = regenerate(
            seed, layer, scores.shape, "signed_constant", sigma, dtype=x.dtype, device=x.device
        )
    return masked_conv2d(x, weight, words, bias, stride, padding, dilation, groups)
