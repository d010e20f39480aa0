"""Layer density rules: exact totals, closed forms, and how far the published code falls short."""

from __future__ import annotations

import itertools
import math

import pytest

from sparseticket.densities import DENSITY_RULES, layer_densities

_WIDTHS = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
VGG16 = [(o, i, 3, 3) for i, o in itertools.pairwise(_WIDTHS)] + [(10, 512)]
SIZES = [math.prod(s) for s in VGG16]


def overall(densities):
    return sum(d * n for d, n in zip(densities, SIZES, strict=True)) / sum(SIZES)


@pytest.mark.parametrize("rule", [r for r in DENSITY_RULES if r != "induced"])
@pytest.mark.parametrize("density", [0, 0.001, 0.01, 0.1, 0.5, 0.97, 1])
def test_every_rule_meets_the_density(rule, density):
    densities = layer_densities(rule, VGG16, density)
    assert all(0 <= d <= 1 for d in densities)
    assert overall(densities) == pytest.approx(density, rel=1e-9)


@pytest.mark.parametrize(
    ("density", "balanced", "erk"),
    [(0.5, 0.324, 0.446), (0.1, 0.079, 0.0935), (0.01, 0.0090, 0.0097), (0.001, 0.001, 0.001)],
)
def test_the_published_rules_fall_short(density, balanced, erk):
    for rule, expected in (("balanced", balanced), ("erk", erk)):
        found = overall(layer_densities(rule, VGG16, density, compat=True))
        assert found == pytest.approx(expected, abs=5e-4 if density > 0.01 else 5e-5)


def test_closed_forms():
    shapes = [(4, 5), (10, 4), (2, 10)]
    assert layer_densities("balanced", shapes, 0.3) == pytest.approx([0.4, 0.2, 0.4])
    assert layer_densities("balanced", shapes, 0.3) == layer_densities("epl", shapes, 0.3)
    raw = [9 / 20, 14 / 40, 12 / 20]
    scale = 0.25 * 80 / (9 + 14 + 12)
    assert layer_densities("erk", shapes, 0.25) == pytest.approx([scale * r for r in raw])
    a, b, c = layer_densities("pyramidal", shapes, 0.3)
    assert (b, c) == pytest.approx((a**2, a**3))


def test_induced_keeps_proportions_until_a_layer_is_full():
    shapes = [(10, 10)] * 3
    assert layer_densities("induced", shapes, 0.1, like=[0.5, 0.25, 0.25]) == pytest.approx(
        [0.15, 0.075, 0.075]
    )
    assert layer_densities("induced", shapes, 0.8, like=[0.8, 0.1, 0.1]) == pytest.approx(
        [1, 0.7, 0.7]
    )
    with pytest.raises(ValueError, match="like: density"):
        layer_densities("induced", shapes, 0.5, like=[1.0, 0.0, 0.0])


def test_bad_rules():
    with pytest.raises(ValueError, match="rule: got 'x', accepted: uniform"):
        layer_densities("x", VGG16, 0.5)
    with pytest.raises(ValueError, match="like"):
        layer_densities("induced", VGG16, 0.5)
    with pytest.raises(ValueError, match="like"):
        layer_densities("erk", VGG16, 0.5, like=[0.5])


def test_empty_layers_take_nothing():
    assert layer_densities("balanced", [(0, 3), (4, 5)], 0.5)[1] == pytest.approx(0.5)
    assert layer_densities("erk", [], 0.5) == []
