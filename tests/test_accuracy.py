"""The digits cases of bench/accuracy.py, inside their bounds, and their orderings."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="needs the [demo] extra: scikit-learn's digits")

from bench.accuracy import DIGITS, DIGITS_GAPS, accuracy

BY_NAME = {case.name: case for case in DIGITS}


@pytest.fixture(scope="module")
def measured():
    cache: dict[tuple[str, int], float] = {}

    def get(name: str, seed: int) -> float:
        if (name, seed) not in cache:
            cache[name, seed] = accuracy(BY_NAME[name], seed)
        return cache[name, seed]

    return get


@pytest.mark.parametrize("name", BY_NAME)
def test_digits_case_is_inside_its_bound(measured, name):
    """Seed 0; ``python -m bench.accuracy strong`` runs them all."""
    case = BY_NAME[name]
    assert case.low <= measured(name, 0) <= case.high


@pytest.mark.parametrize(("better", "worse", "points"), DIGITS_GAPS)
def test_orderings_hold(measured, better, worse, points):
    seeds = (0,) if BY_NAME[worse].control == "random mask" else (0, 1, 2)
    gap = sum(measured(better, s) - measured(worse, s) for s in seeds) / len(seeds)
    assert gap >= points
