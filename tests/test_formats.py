from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from sparseticket import formats

DENSITIES = (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
KEPT = {  # specs/strong_tickets.md 0, with floor(density * n + 0.5)
    1: (0, 0, 0, 0, 1, 1, 1, 1),
    2: (0, 0, 0, 1, 1, 1, 2, 2),
    3: (0, 0, 0, 1, 2, 2, 3, 3),
    10: (0, 0, 1, 3, 5, 7, 9, 10),
    100: (0, 1, 10, 30, 50, 70, 90, 100),
    1728: (0, 17, 173, 518, 864, 1210, 1555, 1728),
    36864: (0, 369, 3686, 11059, 18432, 25805, 33178, 36864),
}


@pytest.mark.parametrize("n", KEPT)
def test_kept_count(n):
    assert tuple(formats.kept_count(d, n) for d in DENSITIES) == KEPT[n]
    assert all(type(formats.kept_count(d, n)) is int for d in DENSITIES)


@pytest.mark.parametrize("n", KEPT)
def test_kept_count_in_exact_arithmetic(n):
    """The float64 product, then the nearest integer in rationals with halves going up."""
    for density in (*DENSITIES, 1 / 3, 2 / 3, 0.005, 0.125, 0.999):
        product = Fraction(density * n)
        assert formats.kept_count(density, n) == math.floor(product + Fraction(1, 2))


def test_kept_count_of_large_and_empty_layers():
    assert formats.kept_count(0.7, 68_814_016) == 48_169_811  # float32 would give ...812
    assert formats.kept_count(0.5, 0) == 0
    assert formats.kept_count(5e-324, 10) == 0


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, math.inf, -math.inf, 2, -1])
def test_densities_out_of_range(density):
    for check in (formats.check_density, lambda d: formats.kept_count(d, 10)):
        with pytest.raises(ValueError, match=r"density: got .*, need the kept fraction.* \[0, 1\]"):
            check(density)


@pytest.mark.parametrize("density", [True, False, "0.5", None, [0.5], 0.5 + 0j])
def test_densities_of_other_types(density):
    with pytest.raises(TypeError, match=r"rate: got .*, need a number in \[0, 1\]"):
        formats.check_density(density, "rate")


def test_density_is_returned_as_a_float():
    assert [formats.check_density(d) for d in (0, 1, 0.25)] == [0.0, 1.0, 0.25]
    assert all(type(formats.check_density(d)) is float for d in (0, 1, 0.25))


# shape: (canonical [O, K], (channels, taps), words)
SHAPES = {
    (): ((1, 1), (1, 1), (1, 2)),
    (5,): ((1, 5), (5, 1), (1, 2)),
    (0,): ((1, 0), (0, 1), (1, 0)),
    (7, 64): ((7, 64), (64, 1), (7, 2)),
    (7, 65): ((7, 65), (65, 1), (7, 4)),
    (0, 5): ((0, 5), (5, 1), (0, 2)),
    (5, 0): ((5, 0), (0, 1), (5, 0)),
    (8, 3, 5): ((8, 15), (3, 5), (8, 2)),
    (8, 16, 3, 3): ((8, 144), (16, 9), (8, 6)),
    (8, 4, 3, 3): ((8, 36), (4, 9), (8, 2)),  # groups: dimension 1 is channels / groups
    (2, 3, 2, 2, 2): ((2, 24), (3, 8), (2, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    canonical, taps, words = SHAPES[shape]
    assert formats.canonical_shape(shape) == canonical
    assert formats.channels_and_taps(shape) == taps
    assert formats.words_shape(shape) == words
    assert canonical[0] * canonical[1] == math.prod(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    matrix = formats.to_canonical(tensor)
    assert matrix.shape == formats.canonical_shape(shape)
    assert torch.equal(formats.from_canonical(matrix, shape), tensor)


def test_canonical_order():
    linear = torch.randn(4, 7)
    assert torch.equal(formats.to_canonical(linear), linear)
    conv = torch.randn(4, 3, 2, 5)
    expected = conv.permute(0, 2, 3, 1).reshape(4, 30)  # channels-last: tap by tap
    assert torch.equal(formats.to_canonical(conv), expected)
    last = conv.contiguous(memory_format=torch.channels_last)
    assert torch.equal(formats.to_canonical(last), expected)
    assert formats.to_canonical(last).data_ptr() == last.data_ptr()  # a view
    volume = torch.randn(2, 3, 2, 4, 5)
    for h, w, d, c in [(0, 0, 0, 0), (1, 2, 3, 1), (1, 3, 4, 2)]:
        column = ((h * 4 + w) * 5 + d) * 3 + c
        assert formats.to_canonical(volume)[1, column] == volume[1, c, h, w, d]
