"""Layer density rules: how the layers of a network share an overall density.

- ``uniform``: the same in every layer;
- ``erk``: proportional to sum(shape) / n, for a layer of n weights (Evci et al., "Rigging the
  lottery", ICML 2020);
- ``balanced``, also called ``epl``: proportional to 1/n, as many edges in every layer (Gadhikar et
  al., ICML 2023; Otsuka et al., TMLR 2025);
- ``igq``: 1 / (f*n + 1) (Otsuka et al.);
- ``pyramidal``: r^l in layer l = 1, 2, ... (Gadhikar et al.);
- ``induced``: proportional to given densities, those a pruning method found (Gadhikar et al.).

Proportional rules are water-filled: what a layer beyond density 1 cannot take goes to the others,
so that the overall density is exact. ``compat=True`` cuts such layers off instead, as the code of
Gadhikar et al. (RelationalML/sparse_to_sparse) does, and falls short of the density asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["DENSITY_RULES", "layer_densities"]

DENSITY_RULES = ("uniform", "erk", "balanced", "epl", "igq", "pyramidal", "induced")


def layer_densities(
    rule: str,
    shapes: Sequence[Sequence[int]],
    density: float,
    *,
    like: Sequence[float] | None = None,
    compat: bool = False,
) -> list[float]:
    """The density of each layer that belongs to an overall ``density`` in [0, 1], by ``rule``.

    ``like``: for ``induced``, the densities to be proportional to. ValueError for an unknown rule,
    and where ``like`` leaves too many layers empty for the density.
    """
    if rule not in DENSITY_RULES:
        raise ValueError(f"rule: got {rule!r}, accepted: {', '.join(DENSITY_RULES)}")
    if (like is not None) != (rule == "induced") or (like and len(like) != len(shapes)):
        raise ValueError(f"like: got {like} with rule={rule!r}; 'induced' needs one per layer")
    sizes = [math.prod(shape) for shape in shapes]
    if rule == "uniform" or density in (0, 1) or not sum(sizes):
        return [float(density)] * len(sizes)
    if rule == "igq":
        f = _root(lambda f: sum(n / (f * n + 1) for n in sizes) - density * sum(sizes))
        return [1 / (f * n + 1) for n in sizes]
    if rule == "pyramidal":
        q = _root(lambda q: _powers(1 - q, sizes) - density * sum(sizes))
        return [(1 - q) ** layer for layer in range(1, len(sizes) + 1)]
    raw = like or [
        (sum(shape) if rule == "erk" else 1.0) / n if n else 0.0
        for shape, n in zip(shapes, sizes, strict=True)
    ]
    return _proportional(raw, sizes, density, compat)


def _proportional(raw, sizes, density, compat) -> list[float]:
    """min(1, c*raw), c such that the overall density is met, or for ``compat`` would be uncut."""
    full = {i for i, n in enumerate(sizes) if not n}
    while True:
        budget = density * sum(sizes) - sum(sizes[i] for i in full)
        rest = sum(raw[i] * n for i, n in enumerate(sizes) if i not in full)
        if not rest and budget > 0.5:
            raise ValueError(f"like: density {density} does not fit into the layers that it keeps")
        level = budget / rest if rest else 0.0
        over = {i for i, r in enumerate(raw) if i not in full and level * r >= 1}
        full |= over
        if compat or not over:
            return [1.0 if i in full else level * r for i, r in enumerate(raw)]


def _powers(r: float, sizes: Sequence[int]) -> float:
    return sum(n * r**layer for layer, n in enumerate(sizes, 1))


def _root(falling: Callable[[float], float]) -> float:
    """Where a falling function of f >= 0 crosses zero, from above."""
    low, high = 0.0, 1.0
    while falling(high) > 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high
