from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import philox
from .apply_mask import apply_mask
from .layout import canonical_shape, from_canonical

__all__ = ["regenerate"]


def regenerate(
    seed: int,
    layer: int,
    shape: Sequence[int],
    dist: str,
    sigma: float,
    stream: str = "magnitude",
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    words: torch.Tensor | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """Random tensor of ``shape`` with standard deviation ``sigma``; ``layer`` is an id, not a name.

    ``stream`` serves ``uniform`` and ``normal``; signed_constant uses the sign stream, constant
    none: it is +sigma everywhere. ``words`` zeroes what their mask drops. Values are made in fp32
    and rounded to ``dtype`` at the end.
    """
    rows, k = canonical_shape(shape)
    if dist == "signed_constant":
        words32 = philox.sign_words(seed, layer, rows, k, draw)
        place = np.arange(32, dtype=np.uint32)
        signs = ((words32[:, :, None] >> place) & 1).reshape(rows, words32.shape[1] * 32)[:, :k]
        values = np.where(signs == 1, -np.float32(sigma), np.float32(sigma))
    elif dist == "constant":
        values = np.full((rows, k), sigma, np.float32)
    else:
        words32 = philox.words32(seed, layer, rows, k, stream, draw)
        if dist == "uniform":
            centred = 2 * (words32 >> 8).astype(np.int64) + 1 - 2**24
            values = (centred.astype(np.float32) * np.float32(2**-24)) * philox.uniform_scale(sigma)
        else:
            values = philox.normal_quantiles()[words32 >> 16] * np.float32(sigma)
    dense = from_canonical(torch.from_numpy(values.astype(np.float32)), shape).to(device, dtype)
    if words is not None:
        dense = apply_mask(dense, words)
    last = channels_last and len(shape) == 4
    return dense.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
