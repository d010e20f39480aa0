"""Partially frozen networks: the layer rules' oracles, what stays frozen, what that saves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.densities import layer_densities
from sparseticket.tickets.engine import live_layers
from sparseticket.train import Callback, build_model

CONV6 = [
    *((64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (256, 128, 3, 3)),
    *((256, 256, 3, 3), (256, 4096), (256, 256), (10, 256)),
]
SIZES = [math.prod(s) for s in CONV6]


def counts(rule, density):
    return [d * n for d, n in zip(layer_densities(rule, CONV6, density), SIZES, strict=True)]


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.5, [1728, 36864, 73728, 147456, 267573, 267573, 267573, 65536, 2560]),
        (0.3, [1728, 36864, 73728, 124484, 124484, 124484, 124484, 65536, 2560]),
        (0.2, [1728, 36864, *[69109] * 5, 65536, 2560]),
    ],
)
def test_epl(density, expected):
    assert counts("epl", density) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.5, [1, 0.6587, 0.4866, 0.3220, 0.2396, 0.1591, 0.7521, 1, 1]),
        (0.3, [1, 0.3849, 0.2844, 0.1881, 0.1400, 0.0930, 0.4395, 0.8272, 1]),
        (0.2, [1, 0.2558, 0.1890, 0.1250, 0.0931, 0.0618, 0.2920, 0.5497, 1]),
    ],
)
def test_erk(density, expected):
    assert layer_densities("erk", CONV6, density) == pytest.approx(expected, abs=6e-5)


def test_igq():
    expected = [1713, 31348, 54538, 86549, 122500, 154612, 174640, 49922, 2529]
    assert counts("igq", 0.3) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("rule", ["epl", "erk", "igq", "uniform"])
def test_rules_give_the_density_asked_for(rule):
    for density in (0, 0.01, 0.37, 0.9, 1):
        densities = layer_densities(rule, CONV6, density)
        assert all(0 <= d <= 1 + 1e-12 for d in densities)
        assert sum(counts(rule, density)) == pytest.approx(density * sum(SIZES), rel=1e-6)


def test_counts_of_conv6():
    pruned, locked = zip(*st.Frozen(pruned=0.25, locked=0.25).counts(CONV6), strict=True)
    assert list(pruned) == pytest.approx([0, 0, 0, 0, 0, 53271, 512024, 0, 0], abs=1)
    assert list(locked) == pytest.approx([0, 0, 0, 0, 27339, 268979, 268979, 0, 0], abs=1)


def _net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 40), nn.Linear(40, 4)
    )


def _batches():
    return [(torch.randn(16, 1, 5, 5), torch.randint(4, (16,))) for _ in range(3)]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", ["epl", "erk", "igq", "uniform"])
def test_frozen_weights_stay_frozen(rule, scope):
    if scope == "layer" and rule != "uniform":
        pruned = locked = 0.05
    else:
        pruned = locked = 0.3
    model = _net()
    config = st.Frozen(density=0.5, pruned=pruned, locked=locked, rule=rule, scope=scope)
    try:
        st.sparsify_(model, config)
    except ValueError as error:  # a layer of its own may have too little that is free
        assert scope == "layer" and "locked are locked" not in str(error)
        return
    total = sum(layer.weight.numel() for layer in live_layers(model))

    class Watch(Callback):
        def on_step_end(self, state):
            kept = 0
            for layer in live_layers(state.model):
                free, locked = layer.pattern.free, layer.pattern.locked_mask
                assert layer.mask & locked == locked
                assert (layer.mask & ~(free | locked)).kept == 0
                kept += layer.mask.kept
            assert kept == round(0.5 * total) or scope == "layer"

    st.search(model, _batches(), None, config, epochs=2, progress=False, callbacks=[Watch()])


def test_scores_exist_for_free_weights_only():
    """Scores, gradients and momentum of a 70 % frozen net: 0.3 of the unfrozen net's bytes."""
    sizes = {}
    for pruned, locked in ((0.0, 0.0), (0.35, 0.35)):
        model = build_model("conv2", in_shape=(1, 8, 8), num_classes=10)
        st.sparsify_(model, st.Frozen(density=0.5, pruned=pruned, locked=locked))
        scores = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(scores, lr=0.1, momentum=0.9)
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        state = [t for s in optimizer.state.values() for t in s.values()]
        sizes[pruned] = sum(t.nbytes for t in [*scores, *(s.grad for s in scores), *state])
    assert sizes[0.35] <= 0.301 * sizes[0.0]


def test_nothing_frozen_is_global_edge_popup():
    config = st.Frozen(density=0.3, pruned=0, locked=0, weights="uniform", seed=4)
    ours, theirs = _net(), _net()
    st.sparsify_(ours, config)
    st.sparsify_(theirs, st.EdgePopup(density=0.3, scope="global", weights="uniform", seed=4))
    for a, b in zip(ours, theirs, strict=True):
        if hasattr(a, "mask"):
            assert a.mask == b.mask and torch.equal(a.weight, b.weight)
            assert torch.equal(a.pattern.spread(a.scores), b.scores)


def test_only_locked_and_nothing_to_search():
    model = _net()
    st.sparsify_(model, st.Frozen(density=0.4, pruned=0.2, locked=0.4, rule="uniform"))
    for layer in live_layers(model):
        assert layer.mask == layer.pattern.locked_mask
    model = _net()
    st.sparsify_(model, st.Frozen(density=0.4, pruned=0.6, locked=0, rule="uniform"))
    for layer in live_layers(model):
        assert layer.mask == layer.pattern.free
    model = _net()
    config = st.Frozen(density=0.4, pruned=0.6, locked=0.4, rule="uniform")
    result = st.search(model, _batches(), None, config, epochs=1, progress=False)
    assert result.ticket.info()["raw_bits"] == 0


@pytest.mark.parametrize("sizes", [(0.6, 0.1), (0.1, 0.6)])
def test_infeasible_densities_raise(sizes):
    with pytest.raises(ValueError, match=r"density: got 0\.5 with pruned"):
        st.Frozen(density=0.5, pruned=sizes[0], locked=sizes[1])


def test_dynamic_scale_of_an_empty_layer_is_finite():
    model = nn.Sequential()
    model.wide, model.narrow = nn.Linear(400, 30), nn.Linear(30, 4)
    config = st.Frozen(density=0.001, pruned=0.5, locked=0, scale="dynamic", rule="uniform")
    st.sparsify_(model, config)
    for layer in live_layers(model):
        assert math.isfinite(layer.recipe.sigma)
        density = layer.mask.density or 1
        expected = layer.recipe.std / math.sqrt(density)
        assert layer.recipe.sigma == pytest.approx(expected, rel=2**-8)
    assert bool(model(torch.randn(2, 400)).isfinite().all())


def test_a_ticket_stores_the_free_bits_only():
    model = build_model("mlp", in_shape=(1, 8, 8), num_classes=10)
    config = st.Frozen(density=0.5, pruned=0.35, locked=0.35)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    ticket = st.search(model, [(x, y)], None, config, epochs=1, progress=False).ticket
    info = ticket.info()
    assert info["raw_bits"] == pytest.approx(0.3 * 84480, abs=3)
    assert info["coded_bits"] <= info["raw_bits"] + 8 * 3
    assert (info["kept"], info["format_version"]) == (42240, 2)
