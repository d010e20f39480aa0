"""Bernoulli and signed supermasks, IteRand, biprop, multicoated supermasks, hidden-fold nets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.nn import Superposed
from sparseticket.tickets.biprop import BinaryActivation
from sparseticket.tickets.engine import live_layers
from sparseticket.train import build_model


def converted(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    if hasattr(config, "adapt"):
        config.adapt(model)
    st.sparsify_(model, config)
    return model, live_layers(model)


def shake(layers):
    with torch.no_grad():
        for layer in layers:
            layer.scores.add_(torch.randn_like(layer.scores) * layer.scores.std().clamp(0.1))


# Bernoulli -------------------------------------------------------------------------------------
def test_bernoulli_masks_have_their_probabilities():
    config = st.Supermask(density=0.3)
    _, (_, layer) = converted(config)
    n = layer.scores.numel()
    assert torch.allclose(layer.scores.sigmoid(), torch.tensor(0.3))
    drawn = []
    for step in range(200):
        config.update([layer], step)
        drawn.append(layer.mask.to_dense())
    kept = torch.stack(drawn).float()
    assert kept.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / n / 200))
    # every weight by itself, too: independent over steps
    assert kept.mean(0).std() == pytest.approx(math.sqrt(0.21 / 200), rel=0.1)
    config.update([layer], 7)
    assert torch.equal(layer.mask.to_dense(), drawn[7])


def test_bernoulli_rescaling_divides_by_the_density_drawn():
    config = st.Supermask(density=0.3, rescale=True)
    _, layers = converted(config)
    for layer in layers:
        expected = layer.recipe.std / layer.mask.density
        assert layer.weight.abs().max() == pytest.approx(expected, rel=2**-8)
    with pytest.raises(ValueError, match="rescale"):
        st.Supermask(rescale=True, scale="density")


# Signed ----------------------------------------------------------------------------------------
def test_signed_masks_have_three_values():
    config = st.SignedSupermask(density=0.2)
    _, layers = converted(config)
    shake(layers)
    config.update(layers, 1)
    for layer in layers:
        factor = (layer.effective_weight() / layer.weight).detach()
        expected = torch.where(layer.scores < 0, -1.0, 1.0) * layer.mask.to_dense()
        assert torch.equal(factor, expected)
        assert layer.mask.kept == round(0.2 * layer.weight.numel())


def test_signed_threshold():
    config = st.SignedSupermask(threshold=0.1)
    _, (_, layer) = converted(config)
    shake([layer])
    config.update([layer], 1)
    assert torch.equal(layer.mask.to_dense(), layer.scores.tanh().abs() > 0.1)


# IteRand ---------------------------------------------------------------------------------------
def test_redraws_change_dropped_weights_only_and_regenerate():
    config = st.IteRand(period=5, redraw=0.3, weights="normal")
    _, layers = converted(config)
    for step in range(1, 21):
        shake(layers)
        before = [layer.weight.clone() for layer in layers]
        config.update(layers, step)
        for layer, old in zip(layers, before, strict=True):
            kept = layer.mask.to_dense()
            changed = layer.weight != old
            assert not changed[kept].any()
            n = int((~kept).sum())
            share = changed[~kept].float().mean()
            wanted = 0.3 if step % 5 == 0 else 0
            assert share == pytest.approx(wanted, abs=5 * math.sqrt(0.21 / n) * (wanted > 0))
    for layer in layers:
        assert layer.draws.max() >= 2
        replayed = torch.empty_like(layer.weight)
        for draw in range(int(layer.draws.max()) + 1):
            fresh = torch.ops.sparseticket.regenerate(
                *layer.recipe.arguments(layer.weight_shape), draw=draw
            )
            replayed = torch.where(layer.draws == draw, fresh, replayed)
        assert torch.equal(replayed, layer.weight)
        assert torch.equal(layer.to_ticket().weight, layer.masked_weight())
        assert layer.to_ticket().kind == "draws"


def test_no_redraws_are_edge_popup_with_signed_scores():
    config = st.IteRand(period=1, redraw=0.0)
    _, layers = converted(config)
    before = [layer.weight.clone() for layer in layers]
    shake(layers)
    config.update(layers, 1)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        n = layer.scores.numel()
        assert layer.mask == st.select_mask(layer.scores, kept=n // 2, transform="identity")
        assert not isinstance(layer.to_ticket(), Superposed)


# biprop ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["normal", "uniform", "signed_constant"])
def test_biprop_has_one_magnitude(weights):
    config = st.Biprop(density=0.3, weights=weights)
    _, layers = converted(config)
    for layer in layers:
        kept = layer.mask.to_dense()
        alpha = layer.weight[kept].abs().mean().item()
        values = layer.effective_weight().detach()
        assert set(values.unique().tolist()) == {-layer.recipe.sigma, 0.0, layer.recipe.sigma}
        assert layer.recipe.sigma == pytest.approx(alpha, rel=2**-8)
        assert torch.equal(values[kept].sign(), layer.weight[kept].sign())
        with torch.no_grad():
            layer.weight.mul_(2)
        config.update([layer], 1)
        assert torch.equal(layer.effective_weight(), 2 * values)
        assert layer.to_ticket().recipe.dist == "signed_constant"


def test_biprop_of_an_empty_mask_is_zero():
    _, layers = converted(st.Biprop(density=0))
    assert all(layer.recipe.sigma == 0 and not layer.mask.kept for layer in layers)


def test_binary_activations():
    x = torch.tensor([-1.5, -0.75, -0.25, 0.0, 0.25, 0.75, 1.5], requires_grad=True)
    y = BinaryActivation()(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 0.5, 1.5, 2, 1.5, 0.5, 0])
    model, _ = converted(st.Biprop(binary_activations=True))
    assert isinstance(model[1], BinaryActivation)
    assert set(BinaryActivation()(torch.randn(10_000)).tolist()) == {-1.0, 1.0}  # exactly


# coats -----------------------------------------------------------------------------------------
def test_coats_are_nested_and_counted():
    config = st.Multicoat(density=0.3, coats="0.1,0.02")
    _, layers = converted(config)
    shake(layers)
    config.update(layers, 1)
    for layer in layers:
        n = layer.weight.numel()
        counts = [math.floor(d * n + 0.5) for d in config.densities]
        times = (layer.effective_weight() / layer.weight).round().long()
        assert torch.equal(layer.effective_weight(), layer.weight * times)
        histogram = [n - counts[0], counts[0] - counts[1], counts[1] - counts[2], counts[2]]
        assert times.flatten().bincount().tolist() == histogram
        assert layer.recipe.sigma == pytest.approx(layer.recipe.std / 0.3**0.5, rel=2**-8)


def test_one_coat_is_edge_popup():
    one, layers = st.Multicoat(density=0.3, coats="", scale="none"), None
    _, layers = converted(one)
    for layer in layers:
        assert layer.mask == st.select_mask(layer.scores.detach(), density=0.3)
        assert torch.equal(layer.effective_weight(), layer.masked_weight())
    for n, coats in ((1, ""), (3, "0.3,0.3")):  # N times the gradient for equal coats
        _, (layer, _) = converted(st.Multicoat(density=0.3, coats=coats, scale="none"))
        surrogate = layer.rule.surrogate(layer).sum()
        (grad,) = torch.autograd.grad(surrogate, layer.scores)
        assert torch.equal(grad, n * layer.scores.sign())
    with pytest.raises(ValueError, match=r"coats: got '0\.5'"):
        st.Multicoat(density=0.3, coats="0.5")
    with pytest.raises(ValueError, match="need numbers like"):
        st.Multicoat(coats="a")


# folds -----------------------------------------------------------------------------------------
def test_folding_shares_layers_and_not_norms():
    config = st.HiddenFold()
    model = build_model("resnet20", in_shape=(1, 8, 8), num_classes=10)
    whole = sum(p.numel() for p in model.parameters())
    config.adapt(model)
    config.adapt(model)
    assert model.layer1[1].conv1 is not model.layer1[2].conv1
    for stage in (model.layer2, model.layer3):
        assert stage[1].conv1 is stage[2].conv1 and stage[1].conv2 is stage[2].conv2
        assert stage[1].bn1 is not stage[2].bn1 and stage[0].conv2 is not stage[1].conv2
    saved = 2 * 9 * (32 * 32 + 64 * 64)
    assert sum(p.numel() for p in model.parameters()) == whole - saved
    st.sparsify_(model, config)
    assert model.layer3[1].conv1 is model.layer3[2].conv1
    assert model.layer3[1].conv1.form == "scored"
    ticket = st.Ticket.from_model(model, config=config)
    assert "layer3.2.conv1" not in ticket.meta["layers"]
    assert "layer3.2.bn1.weight" in {*ticket.meta["not_weight_free"], *ticket.meta["constants"]}


def test_folding_needs_a_residual_net():
    with pytest.raises(ValueError, match="has 0 stages of residual blocks"):
        st.HiddenFold().adapt(build_model("mlp", in_shape=(1, 8, 8), num_classes=10))
