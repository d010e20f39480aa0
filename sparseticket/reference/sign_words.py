from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import philox
from .layout import canonical_shape

__all__ = ["sign_words"]


def sign_words(
    seed: int, layer: int, shape: Sequence[int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """int32 words ``[O, 2*ceil(K/64)]`` of the sign stream, bit 1 = negative; padding is random."""
    words = philox.sign_words(seed, layer, *canonical_shape(shape))
    return torch.from_numpy(words.view(np.int32)).to(device)
