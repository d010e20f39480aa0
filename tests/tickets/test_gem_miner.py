"""Gem-Miner: projection, flags, the closed form of its prunings, the penalty."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.tickets.engine import live_layers
from sparseticket.tickets.gem_miner import flags, prune, pruned_fraction
from sparseticket.train import Callback


def _net():
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 10))


def _batches():
    return [(torch.randn(16, 12), torch.randint(10, (16,))) for _ in range(3)]


@pytest.mark.parametrize(
    ("density", "epochs", "period", "expected"),
    [
        (0.0059, 150, 5, 0.16221),
        (0.0144, 150, 5, 0.13604),
        (0.0372, 150, 5, 0.10729),
        (0.0059, 150, 8, 0.24810),
        (0.5, 2, 5, 0.0),
    ],
)
def test_pruned_fraction(density, epochs, period, expected):
    assert pruned_fraction(density, epochs, period) == pytest.approx(expected, abs=1e-5)


def test_flags_fall_by_the_closed_form():
    config, model, seen = st.GemMiner(density=0.1, period=2), _net(), []

    class Watch(Callback):
        def on_step_end(self, state):
            layers = live_layers(state.model)
            now = [flags(layer) for layer in layers]
            for layer, flag in zip(layers, now, strict=True):
                assert layer.scores.min() >= 0 and layer.scores.max() <= 1
                kept = st.PackedMask.from_dense(layer.scores > 0.5) & flag
                assert layer.mask == kept
            if seen:
                assert all(a & b == b for a, b in zip(seen[-1], now, strict=True))
            seen.append(now)

    result = st.search(
        model, _batches(), None, config, epochs=9, progress=False, callbacks=[Watch()]
    )
    active, expected = 660, []
    for epoch in range(9):
        if epoch and epoch % 2 == 0:
            active -= math.ceil(pruned_fraction(0.1, 9, 2) * active)
        expected += [active] * 3
    assert [sum(f.kept for f in now) for now in seen] == expected
    assert result.ticket.info()["kept"] == active <= 66  # unflagged: all that have a flag


def test_pruning_is_global_and_takes_the_lowest():
    model = _net()
    st.sparsify_(model, st.GemMiner())
    layers = live_layers(model)
    prune(layers, 0.25)
    left = torch.cat([p.scores[flags(p).to_dense()] for p in layers])
    gone = torch.cat([p.scores[~flags(p).to_dense()] for p in layers])
    assert len(gone) == 165 and gone.max() <= left.min()


def test_penalty_is_the_gradient_of_the_squares_of_flagged_scores():
    model, config = _net(), st.GemMiner(penalty=0.01)
    st.sparsify_(model, config)
    layers = live_layers(model)
    prune(layers, 0.5)
    config.update(layers, 0)
    x = torch.randn(4, 12)
    model(x).square().sum().backward()
    before = [layer.scores.grad.clone() for layer in layers]
    config.before_step(model)
    for layer, grad in zip(layers, before, strict=True):
        flagged = flags(layer).to_dense()
        added = layer.scores.grad - grad
        torch.testing.assert_close(added, 0.02 * layer.scores * flagged, atol=1e-6, rtol=1e-4)
        assert not layer.scores.grad[~flagged].any()


def test_rounded_keeps_no_more():
    config = st.GemMiner(density=0.5, final="rounded")
    result = st.search(_net(), _batches(), None, config, epochs=1, progress=False)
    assert 0 < result.ticket.info()["kept"] < 660


def test_refusals():
    with pytest.raises(ValueError, match="density: got 0"):
        st.GemMiner(density=0)
    with pytest.raises(ValueError, match="final: got 'all'"):
        st.GemMiner(final="all")
