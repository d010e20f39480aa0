"""Erdos-Renyi sources: coverage of the width factor, exact tickets, flow, dead paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.theory.er import (
    effective_density,
    er_masks,
    er_ticket,
    er_width,
    flow_correction,
    prune_dead,
    strong_er_ticket,
)

SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (20, 64), (5, 20)]


@pytest.mark.parametrize(("p", "rho"), [(0.5, 16), (0.1, 103), (0.05, 211), (0.01, 1077)])
def test_width_factor(p, rho):
    assert er_width(p, 5000, 0.1) == rho
    assert 5000 * (1 - p) ** rho <= 0.1 < 5000 * (1 - p) ** (rho - 1)


def test_width_factor_bounds():
    assert er_width(1, 10, 0.1) == er_width(0.5, 0, 0.1) == 1
    for arguments, name in [
        ((0, 5, 0.1), "density"),
        ((0.5, 5, 0), "delta"),
        ((0.5, 5, 1), "delta"),
    ]:
        with pytest.raises(ValueError, match=name):
            er_width(*arguments)


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_coverage_is_at_least_nominal(p):
    """500 sources of q pairs each; failures at most binomially many, at 4 sigma."""
    delta, pairs, runs = 0.2, 200, 500
    rho = er_width(p, pairs, delta)
    shape = (runs * pairs, rho)
    links = er_masks([shape], [p], seed=3, exact=False)[0].to_dense()
    failed = int((~links.any(1)).view(runs, pairs).any(1).sum())
    assert failed <= runs * delta + 4 * math.sqrt(runs * delta * (1 - delta))
    assert failed > 0.2 * runs * delta  # and the bound is not slack


def test_masks_have_the_density_asked_for():
    shapes = [(64, 50), (32, 64, 3, 3)]
    exact = er_masks(shapes, [0.1, 0.37], seed=5)
    assert [m.kept for m in exact] == [320, round(0.37 * 32 * 64 * 9)]
    for p, mask in zip(
        [0.1, 0.37], er_masks(shapes, [0.1, 0.37], seed=5, exact=False), strict=True
    ):
        assert abs(mask.density - p) <= 4 * math.sqrt(p * (1 - p) / mask.numel)
    assert exact == er_masks(shapes, [0.1, 0.37], seed=5)
    assert exact != er_masks(shapes, [0.1, 0.37], seed=6)


def target(bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(5, 2, bias=bias)).double()
    with torch.no_grad():
        net[2].weight[:, 3] = 0
    return net


@pytest.mark.parametrize("bias", [True, False])
def test_the_ticket_is_the_target(bias):
    net = target(bias)
    found = er_ticket(net, [0.5, 0.3, 0.4], 0.05, seed=1)
    assert found.missing == 0
    x = torch.randn(200, 3, dtype=torch.float64)
    torch.testing.assert_close(found.network(x), net(x), rtol=1e-12, atol=1e-12)
    for chosen, source in zip(found.masks, found.source, strict=True):
        assert (chosen & source) == chosen
    linear = [m for m in found.network if isinstance(m, nn.Linear)][1:]
    for layer, mask in zip(linear, found.masks, strict=True):
        assert not bool(layer.weight[~mask.to_dense()].any())
    # one link for every pair, none for weights that are 0
    copies = found.report["copies"]
    assert found.masks[1].kept == copies[2] * int((net[2].weight != 0).sum())
    assert found.report["kept"] == found.report["pairs"]


def test_missing_links_are_counted():
    tickets = [er_ticket(target(), [0.3, 0.3, 0.3], 0.9, seed=seed) for seed in range(12)]
    for found in tickets:
        assert found.missing == found.report["pairs"] - sum(m.kept for m in found.masks)
    assert 0 < sum(found.missing > 0 for found in tickets) <= 11
    sure = er_ticket(target(), [1.0, 1.0, 1.0], 0.1)
    assert sure.missing == 0 and sure.report["copies"] == [1, 1, 1, 1]


def test_ticket_bad_input():
    with pytest.raises(ValueError, match="densities: got 1 for 3"):
        er_ticket(target(), [0.5], 0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_strong_ticket_is_near_the_target(bias):
    """Random weights on random links: parameters within eps, and the function with them."""
    torch.manual_seed(3)
    layers = [nn.Linear(2, 3, bias=bias), nn.ReLU(), nn.Linear(3, 1, bias=bias)]
    net = nn.Sequential(*layers).double().requires_grad_(False)
    eps = 0.02
    found = strong_er_ticket(net, 0.5, base=12, eps=eps, seed=2)
    assert found.missing == 0
    linear = [m for m in found.network if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == found.report["widths"]
    for layer, chosen, source in zip(linear[1:], found.masks, found.source, strict=True):
        assert (chosen & source) == chosen and layer.bias is None
        assert torch.equal(layer.weight != 0, chosen.to_dense())
        assert float(layer.weight.abs().max()) <= 1
    assert source.density == pytest.approx(0.5, abs=0.1)
    x = 2 * torch.rand(500, 2, dtype=torch.float64) - 1
    # layer by layer: a neuron's parameters are off by eps, and its inputs by what they are off by
    hidden = net[1](net[0](x))
    first = eps * (x.abs().sum(1) + 1)  # one copy
    constant = eps
    w = net[2].weight[0].abs().sum()
    bound = first * (w + 3 * eps) + eps * hidden.sum(1) + eps
    bound += constant * ((net[2].bias.abs() if bias else 0) + eps)
    error = (found.network(x) - net(x)).abs()[:, 0]
    assert bool((error <= bound + 1e-9).all())


def test_strong_tickets_pass_over_what_cannot_be_met():
    net = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.5)
    single = strong_er_ticket(net, 0.7, base=4, redraws=0, seed=1)
    patient = strong_er_ticket(net, 0.7, base=4, redraws=200, seed=1)
    assert single.missing > 0 and single.report["redrawn"] == 0
    assert patient.missing == 0 and patient.report["redrawn"] > 0
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    assert float((patient.network(x) - net(x)).abs().max()) <= 0.01
    with pytest.raises(ValueError, match="density"):
        strong_er_ticket(net, 0.0)


def test_flow_correction_gives_every_unit_a_link():
    masks = er_masks(SHAPES, [0.01, 0.005, 0.01, 0.03], seed=2)
    fixed = flow_correction(masks, seed=2)
    for before, after in zip(masks, fixed, strict=True):
        dense = after.to_dense()
        assert (before & after) == before
        assert bool(dense.flatten(1).any(1).all())
        assert bool(dense.transpose(0, 1).flatten(1).any(1).all())
        rows = int((~before.to_dense().flatten(1).any(1)).sum())
        columns = int((~before.to_dense().transpose(0, 1).flatten(1).any(1)).sum())
        assert before.kept < after.kept <= before.kept + rows + columns
    assert flow_correction(fixed, seed=2) == fixed


def test_flow_correction_of_many_dead_channels():
    empty = st.PackedMask.from_dense(torch.zeros(4, 7, 3, 3, dtype=torch.bool))
    (fixed,) = flow_correction([empty])
    assert bool(fixed.to_dense().transpose(0, 1).flatten(1).any(1).all())


def test_dead_paths():
    first = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    second = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    masks = [st.PackedMask.from_dense(m) for m in (first, second)]
    alive = [m.to_dense().int().tolist() for m in prune_dead(masks)]
    assert alive == [[[1, 0], [0, 0], [0, 0]], [[1, 0, 0], [0, 0, 0]]]
    assert effective_density(masks) == pytest.approx(2 / 12)


def test_dead_paths_through_a_flattened_convolution():
    """Masking dead links changes no gradient; every link that is left has a path."""
    torch.manual_seed(0)
    masks = er_masks(SHAPES, [0.05, 0.01, 0.03, 0.1], seed=4)
    alive = prune_dead(masks)
    weights = [
        torch.rand(s, dtype=torch.float64) * m.to_dense()
        for s, m in zip(SHAPES, masks, strict=True)
    ]
    for w in weights:
        w.requires_grad_()
    x = torch.ones(1, 3, 6, 6, dtype=torch.float64)
    h = nn.functional.conv2d(nn.functional.conv2d(x, weights[0]), weights[1])
    (h.flatten(1) @ weights[2].T @ weights[3].T).sum().backward()
    for w, mask, kept in zip(weights, masks, alive, strict=True):
        used = (w.grad != 0) & mask.to_dense()
        assert torch.equal(used, kept.to_dense())
    assert 0 < effective_density(masks) < sum(m.kept for m in masks) / sum(m.numel for m in masks)
    with pytest.raises(ValueError, match="7 inputs cannot follow 5"):
        prune_dead([masks[3], st.PackedMask.full((2, 7))])
