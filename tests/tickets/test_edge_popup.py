"""Edge-popup: the config, what it does to a model, a search on made-up data, the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.formats import kept_count
from sparseticket.tickets import METHODS, get_method


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.LayerNorm(32),
        nn.Linear(32, 4),
    )


def _layers(model):
    return [m for m in model.modules() if isinstance(m, st.SparseLinear | st.SparseConv2d)]


def _scramble(model):
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(2, 3)
    return model


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_search_learns_and_moves_only_scores(scope):
    """Opposite quadrants; the random net is at chance, the ticket is not, the weights stay."""
    x = torch.randn(256, 2)
    target = (x.prod(1) > 0).long()
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    st.sparsify_(model, st.EdgePopup(density=0.5, scope=scope, seed=1))
    weights = [layer.weight.clone() for layer in _layers(model)]
    first = [layer.mask for layer in _layers(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(layer.scores) for layer in _layers(model)}
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-4)
    st.attach(model, optimizer)

    def loss():
        return nn.functional.cross_entropy(model(x), target)

    start = loss().item()
    total = sum(w.numel() for w in weights)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        kept = [layer.mask.kept for layer in _layers(model)]
        if scope == "layer":
            assert kept == [kept_count(0.5, w.numel()) for w in weights]
        else:
            assert sum(kept) == kept_count(0.5, total)
    assert loss() < 0.3 * start
    assert (model(x).argmax(1) == target).float().mean() > 0.97
    for layer, weight, mask in zip(_layers(model), weights, first, strict=True):
        assert torch.equal(layer.weight.view(torch.int32), weight.view(torch.int32))
        assert layer.weight.grad is None and layer.mask != mask


def test_global_masks_equal_the_concatenated_top():
    model = _net()
    st.sparsify_(model, st.EdgePopup(density=0.3, scope="global", seed=2))
    layers = _layers(model)
    expected = st.select_mask([m.scores for m in layers], density=0.3, scope="global")
    assert [m.mask for m in layers] == expected
    assert len({m.mask.density for m in layers}) > 1
    assert all(m.options.score_init == "normal" for m in layers)
    guarded = _net()
    st.sparsify_(guarded, st.EdgePopup(density=0.02, scope="global", min_keep_per_layer=3))
    assert min(m.mask.kept for m in _layers(guarded)) == 3


def test_norms_and_biases_are_frozen_at_one_and_zero():
    model = _scramble(_net())
    report = st.sparsify_(model, st.EdgePopup(seed=1))
    for i in (1, 4, 6):
        assert bool((model[i].weight == 1).all()) and not model[i].bias.any()
    for layer in _layers(model):
        assert not layer.bias.any()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.scores" for i in (0, 3, 7)
    }
    assert report.not_weight_free == []
    assert "not weight-free" not in str(report)


def test_kept_biases_and_affine_norms_are_flagged():
    dense = _scramble(_net())
    model = copy.deepcopy(dense)
    report = st.sparsify_(model, st.EdgePopup(seed=1, keep_bias=True, affine=True))
    expected = [f"{i}.{name}" for i in (1, 4, 6) for name in ("weight", "bias")]
    expected += [f"{i}.bias" for i in (0, 3, 7)]
    assert sorted(report.not_weight_free) == sorted(expected)
    assert "not weight-free: " in str(report)
    for name in expected:
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
        assert model.get_parameter(name).requires_grad


def test_layers_left_dense_are_flagged_and_left_alone():
    model = _scramble(_net())
    report = st.sparsify_(model, st.EdgePopup(), lambda module, name: name != "7")
    assert report.not_weight_free == ["7.weight", "7.bias"]
    assert bool((model[7].bias > 1).all())


def test_norms_of_parts_that_are_left_out_keep_their_values():
    model = _scramble(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    before = model[1].weight.detach().clone()
    report = st.sparsify_(model, st.EdgePopup(), ["2"])
    assert torch.equal(model[1].weight, before) and model[1].weight.requires_grad
    assert report.reset == [] and "1.weight" in report.not_weight_free
    report = st.sparsify_(model, st.EdgePopup(), ["0", "1"])
    assert bool((model[1].weight == 1).all()) and report.reset == ["1"]
    assert "reset to 1 and 0, frozen: 1" in str(report)


@pytest.mark.parametrize("scale", ["none", "density", "dynamic"])
def test_options_reach_the_layers(scale):
    config = st.EdgePopup(0.2, weights="normal", scale=scale, transform="identity", seed=3)
    model = _net()
    st.sparsify_(model, config)
    for name, layer in zip("037", _layers(model), strict=True):
        assert (layer.form, layer.options.transform) == ("scored", "identity")
        twin = type(layer).from_dense(_net()[int(name)], layer=name, **config.plan(name, layer))
        assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.scores, twin.scores)
        factor = 1 if scale == "none" else layer.mask.density if scale == "dynamic" else 0.2
        assert layer.recipe.sigma == pytest.approx(layer.recipe.std / factor**0.5, rel=2**-8)


def test_equal_seeds_give_equal_models():
    models = [_net() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        st.sparsify_(model, st.EdgePopup(seed=seed))
    a, b, c = ([m.weight for m in _layers(model)] for model in models)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"density": 1.01}, ValueError, "density"),
        ({"density": None}, TypeError, "density"),
        ({"scope": "model"}, ValueError, "scope: got 'model', accepted: layer, global"),
        ({"weights": "xavier"}, ValueError, "weights"),
        ({"scale": True}, ValueError, "scale: got True"),
        ({"transform": "square"}, ValueError, "transform"),
        ({"seed": -3}, ValueError, "seed: got -3"),
        ({"seed": "0"}, TypeError, "seed"),
        ({"score_init": "zeros"}, ValueError, "score_init"),
        ({"min_keep_per_layer": 1}, ValueError, "min_keep_per_layer"),
        ({"scope": "global", "min_keep_per_layer": -1}, ValueError, "min_keep_per_layer: got -1"),
        ({"prune_rate": 0.5}, TypeError, "prune_rate"),
        ({"affine": "no"}, TypeError, "affine: got 'no'"),
        ({"keep_bias": 1}, TypeError, "keep_bias: got 1"),
        ({"scope": "global", "min_keep_per_layer": 1.5}, TypeError, "min_keep_per_layer: got 1.5"),
        ({"score_init": ""}, ValueError, "score_init"),
    ],
)
def test_config_refuses(kwargs, error, text):
    with pytest.raises(error, match=text):
        st.EdgePopup(**kwargs)


def test_an_infeasible_guard_leaves_the_model_alone():
    model = _net()
    before = list(model.modules())
    with pytest.raises(ValueError, match="alone keeps"):
        st.sparsify_(model, st.EdgePopup(density=0.01, scope="global", min_keep_per_layer=20))
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_registry():
    assert METHODS["edge-popup"] is get_method("edge-popup") is st.EdgePopup
    with pytest.raises(ValueError, match="method: got 'edgepopup', known: edge-popup"):
        get_method("edgepopup")


@pytest.mark.parametrize("weights", ["signed_constant", "uniform", "normal", "constant"])
@pytest.mark.parametrize("init", ["kaiming", "xavier", "torch"])
def test_every_distribution_and_deviation(weights, init):
    model = nn.Sequential(nn.Conv2d(8, 40, 3), nn.Flatten(), nn.Linear(40, 30))
    st.sparsify_(model, st.EdgePopup(weights=weights, init=init, density=0.3, scale="density"))
    for layer, (fan_in, fan_out) in zip(_layers(model), ((72, 360), (40, 30)), strict=True):
        bottom = {"kaiming": fan_in, "xavier": fan_in + fan_out, "torch": 6 * fan_in}[init]
        sigma = (2 / bottom / 0.3) ** 0.5
        assert layer.recipe.sigma == pytest.approx(sigma, rel=2**-8)
        spread = layer.weight.square().mean().sqrt().item()
        assert spread == pytest.approx(sigma, rel=0.1)
        if weights == "constant":
            assert bool((layer.weight == layer.recipe.sigma).all())
    x = torch.randn(2, 8, 3, 3)
    ticket = st.Ticket(st.Ticket.from_model(model).raw)
    fresh = nn.Sequential(nn.Conv2d(8, 40, 3), nn.Flatten(), nn.Linear(40, 30))
    for a, b in zip(_layers(model), _layers(ticket.apply(fresh)), strict=True):
        assert torch.equal(a.weight * a.mask.to_dense(), b.weight)
    torch.testing.assert_close(model(x), fresh(x))


def test_scores_and_signs_start_as_published():
    """|s| <= 1/sqrt(fan_in); one magnitude, half of the signs negative (4 deviations)."""
    layer = nn.Sequential(nn.Linear(300, 200))
    st.sparsify_(layer, st.EdgePopup())
    layer = layer[0]
    assert layer.scores.abs().max() <= 300**-0.5
    assert layer.weight.abs().unique().numel() == 1
    negative = (layer.weight < 0).float().mean().item()
    assert negative == pytest.approx(0.5, abs=4 * 0.5 / 60000**0.5)


def test_one_step_by_hand():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    st.sparsify_(model, st.EdgePopup(density=0.5, seed=3))
    layer, x = model[0], torch.tensor([[1.0, -2.0, 3.0]])
    scores, weight = layer.scores.detach().clone(), layer.weight.clone()
    optimizer = torch.optim.SGD([layer.scores], lr=0.5, weight_decay=0.01)
    st.attach(model, optimizer)
    (layer(x) * torch.tensor([[1.0, -1.0]])).sum().backward()
    optimizer.step()
    dense = torch.tensor([[1.0], [-1.0]]) @ x
    expected = scores - 0.5 * (dense * weight * scores.sign() + 0.01 * scores)
    torch.testing.assert_close(layer.scores.detach(), expected)
    kept = expected.abs().flatten().argsort(descending=True)[:3]
    assert set(layer.mask.to_dense().flatten().nonzero().flatten().tolist()) == set(kept.tolist())


def test_a_score_of_zero_never_moves():
    model = nn.Sequential(nn.Linear(4, 3))
    st.sparsify_(model, st.EdgePopup())
    with torch.no_grad():
        model[0].scores[0, 0] = 0
    st.update_masks(model)
    model(torch.randn(5, 4)).square().sum().backward()
    assert model[0].scores.grad[0, 0] == 0 and model[0].scores.grad[1, 1] != 0
