"""Sizes as the papers count them, against the closed forms; files of planes and patterns."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.cli import main
from sparseticket.io import accounts
from sparseticket.masks import PackedMask
from sparseticket.nn import FrozenPattern, Plane, Superposed, WeightRecipe
from sparseticket.train import build_model


def ticket_of(config, model="mlp", in_shape=(1, 8, 8)):
    net = build_model(model, in_shape=in_shape, num_classes=10)
    x, y = torch.randn(4, *in_shape), torch.randint(10, (4,))
    return st.search(net, [(x, y)], None, config, epochs=0, progress=False).ticket


def bits(ticket, method, text=""):
    return next(a.bits for a in accounts(ticket) if a.method == method and text in a.counted)


def entropy(n, k):
    return -sum(p * math.log2(p) * n for p in (k, 1 - k))


def test_coats_have_the_published_bits_a_weight():
    ticket = ticket_of(st.Multicoat())
    assert bits(ticket, "multicoat") / 84480 == pytest.approx(1.3788, abs=1e-4)
    assert bits(ticket, "entropy") / 84480 == pytest.approx(1.2070, abs=1e-4)
    assert ticket.info()["coded_bits"] <= 1.03 * bits(ticket, "entropy")


@pytest.mark.parametrize(
    ("pruned", "locked", "density", "raw", "coded"),
    [
        (0.25, 0.25, 0.5, 0.5, 0.5),
        (0.35, 0.35, 0.5, 0.3, 0.3),
        (0.8, 0.0, 0.1, 0.2, 0.2),
        (0.63, 0.07, 0.1, 0.3, 0.1407),
        (0.5, 0.0, 0.3, 0.5, 0.4855),
    ],
)
def test_frozen_bits_a_weight(pruned, locked, density, raw, coded):
    ticket = ticket_of(
        st.Frozen(density=density, pruned=pruned, locked=locked, rule="uniform", scope="layer")
    )
    assert bits(ticket, "frozen") / 84480 == pytest.approx(raw, abs=2e-3)
    assert bits(ticket, "entropy") / 84480 == pytest.approx(coded, abs=2e-3)


def test_edge_popup_and_norms():
    ticket = ticket_of(st.EdgePopup(density=0.3), "cresnet18", (3, 8, 8))
    info, n = ticket.info(), 11_164_352
    assert bits(ticket, "edge-popup", "1 bit") == 32 + n
    assert bits(ticket, "hidden-fold") == 32 + n + 64 * 4800
    assert bits(ticket, "entropy") == pytest.approx(entropy(n, 0.3), rel=1e-5)
    assert bits(ticket, "this file", "masks") == info["coded_bits"]
    assert bits(ticket, "this file", "norm") == info["normalisation_bits"]
    assert bits(ticket, "this file", "all") == 8 * len(ticket.raw)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])
def test_payloads_come_near_entropy(density):
    """3 % at .5, .3, .2, .1, .05, and 4.5 % anywhere up to .5."""
    mask = st.random_mask(1, "a", (500, 1000), int(density * 500_000))
    layer = st.SparseLinear(1000, 500, bias=False, form="ticket", mask=mask, seed=1)
    info = st.Ticket.from_model(nn.Sequential(layer)).info()
    share = info["coded_bits"] / entropy(500_000, density)
    assert share <= (1.03 if density in (0.5, 0.3, 0.2, 0.1, 0.05) else 1.045)


@pytest.mark.parametrize("percent", range(1, 51, 3))
def test_payloads_come_near_entropy_at_any_density(percent):
    mask = st.random_mask(2, "a", (200, 1000), 2000 * percent)
    layer = st.SparseLinear(1000, 200, bias=False, form="ticket", mask=mask, seed=1)
    info = st.Ticket.from_model(nn.Sequential(layer)).info()
    assert info["coded_bits"] <= 1.045 * entropy(200_000, percent / 100)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "ticket.safetensors"
    ticket_of(st.IteRand(period=1, redraw=0.5)).save(path)
    assert main(["info", str(path), "--accounting"]) == 0
    text = capsys.readouterr().out
    for word in ("edge-popup", "hidden-fold", "supsup", "entropy", "this file", "MB"):
        assert word in text
    assert main(["info", str(path), "--accounting", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["bits"] == 32 * 84480


# files ------------------------------------------------------------------------------------------
def recipe():
    return WeightRecipe.initial(3, "0", "normal", (4, 27))


def nested(shape, counts):
    scores = torch.randn(shape)
    return [st.select_mask(scores, kept=k) for k in counts]


@pytest.mark.parametrize("counts", [(108, 108, 0), (60, 20, 3), (0,), (50,), (108, 1)])
@pytest.mark.parametrize("kind", ["sum", "draws", "tasks"])
def test_superposed_layers_survive_a_file(kind, counts):
    masks = nested((4, 3, 3, 3), counts)
    if kind == "tasks":
        masks = masks[::-1]
    planes = [Plane(mask, 0.5 + i) for i, mask in enumerate(masks)]
    plain = nn.Conv2d(3, 4, 3, padding=1)
    nn.init.zeros_(plain.bias).requires_grad_(False)
    model = nn.Sequential(Superposed.of(plain, recipe(), kind, planes))
    ticket = st.Ticket(st.Ticket.from_model(model).raw)
    loaded = ticket.apply(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    assert loaded[0].masks == masks and loaded[0].kind == kind
    assert torch.equal(loaded[0].weight, model[0].weight)
    assert torch.equal(loaded[0].alpha, model[0].alpha)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(loaded(x), model(x))
    again = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    st.sparsify_(again, st.EdgePopup())
    assert torch.equal(ticket.apply(again)(x), model(x))


def test_superposed_weights_are_what_they_say():
    a, b, c = nested((4, 3, 3, 3), (60, 20, 3))
    plain = nn.Conv2d(3, 4, 3, bias=False)
    drawn = recipe().weight((4, 3, 3, 3), torch.float32, torch.device("cpu"))
    made = Superposed.of(plain, recipe(), "sum", [Plane(a), Plane(b, 2.0), Plane(c, -1.0)])
    factor = a.to_dense() + 2.0 * b.to_dense() - 1.0 * c.to_dense()
    assert torch.equal(made.weight, drawn * factor)
    made = Superposed.of(plain, recipe(), "draws", [Plane(a), Plane(b), Plane(c)])
    draws = [
        torch.ops.sparseticket.regenerate(*recipe().arguments((4, 3, 3, 3)), draw=i)
        for i in range(3)
    ]
    expected = torch.where(b.to_dense(), draws[1], draws[0])
    expected = torch.where(c.to_dense(), draws[2], expected) * a.to_dense()
    assert torch.equal(made.weight, expected)


def test_superposed_refusals():
    plain = nn.Linear(9, 4)
    a, b = nested((4, 9), (20, 5))
    with pytest.raises(ValueError, match="masks of kind 'sum' must be nested"):
        Superposed.of(plain, recipe(), "sum", [Plane(b), Plane(a)])
    with pytest.raises(ValueError, match="kind: got 'mean', accepted: sum, draws, tasks"):
        Superposed.of(plain, recipe(), "mean", [Plane(a)])
    with pytest.raises(ValueError, match="planes: got none"):
        Superposed.of(plain, recipe(), "sum", [])


def test_plain_tickets_are_still_version_1():
    assert ticket_of(st.EdgePopup()).meta["format_version"] == 1
    assert ticket_of(st.Frozen()).meta["format_version"] == 2


def test_patterns_of_no_and_of_all_weights():
    for pruned, locked in ((0, 0), (36, 0), (0, 36), (20, 16)):
        pattern = FrozenPattern(5, 7, (4, 9), pruned, locked)
        mask = pattern.expand(PackedMask.full((pattern.free_count,)))
        assert mask == pattern.free | pattern.locked_mask
        layer = st.SparseLinear(9, 4, bias=False, form="ticket", mask=mask, seed=5, layer=7)
        layer.frozen_pattern = pattern
        raw = st.Ticket.from_model(nn.Sequential(layer)).raw
        assert st.Ticket(raw).masks["0"] == mask
