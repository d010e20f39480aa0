from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch

__all__ = ["DP_BITS", "DP_TRIES", "EXACT_FALLBACK", "subset_sum"]

GRID_BITS = 23  # the grid of a row is 2**-23 of the power of two at or above its largest |a|
SMALLEST_EXPONENT = -900  # so that the grid's inverse is a float64
LIMIT = 2.0**30  # what targets and radii are cut to: differences of sums fit int32
DP_BITS = 8192  # most coarse sums of the dynamic programme
DP_TRIES = 8  # subsets that it proposes
EXACT_FALLBACK = 32  # most elements for which the exact optimum is sought after it


def subset_sum(
    base: torch.Tensor,
    target: torch.Tensor,
    eps: torch.Tensor,
    lengths: torch.Tensor | None = None,
    objective: str = "min_card",
    max_card: int = 4,
    fallback: str = "dp",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each target ``[R, T]`` a subset of the row ``base[R, n]`` with about that sum: mask
    (int64), value, error (float64, of the original numbers), status (int8, 1: error > eps)."""
    rows = base.detach().cpu().double().numpy()
    targets = target.detach().cpu().double().numpy()
    radii = np.broadcast_to(eps.detach().cpu().double().numpy(), targets.shape)
    counts = [base.shape[1]] * len(rows) if lengths is None else lengths.tolist()
    masks = np.zeros(targets.shape, np.uint64)
    values = np.zeros(targets.shape)
    for r, count in enumerate(counts):
        row = rows[r, :count]
        for name, numbers in (("base", row), ("target", targets[r])):
            if not np.isfinite(numbers).all():
                raise ValueError(f"subset_sum: {name}: got an infinite number or NaN")
        solve = _Row(row, max_card)
        for t in range(targets.shape[1]):
            mask = solve(targets[r, t], radii[r, t], objective, fallback)
            masks[r, t] = mask
            for i, a in enumerate(row):  # in this order on every backend
                values[r, t] += a if mask >> i & 1 else 0.0
    errors = np.abs(values - targets)
    found = (masks.view(np.int64), values, errors, (errors > radii).astype(np.int8))
    return tuple(torch.from_numpy(a).to(base.device) for a in found)


class _Row:
    """One base on its grid: integers ``q``."""

    def __init__(self, row: np.ndarray, max_card: int) -> None:
        exponent = _exponent(np.abs(row).max(initial=0.0))
        self.scale = 2.0 ** (GRID_BITS - exponent)
        self.q = np.rint(row * self.scale).astype(np.int64)
        self.exact = bool((self.q == row * self.scale).all())
        self.n, self.max_card = len(row), max_card
        self.small = _small_masks(self.n, max_card)
        self.small_sums = _sums_of(self.small, self.q)

    def __call__(self, target: float, eps: float, objective: str, fallback: str) -> int:
        scaled = target * self.scale
        t = int(np.rint(np.clip(scaled, -LIMIT, LIMIT)))
        if objective == "min_error":
            return _optimum(self.q, t)
        exact = self.exact and t == scaled
        distance = np.abs(self.small_sums - t)
        hits = np.flatnonzero(distance <= self._radius(eps, exact, self.max_card))
        if hits.size:
            return int(self.small[hits[0]])
        if fallback == "none":
            return int(self.small[distance.argmin()])
        return self._fallback(t, self._radius(eps, exact, self.n))

    def _radius(self, eps: float, exact: bool, card: int) -> int:
        """Grid units that a sum of ``card`` elements may be off. Rounding moves it and the target
        by up to half a unit an element: unless all lie on the grid, that much is kept back."""
        units = math.floor(min(eps * self.scale, LIMIT))
        return max(0, units - (0 if exact else (card + 2) // 2))

    def _fallback(self, t: int, radius: int) -> int:
        """The dynamic programme, and what it does not solve exactly, if that is affordable."""
        if self.q[self.q > 0].sum() + radius < t:
            return _mask(self.q > 0)
        if self.q[self.q < 0].sum() - radius > t:
            return _mask(self.q < 0)
        proposed = _dynamic_programme(self.q, t)
        errors = [abs(_sum(mask, self.q) - t) for mask in proposed]
        for mask, error in zip(proposed, errors, strict=True):
            if error <= radius:
                return mask
        if self.n <= EXACT_FALLBACK:
            return _optimum(self.q, t)
        return proposed[int(np.argmin(errors))]


def _exponent(largest: float) -> int:
    """ceil(log2(largest))."""
    if largest == 0:
        return 0
    fraction, exponent = math.frexp(largest)
    return max(exponent - (fraction == 0.5), SMALLEST_EXPONENT)


@functools.cache
def _small_masks(n: int, max_card: int) -> np.ndarray:
    """Every subset of up to ``max_card`` elements in canonical order: by size, then as a number."""
    sizes = (itertools.combinations(range(n), k) for k in range(max_card + 1))
    return np.concatenate(
        [np.sort(np.array([sum(1 << i for i in c) for c in s], np.uint64)) for s in sizes]
    )


def _bits(masks: np.ndarray, n: int) -> np.ndarray:
    return (masks[:, None] >> np.arange(n, dtype=np.uint64) & np.uint64(1)).astype(np.int64)


def _sums_of(masks: np.ndarray, q: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(masks), np.int64)
    for i, a in enumerate(q):
        sums += (masks >> np.uint64(i) & np.uint64(1)).astype(np.int64) * a
    return sums


def _sum(mask: int, q: np.ndarray) -> int:
    return sum(int(a) for i, a in enumerate(q) if mask >> i & 1)


def _mask(chosen: np.ndarray) -> int:
    return sum(1 << i for i, x in enumerate(chosen.tolist()) if x)


def _optimum(q: np.ndarray, t: int) -> int:
    """The subset of least error, then fewest elements, then the smallest number, by meeting in the
    middle: for every sum of the low half the nearest sums of the high half."""
    split = len(q) // 2
    low, low_sums = _distinct(q[:split])
    high, high_sums = _distinct(q[split:])
    after = np.searchsorted(high_sums, t - low_sums)
    pairs = []
    for at in (after - 1, after):
        near = np.clip(at, 0, len(high) - 1)
        mask = low | high[near] << np.uint64(split)
        pairs.append((np.abs(low_sums + high_sums[near] - t), mask))
    errors, masks = (np.concatenate(part) for part in zip(*pairs, strict=True))
    masks = masks[errors == errors.min()]
    return int(masks[np.lexsort((masks, np.bitwise_count(masks)))[0]])


def _distinct(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sums in ascending order, each with its canonical subset."""
    masks = np.arange(2 ** len(q), dtype=np.uint64)
    sums = _sums_of(masks, q)
    order = np.lexsort((masks, np.bitwise_count(masks), sums))
    sums, first = np.unique(sums[order], return_index=True)
    return masks[order][first], sums


def _dynamic_programme(q: np.ndarray, t: int) -> list[int]:
    """Subsets whose coarse sums lie nearest to the target's, the nearest first, the lower first.

    Sums of all subsets are the sum of the negative elements plus that of a subset of |q|: of
    those, rounded to a coarse unit, all reachable sums are bits of one number.
    """
    sizes = [abs(int(a)) for a in q]
    shift = 0
    while (sum(sizes) >> shift) + len(q) >= DP_BITS:
        shift += 1
    half = (1 << shift) >> 1
    coarse = [(size + half) >> shift for size in sizes]
    reach = [1]
    for c in coarse:
        reach.append(reach[-1] | reach[-1] << c)
    total = sum(coarse)
    aim = (t - int(q[q < 0].sum()) + half) >> shift
    aim = min(max(aim, 0), total)
    near = sorted(
        (x for x in range(total + 1) if reach[-1] >> x & 1), key=lambda x: (abs(x - aim), x)
    )
    return [_trace(q, coarse, reach, x) for x in near[:DP_TRIES]]


def _trace(q: np.ndarray, coarse: list[int], reach: list[int], x: int) -> int:
    """The subset behind coarse sum ``x``: an element is taken only where it must be."""
    mask = 0
    for i in reversed(range(len(q))):
        taken = not reach[i] >> x & 1
        x -= coarse[i] if taken else 0
        mask |= (taken != bool(q[i] < 0)) << i
    return mask
