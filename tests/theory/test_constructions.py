"""Constructions on whole networks: bits of the source, errors of weights, bounds on functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from sparseticket.theory.log import GOLDEN, golden_bins, golden_greedy, log_ticket
from sparseticket.theory.malach import malach_neurons, malach_ticket, neuron_subnetwork
from sparseticket.theory.pensia import pensia_ticket, pensia_width


def net(*widths, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    layers = []
    for columns, rows in itertools.pairwise(widths):
        layers += [nn.Linear(columns, rows, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


BUILDERS = {
    "pensia": lambda target, **options: pensia_ticket(target, 21, 0.01, **options),
    "pensia with biases": lambda target, **options: pensia_ticket(target, 21, 0.01, **options),
    "pensia linear": lambda t, **options: pensia_ticket(t, 21, 0.01, structure="linear", **options),
    "malach": lambda target, **options: malach_ticket(target, 0.2, **options),
    "malach product": lambda t, **options: malach_ticket(t, 0.05, rule="product", **options),
    "log": lambda target, **options: log_ticket(target, 0.01, **options),
}


@pytest.fixture(params=BUILDERS)
def built(request):
    bias = "biases" in request.param
    target = net(4, 3, 2, bias=bias)
    return target, BUILDERS[request.param](target), BUILDERS[request.param]


def test_what_is_kept_is_the_source_bit_for_bit(built):
    _, found, _ = built
    before = {name: p.clone() for name, p in found.source.named_parameters()}
    pruned = dict(found.network.named_parameters())
    assert set(found.masks) == set(before)
    for name, mask in found.masks.items():
        assert torch.equal(pruned[name], torch.where(mask.to_dense(), before[name], 0.0))
    assert found.report.kept == sum(int((p != 0).sum()) for p in pruned.values())


def test_the_same_seed_gives_the_same_source(built):
    target, found, build = built
    again, other = build(target, seed=0), build(target, seed=1)
    assert all(torch.equal(a.words, b.words) for a, b in zip_masks(found, again))
    assert not all(
        torch.equal(a, b)
        for a, b in zip(found.source.parameters(), other.source.parameters(), strict=True)
    )


def zip_masks(a, b):
    return [(a.masks[name], b.masks[name]) for name in a.masks]


def test_every_weight_is_within_eps_and_the_function_within_what_follows(built):
    target, found, _ = built
    report = found.report
    assert report.failed == 0
    assert report.max_error <= report.eps
    x = torch.rand(500, 4, dtype=torch.float64) * 2 - 1
    error = (found.network(x) - target(x)).abs().max()
    assert error <= propagated(target, x, report.max_error) + 1e-12


def propagated(target, x, e):
    """A bound on the outputs' error from errors ``e`` of all weights and biases: layer by layer
    |dy| <= (|W| + e) |dx| + e (|x| summed + 1)."""
    off = torch.zeros_like(x)
    for layer in target:
        if isinstance(layer, nn.Linear):
            w = layer.weight.abs() + e
            off = off @ w.T + e * (x.abs().sum(1, keepdim=True) + 1)
        x = layer(x)
    return off.max()


def test_at_most_one_weight_a_neuron_in_malachs_ticket():
    target = net(4, 3, 2)
    found = malach_ticket(target, 0.2)
    first, second = found.masks["0.weight"].to_dense(), found.masks["2.weight"].to_dense()
    assert (first.sum(1) <= 1).all() and (second.sum(0) <= 1).all()
    assert found.report.kept <= 4 * found.report.target_weights


def test_malachs_bound_is_a_probability():
    """One weight, neurons for delta = .5: found at least that often in 200 sources."""
    target = net(1, 1)
    target[0].weight.data.fill_(0.4)
    count = malach_neurons(0.3, 0.5)
    hits = sum(
        malach_ticket(target, 0.3, neurons=count, seed=s).report.failed == 0 for s in range(200)
    )
    assert hits / 200 >= 0.5


def test_malachs_neurons_grow_as_the_square_and_products_need_fewer():
    few, many = malach_neurons(0.1, 0.1), malach_neurons(0.05, 0.1)
    assert many / few == pytest.approx(4, rel=0.01)
    target = net(3, 3)
    block = 400
    paper = malach_ticket(target, 0.05, neurons=block).report.failed
    assert malach_ticket(target, 0.05, rule="product", neurons=block).report.failed < paper


def test_neurons_are_kept_by_chance_and_unbiased():
    torch.manual_seed(0)
    x = torch.rand(500, 2, dtype=torch.float64) * 2 - 1
    y = x[:, 0] * x[:, 1]
    nets = [neuron_subnetwork(x, y, 400, ridge=0.1, seed=s) for s in range(40)]
    one = nets[0]
    outer = one.network[2].weight[0]
    assert torch.equal(outer != 0, one.kept)
    gaps = torch.stack([(n.network(x) - n.features(x))[:, 0] for n in nets])
    spread = gaps.std(0) / math.sqrt(len(nets))
    assert ((gaps.mean(0) / spread).abs() < 5).all()


# The golden ratio -----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [GOLDEN, 2 / 3, 0.8])
@pytest.mark.parametrize("bins", [1, 2, 5, 12])
def test_the_remainder_is_small_whatever_the_bins_hold(gamma, bins):
    torch.manual_seed(0)
    edges = gamma ** torch.arange(bins + 1, dtype=torch.float64)
    target = torch.rand(4000, dtype=torch.float64)
    draws = torch.rand(4000, bins, dtype=torch.float64)
    draws[:1000] = draws[:1000].round()  # the ends of the bins
    products = edges[1:] + draws * (edges[:-1] - edges[1:])
    taken, rest = golden_greedy(products, target)
    assert (rest >= 0).all() and rest.max() <= gamma ** (bins - 1) + 1e-12
    torch.testing.assert_close(target - (products * taken).sum(1), rest)


def test_below_the_golden_ratio_it_fails():
    gamma, bins = 0.5, 16
    products = (gamma ** torch.arange(bins, dtype=torch.float64)).expand(1001, -1).clone()
    products[:, 0] = 1.0  # just above the target: then everything smaller is too little
    products[:, 1:] *= gamma
    _, rest = golden_greedy(products, torch.linspace(0, 0.999, 1001, dtype=torch.float64))
    assert rest.max() > 0.3


def test_pools_hold_enough():
    """Five weights on one input: no weight fails in at least 1 - delta of the sources."""
    target = net(1, 5)
    failed = [log_ticket(target, 0.05, delta=0.2, seed=s).report.failed for s in range(100)]
    assert sum(f == 0 for f in failed) >= 80
    scarce = [log_ticket(target, 0.05, draws=12, seed=s).report.failed for s in range(20)]
    assert sum(scarce) > 0


def test_weights_of_powers_take_at_most_a_bin_each():
    target = net(4, 3, 2)
    report = log_ticket(target, 0.01).report
    bins = golden_bins(
        0.01 / float(max(p.detach().abs().max() for p in target.parameters())), 2 / 3
    )
    assert report.kept <= 2 * (2 * bins) * report.target_weights
    sizes = [log_ticket(target, e).report.source_weights for e in (0.1, 0.01, 0.001)]
    assert sizes[2] - sizes[1] < 2 * (sizes[1] - sizes[0])  # a logarithm


# Bad input ------------------------------------------------------------------------------------


def test_pensias_width_is_logarithmic():
    sizes = [pensia_width(10, 10, 2, e) for e in (1e-2, 1e-4, 1e-6)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=1)


def test_a_base_for_every_row():
    target = net(6, 4)
    found = pensia_ticket(target, 12, 0.05, structure="linear", share_base="row")
    source = found.source[1].weight.view(4, 6, 12)
    assert torch.equal(source, source[:, :1].expand(4, 6, 12))


def test_zero_weights_need_nothing():
    target = net(3, 2)
    target[0].weight.data.zero_()
    for build in (
        lambda: pensia_ticket(target, 5, 0.01),
        lambda: malach_ticket(target, 0.5),
        lambda: log_ticket(target, 0.1),
    ):
        report = build().report
        assert report.kept == report.failed == report.target_weights == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda t: pensia_ticket(t, 5, 0.1, structure="linear"),
        lambda t: malach_ticket(t, 0.5),
        lambda t: log_ticket(t, 0.1),
    ],
)
def test_targets_that_do_not_fit(build):
    with pytest.raises(ValueError, match="target: got Linear, Tanh"):
        build(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    with pytest.raises(ValueError, match="target: got Linear, need a Sequential"):
        build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it has biases"):
        build(net(3, 2, bias=True))
    broken = net(3, 2)
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        build(broken)


def test_arguments():
    target = net(3, 2)
    with pytest.raises(ValueError, match="n: got 65"):
        pensia_ticket(target, 65, 0.1)
    with pytest.raises(ValueError, match="structure: got 'tanh'"):
        pensia_ticket(target, 5, 0.1, structure="tanh")
    with pytest.raises(ValueError, match="share_base: got 'row'"):
        pensia_ticket(target, 5, 0.1, share_base="row")
    with pytest.raises(ValueError, match=r"gamma: got 0\.5"):
        log_ticket(target, 0.1, gamma=0.5)
    with pytest.raises(ValueError, match="rule: got 'best'"):
        malach_ticket(target, 0.1, rule="best")
    with pytest.raises(ValueError, match="eps, delta: got 0"):
        malach_ticket(target, 0)
