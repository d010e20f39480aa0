from __future__ import annotations

from collections.abc import Sequence

import torch

from .regenerate import regenerate

__all__ = ["regenerate_many"]


def regenerate_many(
    words: Sequence[torch.Tensor],
    seeds: Sequence[int],
    layers: Sequence[int],
    ndims: Sequence[int],
    sizes: Sequence[int],
    sigmas: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> list[torch.Tensor]:
    """What :func:`regenerate` makes of each layer's seed, id, shape and mask (signed constants).

    Layer i has ``ndims[i]`` dimensions; ``sizes`` are those of all layers, one after the other.
    """
    made, end = [], 0
    for mask, seed, layer, ndim, sigma in zip(words, seeds, layers, ndims, sigmas, strict=True):
        shape, end = sizes[end : end + ndim], end + ndim
        options = {"dtype": dtype, "device": mask.device, "channels_last": channels_last}
        made.append(regenerate(seed, layer, shape, "signed_constant", sigma, words=mask, **options))
    return made
