"""The L+1 construction: error bounds, masks on regenerated weights, redraws, bad targets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparseticket.masks import regenerate
from sparseticket.theory import copies
from sparseticket.theory.er import strong_er_ticket
from sparseticket.theory.lplus1 import lplus1_bound, lplus1_budgets, lplus1_ticket

PHIS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "steep": lambda: nn.LeakyReLU(1.5),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def made(*modules, dtype=torch.float64):
    torch.manual_seed(0)
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return nn.Sequential(*modules).to(dtype).requires_grad_(False)


def mlp(phi=nn.ReLU, bias=True, **options):
    layers = [nn.Linear(3, 4, bias), phi(), nn.Linear(4, 3, bias), phi(), nn.Linear(3, 2, bias)]
    return made(*layers, **options)


def convnet(phi=nn.ReLU, **options):
    return made(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        phi(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1),
        phi(),
        nn.Flatten(),
        nn.Linear(16, 2),
        **options,
    )


def inputs(target, n=100, low=-1.0):
    """Vertices of the cube and points in it."""
    first = next(m for m in target if hasattr(m, "weight"))
    shape = (2, 8, 8) if isinstance(first, nn.Conv2d) else (first.in_features,)
    torch.manual_seed(1)
    x = torch.rand(n, *shape, dtype=first.weight.dtype) * (1 - low) + low
    x[: n // 4] = x[: n // 4].round()
    return x


def check(target, found, x, eps):
    """Every sum is met, and the outputs are within the bound that follows."""
    report = found.report
    assert report.failed == 0 and report.max_error <= eps
    error = (found.network(x) - target(x)).abs()
    bound = lplus1_bound(target, found, x)
    assert error.shape == bound.shape
    assert bool((error <= bound + 1e-10).all())
    assert float(error.max()) > 0 or not report.target_weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("phi", PHIS)
def test_an_mlp_is_within_its_bound(phi, bias):
    target = mlp(PHIS[phi], bias)
    found = lplus1_ticket(target, 15, 0.01, seed=3)
    check(target, found, inputs(target), 0.01)
    assert len(found.report.widths) == 4  # L + 1


@pytest.mark.parametrize("phi", PHIS)
def test_a_convolutional_network_is_within_its_bound(phi):
    target = convnet(PHIS[phi])
    found = lplus1_ticket(target, 15, 0.01, seed=1)
    check(target, found, inputs(target, 30), 0.01)
    assert len(found.report.widths) == 4


GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "odd": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 2)},
    "1x1": {"kernel_size": 1},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "over-padded": {"padding": 3, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("phi", ["relu", "sigmoid"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_of_convolutions(name, phi):
    """In the first layer and behind another one."""
    options = {"out_channels": 4, "kernel_size": 3} | GEOMETRIES[name]
    second = made(nn.Conv2d(2, 4, 2), PHIS[phi](), nn.Conv2d(4, **options))
    first = made(nn.Conv2d(2 * options.get("groups", 1), **options), PHIS[phi]())
    torch.manual_seed(2)
    for target, channels in ((first, 2 * options.get("groups", 1)), (second, 2)):
        x = torch.rand(3, channels, 9, 8, dtype=torch.float64) * 2 - 1
        check(target, lplus1_ticket(target, 12, 0.02, seed=2), x, 0.02)


POOLS = [
    nn.MaxPool2d(3, 2, padding=1),
    nn.AvgPool2d(2, ceil_mode=True),
    nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    nn.AdaptiveAvgPool2d(3),
    nn.AdaptiveMaxPool2d((2, 3)),
    nn.Identity(),
]


@pytest.mark.parametrize("pool", POOLS, ids=lambda m: type(m).__name__)
def test_pooling_before_behind_and_between(pool):
    body = [nn.Conv2d(2, 3, 2), nn.Tanh(), pool]
    target = made(nn.Identity(), *body, nn.Conv2d(3, 2, 2), nn.Flatten())
    x = inputs(target, 4)[:, :, :7]
    wide = target(x).shape[1]
    target = made(*target, nn.Linear(wide, 3), nn.Sigmoid())
    check(target, lplus1_ticket(target, 12, 0.02, seed=5), x, 0.02)


def test_copies_and_layers_without_an_activation_between():
    target = made(nn.Linear(3, 4), nn.Linear(4, 2))
    found = lplus1_ticket(target, [20, 9], 0.02)
    check(target, found, inputs(target), 0.02)
    assert [n.shape for n in found.neurons] == [(4, 9), (2, 1)]
    hidden = nn.Sequential(*found.network[:3])(inputs(target))
    goal = target[0](inputs(target))
    for j, own in enumerate(found.neurons[0]):
        off = (hidden[:, own] - goal[:, [j]]).abs()
        assert bool((off <= 0.02 * (3 + 1)).all())


@pytest.mark.parametrize("phi", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("net", [mlp, convnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_on_weights_that_the_seed_gives(net, phi, dtype):
    target = net(PHIS[phi], dtype=dtype)
    before = copy.deepcopy(target.state_dict())
    found = lplus1_ticket(target, 13, 0.02, seed=7)
    layers = [m for m in found.source if hasattr(m, "weight")]
    for i, (layer, rows) in enumerate(zip(layers, found.rows, strict=True)):
        shape = (int(rows.max()) + 1, *layer.weight.shape[1:])
        unit = regenerate(7, f"lplus1.{i}", shape, "uniform", sigma=1 / math.sqrt(3))
        ratio = layer.weight / unit.to(dtype)[rows]  # one scale for a neuron's outgoing weights
        column = ratio.flatten(2).mean((0, 2)) if ratio.ndim > 2 else ratio.mean(0)
        column = column.view(-1, *[1] * (ratio.ndim - 2))
        torch.testing.assert_close(ratio, column.expand_as(ratio), rtol=1e-6, atol=0)
        if i > 1 or (phi == "relu" and i == 1):
            assert torch.equal(layer.weight, unit.to(dtype)[rows])
    pruned = dict(found.network.named_parameters())
    assert set(found.masks) == set(pruned)
    for name, mask in found.masks.items():
        drawn = found.source.get_parameter(name)
        assert torch.equal(pruned[name], torch.where(mask.to_dense(), drawn, 0.0))
    assert found.report.kept == sum(int((p != 0).sum()) for p in pruned.values())
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), target.state_dict().values(), strict=True)
    )
    again = lplus1_ticket(target, 13, 0.02, seed=7)
    assert all(again.masks[name] == mask for name, mask in found.masks.items())
    assert lplus1_ticket(target, 13, 0.02, seed=8).masks != found.masks


def test_neurons_of_the_added_layer_see_one_input():
    for found in (lplus1_ticket(mlp(), 12, 0.02), lplus1_ticket(convnet(), 12, 0.02)):
        weight, bias = found.masks["0.weight"].to_dense(), found.masks["0.bias"].to_dense()
        seen = weight.flatten(1).sum(1)
        assert int(seen.max()) == 1
        assert not bool(bias[seen > 0].any())


def test_the_offsets_of_sigmoids_are_undone_at_any_eps():
    """They add up to large numbers; coarse constants undo them, fine ones what those leave."""
    target = made(nn.Linear(64, 3), nn.Sigmoid())
    x = inputs(target)
    for eps in (0.01, 1e-4):
        found = lplus1_ticket(target, 24, eps, seed=1)
        check(target, found, x, eps)
    offsets = 0.5 * found.network[2].weight[:, : -4 * 24].sum(1)
    assert float(offsets.abs().max()) > 50


def test_an_eps_for_every_layer():
    target = made(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))
    target[4].weight[0, :3] = 0
    budgets = lplus1_budgets(target, 0.04)
    assert budgets[2] == 0.04
    assert budgets[1] == pytest.approx(0.04 / math.sqrt(7.5))
    assert budgets[0] == pytest.approx(budgets[1] / math.sqrt(6))
    found = lplus1_ticket(target, 20, budgets, seed=1)
    check(target, found, inputs(target), 0.04)
    assert all(0.5 * e < error <= e for e, error in zip(budgets, found.errors, strict=True))
    assert max(found.errors) == found.report.max_error and found.report.eps == 0.04
    x = inputs(target)
    alike = lplus1_ticket(target, 20, 0.04, seed=1)
    errors = [(f.network(x) - target(x)).square().mean() for f in (found, alike)]
    assert errors[0] < 0.5 * errors[1]


# Redraws --------------------------------------------------------------------------------------


def test_redraws_are_reported_and_met_sums_are_never_worse():
    target = mlp()
    none = lplus1_ticket(target, 9, 0.01, redraws=0).report
    some = lplus1_ticket(target, 9, 0.01, redraws=3).report
    many = lplus1_ticket(target, 9, 0.01, redraws=300).report
    assert none.redraws == 0 and none.failed > 0 and none.max_error > 0.01
    assert some.redraws > 0 and some.failed < none.failed
    assert many.failed == 0 and many.max_error <= 0.01


def test_passed_over_neurons_are_in_the_source_without_links():
    found = lplus1_ticket(mlp(), 9, 0.01, redraws=300)
    tried = [int(rows.max()) + 1 for rows in found.rows[1:]]
    needed = [9 * 4 + 9, 9 * 3 + 9, 2]  # copies, and as many constants
    assert found.report.redraws == sum(tried) - sum(needed) > 0
    assert found.report.widths[1:] == (*tried[:-1], 2)
    serving = found.neurons[0].flatten()
    into = found.masks["2.weight"].to_dense()
    out = found.masks["4.weight"].to_dense()
    dead = ~into.any(1)
    assert int(dead.sum()) > 0 and not bool(dead[serving].any())
    assert not bool(out[:, dead].any())


def test_a_base_that_is_hopeless_is_not_tried_for_ever():
    target = made(nn.Linear(40, 40))
    report = lplus1_ticket(target, 1, 1e-6, redraws=1000).report
    assert report.redraws == 80 and report.failed > 0.9 * 80 * 40


def test_every_input_has_a_base_for_each_sign():
    """Of two draws an input often has none of one sign; then more are drawn."""
    target = made(nn.Linear(50, 1, bias=False))
    found = lplus1_ticket(target, 2, 0.05, redraws=0)
    slopes = found.source[0].weight.view(-1, 50, 50).diagonal(dim1=1, dim2=2)
    assert int(torch.minimum((slopes > 0).sum(0), (slopes < 0).sum(0)).min()) == 2


def test_how_many_sums_are_solved_at_once_changes_nothing(monkeypatch):
    together = lplus1_ticket(mlp(), 9, 0.01, density=0.8)
    monkeypatch.setattr(copies, "_AT_ONCE", 1)
    alone = lplus1_ticket(mlp(), 9, 0.01, density=0.8)
    assert alone.masks == together.masks and alone.report == together.report


def test_a_sparse_source():
    target = convnet(nn.Tanh)
    found = lplus1_ticket(target, 10, 0.02, density=0.4, seed=3)
    check(target, found, inputs(target, 10), 0.02)
    for name, links in found.links.items():
        assert (found.masks[name] & links) == found.masks[name]
        assert links.density == pytest.approx(0.4, abs=0.05)
    ticket = strong_er_ticket(target, 0.4, base=10, eps=0.02, seed=3)
    assert ticket.missing == 0 and len(ticket.masks) == len(ticket.source) == 3
    assert ticket.report["copies"] == found.neurons[0].shape[1] > 25


# Degenerate and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("phi", ["relu", "tanh", "sigmoid"])
def test_zero_weights_need_nothing_but_what_the_offsets_take(phi):
    target = mlp(PHIS[phi])
    for p in target.parameters():
        p.zero_()
    found = lplus1_ticket(target, 5, 0.01)
    assert found.report.kept == found.report.failed == found.report.target_weights == 0
    x = inputs(target)
    assert torch.equal(found.network(x), target(x))


def test_biases_alone():
    target = mlp()
    for layer in target[::2]:
        layer.weight.zero_()
    found = lplus1_ticket(target, 12, 0.01, seed=1)
    check(target, found, inputs(target), 0.01)
    assert found.masks["0.weight"].kept == 0


def test_one_neuron_and_nonnegative_inputs():
    target = made(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    check(target, lplus1_ticket(target, 15, 0.01), inputs(target), 0.01)
    both = lplus1_ticket(mlp(), 15, 0.01)
    half = lplus1_ticket(mlp(), 15, 0.01, nonnegative=True)
    check(mlp(), half, inputs(mlp(), low=0.0), 0.01)
    weight = half.network[0].weight
    assert not bool((weight < 0).any()) and bool((both.network[0].weight < 0).any())
    assert half.report.problems < both.report.problems


def test_a_radius_for_activations_that_bend():
    target = mlp(nn.Tanh)
    x = 5 * inputs(target)
    wide = lplus1_ticket(target, 15, 0.01, radius=5.0)
    check(target, wide, x, 0.01)
    narrow = lplus1_ticket(target, 15, 0.01)
    errors = [float((f.network(x) - target(x)).abs().max()) for f in (wide, narrow)]
    assert errors[0] < errors[1]
    limit = float(wide.source[0].weight.abs().max())
    assert limit == pytest.approx(math.sqrt(0.03) / 5, rel=0.05)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([], "got Sequential, need a Sequential with Linear"),
        ([nn.ReLU()], "got ReLU, need a Sequential"),
        ([nn.Linear(2, 2), nn.GELU()], "construction does not cover it"),
        ([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)], "fold a batch norm"),
        ([nn.Conv1d(1, 2, 1), nn.Linear(2, 2)], "does not cover"),
        ([nn.Linear(2, 2), nn.LeakyReLU(-0.1)], "slope >= 0"),
        ([nn.Conv2d(1, 2, 1), nn.Linear(4, 2)], "needs a Flatten"),
        ([nn.Flatten(), nn.Conv2d(1, 2, 1)], "cannot follow a flat layer"),
        ([nn.Linear(2, 3), nn.Linear(4, 2)], "behind 3 outputs"),
        ([nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, padding=1)], "changes constants"),
        ([nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, divisor_override=3)], "changes constants"),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(0)], "start_dim=1"),
        ([nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 3, padding=2)], "every tap of"),
        ([nn.Conv2d(1, 2, 2, padding="same")], "uneven"),
        ([nn.Linear(2, 2, dtype=torch.bfloat16)], "got torch.bfloat16"),
    ],
)
def test_targets_that_are_not_covered(modules, text):
    with pytest.raises(ValueError, match=text):
        lplus1_ticket(nn.Sequential(*modules), 5, 0.1)


def test_padding_of_more_than_half_a_kernel_is_fine_without_biases():
    options = {"bias": False, "dtype": torch.float64}
    target = made(
        nn.Conv2d(1, 2, 1, **options), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=2, **options)
    )
    x = torch.rand(2, 1, 5, 5, dtype=torch.float64)
    check(target, lplus1_ticket(target, 12, 0.02), x, 0.02)


def test_arguments():
    target = mlp()
    for options, text in [
        ({"base": 0}, "base: got 0, need 1 to 64"),
        ({"base": 65}, "base: got 65"),
        ({"base": [5, 5]}, r"base: got \[5, 5\], need 1 to 64, one number or 3"),
        ({"eps": 0}, "eps: got 0"),
        ({"eps": [0.1]}, r"eps: got \[0\.1\], need finite numbers > 0, one or 3"),
        ({"base": 5.5}, r"base: got 5\.5"),
        ({"eps": math.nan}, "eps: got nan"),
        ({"radius": math.inf}, "radius: got inf"),
        ({"density": 0.0}, "density: got 0"),
        ({"redraws": -1}, "redraws: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"objective": "best"}, "objective: got 'best'"),
    ]:
        with pytest.raises(ValueError, match=text):
            lplus1_ticket(target, **options)
    for options in ({"base": None}, {"eps": None}):
        with pytest.raises(TypeError, match="got None, need a number, or one for each layer"):
            lplus1_ticket(target, **options)
    target[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        lplus1_ticket(target)
