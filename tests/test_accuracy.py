"""The digits cases of bench/accuracy.py, inside their bounds, and their orderings."""

from __future__ import annotations

from statistics import mean

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


@pytest.mark.parametrize("name", [case.name for case in DIGITS if case.model == "mlp"])
def test_digits_case_is_inside_its_bound(measured, name):
    """One seed, and no convolutions: ``python -m bench.accuracy strong`` runs all."""
    case = BY_NAME[name]
    assert case.low <= measured(name, 0) <= case.high


WIDE = [gap for gap in DIGITS_GAPS if gap[2] >= 3 and BY_NAME[gap[0]].model == "mlp"]


@pytest.mark.parametrize(("better", "worse", "points"), WIDE)
def test_wide_orderings_hold(measured, better, worse, points):
    """As means of three seeds, like the command's; random masks are far off in every one."""
    seeds = (0,) if BY_NAME[worse].control == "random mask" else (0, 1, 2)
    gaps = [measured(better, seed) - measured(worse, seed) for seed in seeds]
    assert mean(gaps) >= points
