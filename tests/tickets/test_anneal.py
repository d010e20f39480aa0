"""The published schedules against their closed forms; annealed edge-popup."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.formats import kept_count
from sparseticket.tickets.anneal import SCHEDULES, density_at
from sparseticket.train import Callback


def densities(schedule, density, epochs, period=5):
    return [density_at(schedule, density, e, epochs, period) for e in range(epochs)]


def test_cubic_is_that_of_biprop():
    expected = [0.5, 0.4187, 0.3536, 0.3029, 0.2648, 0.2375, 0.2192, 0.2081, 0.2024, 0.2003, 0.2]
    assert densities("cubic", 0.2, 11) == pytest.approx(expected, abs=1e-4)
    assert densities("cubic", 0.7, 11) == [0.7] * 11


def test_power_levels_iterated():
    assert densities("power", 0.1, 4) == pytest.approx([0.1 ** (e / 4) for e in (1, 2, 3, 4)])
    ratio = (0.05 / 0.6) ** (1 / 3)
    expected = [0.6 * ratio, 0.6 * ratio, 0.6 * ratio**2, 0.6 * ratio**2, 0.05, 0.05, 0.05]
    assert densities("levels", 0.05, 7, period=2) == pytest.approx(expected)
    # removed fraction of a pruning: 1 - exp(ln(target) / floor((E-1)/T))
    kept = 0.0059 ** (1 / 29)
    got = densities("iterated", 0.0059, 150, period=5)
    assert got == pytest.approx([kept ** (e // 5) for e in range(150)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_they_fall_to_the_target(schedule):
    for density, epochs in itertools.product((0.9, 0.5, 0.05, 0.0, 1.0), (1, 2, 3, 10, 31)):
        sequence = densities(schedule, density, epochs, period=3)
        assert sequence[-1] == density
        assert all(a >= b for a, b in itertools.pairwise(sequence))
        assert all(0 <= d <= 1 for d in sequence)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_follow_the_schedule_and_best_waits_for_it(scope):
    seen = []

    class Watch(Callback):
        def on_epoch_end(self, state):
            seen.append(sum(m.mask.kept for m in state.model))

    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10))
    x, y = torch.randn(64, 10), torch.randint(10, (64,))
    config = st.EdgePopup(density=0.1, scope=scope, anneal="power")
    result = st.search(
        *(model, [(x, y)], [(x, y)], config),
        epochs=4,
        callbacks=[Watch()],
        progress=False,
        select="best",
    )
    sizes = (200, 200) if scope == "layer" else (400,)
    expected = [sum(kept_count(d, n) for n in sizes) for d in densities("power", 0.1, 4)]
    assert seen == expected
    assert sum(m.kept for m in result.ticket.masks.values()) == 40
    assert config.settled(3, 4) and not config.settled(2, 4)


@pytest.mark.parametrize(("first", "last"), [("full", "searched"), ("dense", "full")])
def test_first_and_last_layers(first, last):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 4))
    config = st.EdgePopup(density=0.2, scope="global", first_layer=first, last_layer=last)
    report = st.sparsify_(model, config)
    assert type(model[0]) is (nn.Linear if first == "dense" else st.SparseLinear)
    assert ("0.weight" in report.not_weight_free) == (first == "dense")
    if first == "full":
        assert model[0].mask.density == 1
    assert (model[3].mask.density == 1) == (last == "full")
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    if first != "dense":
        result = st.search(model, [(x, y)], None, config, epochs=2, progress=False)
        assert result.ticket.masks["0"].density == 1


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"anneal": "linear"}, "anneal: got 'linear', accepted: none, power"),
        ({"anneal_period": 0}, "anneal_period: got 0"),
        ({"first_layer": "no"}, "first_layer: got 'no'"),
    ],
)
def test_refusals(kwargs, text):
    with pytest.raises(ValueError, match=text):
        st.EdgePopup(**kwargs)
