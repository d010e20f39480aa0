"""Pruning scores against closed forms and finite differences; exact counts in one shot and many."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseticket as st
from sparseticket.tickets import PRUNERS, get_pruner, prune_
from sparseticket.tickets.pruning import gradients, masked_layers, probe

NAMES = sorted(PRUNERS)


def mlp(widths=(12, 10, 8, 3), seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m, bias=False, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def batch(shape=(12,), n=20, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.randint(
        classes, (n,), generator=generator
    )


def converted(model, config):
    st.sparsify_(model, config)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("density", [0.0, 0.13, 0.5, 1.0])
def test_counts_are_exact(name, scope, rounds, density):
    model = mlp()
    config = PRUNERS[name](density=density, scope=scope, rounds=rounds)
    masks = prune_(model, config, [batch()])
    sizes = [120, 80, 24]
    kept = [m.kept for m in masks.values()]
    if scope == "layer":
        assert kept == [int(density * n + 0.5) for n in sizes]
    assert sum(kept) == sum(int(density * n + 0.5) for n in ([224] if scope == "global" else sizes))
    assert list(masks) == ["0", "2", "4"]
    assert all(torch.equal(model.get_submodule(n).mask_words, m.words) for n, m in masks.items())


@pytest.mark.parametrize("name", NAMES)
def test_scoring_changes_nothing_but_masks(name):
    model = converted(conv_net(), PRUNERS[name]())
    before = copy.deepcopy(model.state_dict())
    data = [batch((2, 4, 4))]
    PRUNERS[name]().scores(model, data, F.cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    generator = torch.get_rng_state()
    masks = prune_(model, PRUNERS[name](density=0.3, rounds=2), data)
    assert torch.equal(torch.get_rng_state(), generator)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.mask_words", "5.mask_words"}
    assert masks == prune_(
        converted(conv_net(), PRUNERS[name]()), PRUNERS[name](density=0.3, rounds=2), data
    )


@pytest.mark.parametrize("name", NAMES)
def test_rounds_nest(name):
    seen = []
    model = mlp()
    config = PRUNERS[name](density=0.1, rounds=3)
    prune_(
        model,
        config,
        [batch()],
        before_round=lambda m, r: seen.append(
            {n: layer.mask for n, layer in masked_layers(m).items()}
        ),
    )
    seen.append({n: layer.mask for n, layer in masked_layers(model).items()})
    for larger, smaller in itertools.pairwise(seen):
        for n, mask in smaller.items():
            assert (mask & larger[n]) == mask
    totals = [sum(m.kept for m in masks.values()) for masks in seen]
    assert totals == [224, int(224 * 0.1 ** (1 / 3) + 0.5), int(224 * 0.1 ** (2 / 3) + 0.5), 22]


def test_snip_is_the_gradient_of_a_mask_variable():
    model = mlp()
    x, y = batch()
    variables = [torch.ones_like(m.weight, requires_grad=True) for m in model[::2]]
    h = x
    for i, (layer, mask) in enumerate(zip(model[::2], variables, strict=True)):
        h = F.linear(h if i == 0 else h.relu(), layer.weight * mask)
    expected = torch.autograd.grad(F.cross_entropy(h, y), variables)
    config = PRUNERS["snip"]()
    scores = config.scores(converted(model, config), [(x, y)], F.cross_entropy)
    for found, want in zip(scores.values(), expected, strict=True):
        torch.testing.assert_close(found, want)


def test_snip_of_a_linear_regression():
    """L = mean (w x - y)^2: dL/dm = 2 w mean x (w x - y)."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    x, y = torch.randn(50, 3), torch.randn(50, 1)
    w = model[0].weight.detach()
    expected = 2 * w * ((x @ w.T - y) * x).mean(0)
    config = PRUNERS["snip"]()
    scores = config.scores(converted(model, config), [(x, y)], F.mse_loss)
    torch.testing.assert_close(scores["0"], expected)


def test_grasp_is_the_derivative_of_the_squared_gradient():
    """w * Hg = w * d(g.g / 2)/dw, by central differences."""
    model = mlp((4, 5, 3), dtype=torch.float64)
    x, y = batch((4,))
    data = [(x.double(), y)]
    config = PRUNERS["grasp"](temperature=2.0)
    converted(model, config)

    def loss(out, y):
        return F.cross_entropy(out / 2, y)

    def half_square():
        return sum(float(g.square().sum()) for g in gradients(probe(model), data, loss)) / 2

    scores = config.scores(model, data, F.cross_entropy)
    for name, layer in masked_layers(model).items():
        w = layer.weight.data.view(-1)
        expected = torch.zeros_like(w)
        for place in range(len(w)):
            old, values = float(w[place]), []
            for step in (1e-5, -1e-5):
                w[place] = old + step
                values.append(half_square())
            w[place] = old
            expected[place] = old * (values[0] - values[1]) / 2e-5
        expected = expected.view_as(layer.weight)
        torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=1e-8)


