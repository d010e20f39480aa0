from __future__ import annotations

import torch
import torch.nn.functional as F

from .regenerate import regenerate

__all__ = ["ticket_linear"]


def ticket_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    seed: int,
    layer: int,
    dist: str,
    sigma: float,
    signs: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x[..., K] @ W^T + bias`` with W regenerated from the seed and masked by ``words``.

    ``signs``: the layer's sign words if the caller keeps them; they change nothing but speed.
    """
    del signs
    shape = (words.shape[0], x.shape[-1])
    weight = regenerate(
        seed, layer, shape, dist, sigma, dtype=x.dtype, device=x.device, words=words
    )
    return F.linear(x, weight, bias)
