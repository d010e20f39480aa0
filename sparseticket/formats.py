"""Kept counts and the canonical matrix form (``reference/layout.py`` holds its arithmetic)."""

from __future__ import annotations

import math
import numbers

from .reference.layout import (
    canonical_shape,
    channels_and_taps,
    from_canonical,
    to_canonical,
    words_shape,
)

__all__ = [
    "canonical_shape",
    "channels_and_taps",
    "check_density",
    "from_canonical",
    "kept_count",
    "to_canonical",
    "words_shape",
]


def check_density(density: float, name: str = "density") -> float:
    """Return ``density`` as a float; ValueError unless it is a number in [0, 1]."""
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise TypeError(f"{name}: got {density!r}, need a number in [0, 1]")
    if not 0.0 <= density <= 1.0:  # also false for NaN
        raise ValueError(f"{name}: got {density}, need the kept fraction, a number in [0, 1]")
    return float(density)


def kept_count(density: float, n: int) -> int:
    """Number of ones in a mask over ``n`` weights: floor(density*n + 0.5) in float64, in [0, n]."""
    return min(max(math.floor(check_density(density) * float(n) + 0.5), 0), n)