def test_grasp_of_a_quadratic():
    """L = mean over outputs and data of (W x - y)^2 has H = 2/o C: Hg = 2/o g C."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False, dtype=torch.float64))
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    w, c = model[0].weight.detach(), x.T @ x / 40
    g = (x @ w.T - y).T @ x / 40
    config = PRUNERS["grasp"](temperature=1.0)
    scores = config.scores(converted(model, config), [(x, y)], F.mse_loss)
    torch.testing.assert_close(scores["0"], w * (g @ c))


def test_synflow_is_the_flow_through_a_weight():
    model = mlp((3, 4, 2))
    config = PRUNERS["synflow"]()
    flow = config.flow(converted(model, config), torch.randn(1, 3))
    a, b = model[0].weight.detach().double().abs(), model[2].weight.detach().double().abs()
    torch.testing.assert_close(flow["0"], a * b.sum(0)[:, None])
    torch.testing.assert_close(flow["2"], b * a.sum(1))


def test_synflow_is_conserved():
    """Every layer's scores sum to R, and so do those into and out of every hidden neuron."""
    model = mlp((64, 32, 16, 4))
    config = PRUNERS["synflow"](density=0.2, rounds=3)
    prune_(model, config, [batch((64,))])
    flow = config.flow(model, torch.empty(1, 64))
    sums = torch.stack([f.sum() for f in flow.values()])
    torch.testing.assert_close(sums, sums[:1].expand(3), rtol=1e-12, atol=0)
    for before, after in (("0", "2"), ("2", "4")):
        torch.testing.assert_close(flow[before].sum(1), flow[after].sum(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("density", [0.01, 0.005])
def test_synflow_needs_rounds_not_to_collapse(density, caplog):
    kept = {}
    for rounds in (1, 100):
        config = PRUNERS["synflow"](density=density, rounds=rounds)
        masks = prune_(mlp((64, 32, 16, 4)), config, [batch((64,))])
        kept[rounds] = [m.kept for m in masks.values()]
    assert kept[1][:2] == [0, 0] and min(kept[100]) > 0
    assert "nothing is kept in 0, 2" in caplog.text


def test_synflow_of_a_deep_net_is_finite():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(90)])
    config = PRUNERS["synflow"](density=0.5, rounds=1)
    masks = prune_(model, config, [batch((64,))])
    assert sum(m.kept for m in masks.values()) == 90 * 64 * 32


def test_magnitude_and_random_are_selections():
    model = mlp()
    scores = [m.weight.detach() for m in model[::2]]
    expected = st.select_mask(scores, density=0.2, scope="global")
    assert list(prune_(model, PRUNERS["magnitude"](density=0.2)).values()) == expected
    random = PRUNERS["random"](density=0.2, scope="layer", seed=7)
    masks = prune_(mlp(), random)
    assert masks["2"] == st.random_mask(7, "2", (8, 10), 16)
    many = dataclasses.replace(random, rounds=5)
    assert prune_(mlp(), many) == masks
    assert prune_(mlp(), dataclasses.replace(random, seed=8)) != masks


def test_a_floor_prevents_collapse(caplog):
    config = PRUNERS["synflow"](density=0.01, rounds=1, min_keep_per_layer=3)
    masks = prune_(mlp((64, 32, 16, 4)), config, [batch((64,))])
    assert min(m.kept for m in masks.values()) == 3
    assert "collapse" not in caplog.text


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_scores_need_batches(name):
    with pytest.raises(ValueError, match="batches: got none"):
        prune_(mlp(), PRUNERS[name](density=0.5))


def test_nan_scores_raise():
    x, y = batch()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        prune_(mlp(), PRUNERS["snip"](density=0.5), [(x, y)])


@pytest.mark.parametrize("name", NAMES)
def test_settings(name):
    config = get_pruner(name)
    assert all(field.metadata["help"] for field in dataclasses.fields(config))
    assert "Deviations from" in sys.modules[config.__module__].__doc__
    for bad in ({"density": 2}, {"scope": "x"}, {"rounds": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            config(**bad)
    with pytest.raises(ValueError, match="min_keep_per_layer"):
        config(min_keep_per_layer=1, scope="layer")
    with pytest.raises(ValueError, match="pruner: got 'x', known: magnitude"):
        get_pruner("x")
