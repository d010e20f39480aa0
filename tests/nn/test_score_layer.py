"""Layers under search and superposed ones against dense layers with the same weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.masks import PackedMask
from sparseticket.nn import Plane, ScoreLayer, ScoreLinear, Superposed, WeightRecipe

CONVS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "dilation": 2, "padding": (2, 1)},
    {"kernel_size": 3, "groups": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]
MODULES = [lambda: nn.Linear(17, 5), lambda: nn.Linear(1, 1), lambda: nn.Linear(100, 3, bias=False)]
MODULES += [lambda k=k: nn.Conv2d(4, 6, **k) for k in CONVS]


def searched(module, config):
    model = nn.Sequential(module)
    st.sparsify_(model, config)
    return model[0]


def example(module):
    if isinstance(module, nn.Linear):
        return torch.randn(7, module.in_features, requires_grad=True)
    return torch.randn(2, 4, 9, 8, requires_grad=True)


def dense_like(layer, weight):
    plain = layer.to_dense()
    plain.weight = nn.Parameter(weight.detach().clone())
    if plain.bias is not None:
        nn.init.zeros_(plain.bias)
    return plain


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pruned", [None, 0.2])
def test_equals_the_dense_layer_with_the_masked_weight(make, density, pruned):
    config = st.SignedSupermask(density=density)
    if pruned is not None:
        pruned = min(pruned, 1 - density)
        config = st.Frozen(
            density=density, pruned=pruned, locked=min(0.2, density), rule="uniform", scope="layer"
        )
    layer = searched(make(), config)
    x = example(layer)
    y = layer(x)
    dense = dense_like(layer, config.value(layer))
    expected = dense(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(ours, theirs)
    if density == 0:
        assert not y.any()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer.to_ticket()(x), expected)


@pytest.mark.parametrize("make", MODULES)
def test_superposed_equals_the_dense_layer(make):
    plain = make()
    recipe = WeightRecipe.initial(1, "a", "uniform", plain.weight.shape)
    outer = st.random_mask(1, "a", plain.weight.shape, plain.weight.numel() // 2)
    inner = outer & st.random_mask(2, "a", plain.weight.shape, plain.weight.numel() // 2)
    if plain.bias is not None:
        nn.init.zeros_(plain.bias)
    layer = Superposed.of(plain, recipe, "sum", [Plane(outer), Plane(inner, -2.0)])
    x = example(plain)
    twin = make()
    twin.weight, twin.bias = nn.Parameter(layer.weight), plain.bias
    torch.testing.assert_close(layer(x), twin(x))
    assert layer.mask == outer
    assert "kind=sum, planes=2" in repr(layer)


def test_alpha_is_differentiable():
    plain = nn.Linear(9, 4, bias=False)
    recipe = WeightRecipe.initial(1, "a", "normal", (4, 9))
    planes = [Plane(st.random_mask(i, "a", (4, 9), 18)) for i in range(3)]
    layer = Superposed.of(plain, recipe, "tasks", planes)
    layer.alpha = torch.full((3,), 1 / 3, requires_grad=True)
    x = torch.randn(5, 9)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.alpha)
    full = recipe.weight((4, 9), torch.float32, torch.device("cpu"))
    y = layer(x)
    expected = [(2 * y * (x @ (full * p.mask.to_dense()).t())).sum().item() for p in planes]
    assert grad.tolist() == pytest.approx(expected, rel=1e-4)


def test_only_plain_layers_are_taken():
    class Mine(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"Mine is not exactly nn\.Linear"):
        ScoreLinear.from_dense(Mine(2, 2), rule=None, recipe=None, scores=torch.zeros(2, 2))
    layer = searched(nn.Linear(3, 2), st.SignedSupermask())
    assert isinstance(layer, ScoreLayer) and "rule=SignedSupermask, kept=3/6" in repr(layer)
    with pytest.raises(ValueError, match="mask: got shape"):
        layer.mask = PackedMask.full((3, 3))


def test_dynamic_scales_follow_the_mask():
    layer = searched(nn.Linear(64, 32), st.SignedSupermask(density=0.1, scale="dynamic"))
    assert layer.recipe.sigma == pytest.approx(math.sqrt(2 / 64 / layer.mask.density), rel=2**-8)
    layer.mask = PackedMask.full((32, 64))
    assert layer.recipe.sigma == pytest.approx(math.sqrt(2 / 64), rel=2**-8)
    assert layer.weight.abs().unique().tolist() == [layer.recipe.sigma]
