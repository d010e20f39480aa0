from __future__ import annotations

import torch
import torch.nn.functional as F

from .regenerate import regenerate

__all__ = ["ticket_linear"]


def ticket_linear(
    x: torch.Tensor,
    words: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: int,
    layer: int,
    dist: str,
    sigma: float,
    signs: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    codes_t: torch.Tensor | None = None,
    columns: int | None = None,
) -> torch.Tensor:
    """``x[..., K] @ W^T + bias`` with W ``[O, K]`` regenerated from the seed, masked by ``words``.

    ``words=None``: every weight is kept; ``signs`` then has to say how many rows there are.
    ``columns``: K of the transposed product ``x[..., O] @ W[O, K] + bias`` instead.
    ``signs``, ``codes``, ``codes_t`` (of the transpose): what :mod:`ticket_codes` and sign_words
    make of the layer, if the caller keeps it; they change nothing but speed.
    """
    del codes, codes_t
    rows = (signs if words is None else words).shape[0]
    shape = (rows, x.shape[-1] if columns is None else columns)
    weight = regenerate(
        seed, layer, shape, dist, sigma, dtype=x.dtype, device=x.device, words=words
    )
    return F.linear(x, weight if columns is None else weight.t(), bias)
