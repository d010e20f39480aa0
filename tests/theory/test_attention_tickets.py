"""Attention tickets: structure, entry errors, the deterministic bound, any length and mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparseticket.theory.attention import (
    Attention,
    Block,
    attention_bound,
    attention_ticket,
    block_budgets,
    block_ticket,
    entry_budgets,
    source_attention,
    source_block,
)


def target(heads=1, inputs=2, width=3, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        m = torch.randn(heads, *shape, generator=generator, dtype=torch.float64)
        return m / torch.linalg.matrix_norm(m, 2, keepdim=True)

    return Attention(*(matrix(inputs, width) for _ in range(3)), matrix(width, outputs))


def ticket(net, width, init="theory", seed=0, eps=0.0, objective="min_error"):
    heads, inputs, _ = net.query.shape
    source = source_attention(inputs, net.output.shape[2], width, heads=heads, init=init, seed=seed)
    return source, attention_ticket(net, source, eps, objective=objective)


def sequences(length, inputs=2, n=6, alpha=1.5, seed=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, length, inputs, generator=generator, dtype=torch.float64)
    return alpha * x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("heads", "size", "length"), [(1, 4, 5), (2, 6, 7), (3, 3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_attention_of_torch(heads, size, length, causal):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(size, heads, batch_first=True).double()
    x = torch.randn(2, length, size, dtype=torch.float64)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    expected, _ = module(x, x, x, attn_mask=mask)
    found = Attention.from_torch(module)(x, causal)
    torch.testing.assert_close(found, expected)


def test_biases_are_refused():
    module = nn.MultiheadAttention(4, 2)
    nn.init.ones_(module.out_proj.bias)
    with pytest.raises(ValueError, match="biases are not 0"):
        Attention.from_torch(module)
    with pytest.raises(ValueError, match="own sizes"):
        Attention.from_torch(nn.MultiheadAttention(4, 2, kdim=3))


@pytest.mark.parametrize("init", ["theory", "xavier"])
def test_sources(init):
    source = source_attention(3, 2, 81, heads=2, init=init, seed=5)
    limit = {"theory": (3.0, 1.0), "xavier": (math.sqrt(6 / 84), math.sqrt(6 / 83))}[init]
    for factor, bound in ((source.query, limit[0]), (source.output, limit[1])):
        assert bound * 0.97 < float(factor.detach().abs().max()) <= bound * (1 + 1e-6)
    again = source_attention(3, 2, 81, heads=2, init=init, seed=5)
    assert torch.equal(again.value, source.value) and not torch.equal(source.value, source.query)


@pytest.mark.parametrize(("heads", "inputs", "outputs", "width"), [(1, 2, 1, 20), (2, 3, 2, 31)])
def test_structure(heads, inputs, outputs, width):
    net = target(heads, inputs, outputs=outputs)
    source, found = ticket(net, width)
    block = width // inputs
    blocks = torch.eye(inputs, dtype=torch.bool).repeat_interleave(block, 1)
    for name in ("query", "value"):
        mask = found.masks[name].to_dense()
        assert torch.equal(mask[:, :, : inputs * block], blocks.expand(heads, -1, -1))
        assert not bool(mask[:, :, inputs * block :].any())
    for name, mask in found.masks.items():
        kept, before = getattr(found.network, name), getattr(source, name)
        dense = mask.to_dense()
        assert torch.equal(kept[dense], before[dense]) and not bool(kept[~dense].any())
    assert found.report["kept"] == sum(m.kept for m in found.masks.values())
    assert found.report["subset_sums"] == heads * inputs * (inputs + outputs)


def test_entries_are_within_eps():
    net = target(2, 2, outputs=2)
    _, found = ticket(net, 48, eps=0.01, objective="min_card")
    worst = 0.0
    for got, want in zip(found.network.merged(), net.merged(), strict=True):
        worst = max(worst, float((got - want).abs().max()))
    assert found.report["failed"] == 0 and worst <= 0.01 + 1e-12
    assert worst == pytest.approx(max(found.report["error_qk"], found.report["error_vo"]))
    _, sparse = ticket(net, 48, eps=0.01, objective="min_error")
    assert found.report["kept"] < sparse.report["kept"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("init", ["theory", "xavier"])
@pytest.mark.parametrize("width", [6, 12, 24])
def test_the_bound_holds_for_every_length(causal, init, width):
    """Deterministic: from the measured errors of entries, whatever they are."""
    net = target(2, 2, outputs=2, seed=width)
    _, found = ticket(net, width, init, seed=1)
    for alpha in (0.3, 1.5):
        bound = attention_bound(net, found.error_qk, found.error_vo, alpha)
        for length in (1, 2, 33, 512):
            x = sequences(length, alpha=alpha)
            error = (found.network(x, causal) - net(x, causal)).norm(dim=-1).max()
            assert float(error) <= bound * (1 + 1e-12)
    assert attention_bound(net, torch.zeros(2), torch.zeros(2), 1.5) == 0


def test_the_bound_is_not_idle():
    """Half of what an error in VO alone can do is seen; so the bound cannot be lowered by much."""
    net = target()
    worse = Attention(net.query, net.key, net.value, net.output)
    with torch.no_grad():
        worse.value = nn.Parameter(net.value.clone())
        worse.value[0] = net.value[0] + torch.linalg.pinv(net.output[0]).sum(0) * 0.1
    error = (worse.merged()[1] - net.merged()[1]).abs().amax((1, 2))
    bound = attention_bound(net, torch.zeros(1), error, 1.0)
    x = torch.full((1, 1, 2), math.sqrt(0.5), dtype=torch.float64)
    seen = float((worse(x) - net(x)).detach().norm())
    assert bound / 2 < seen <= bound * (1 + 1e-12)


def test_masks_know_no_length():
    net = target()
    source, found = ticket(net, 32)
    again = attention_ticket(net, source, 0.0, objective="min_error")
    assert again.masks == found.masks
    errors = []
    for length in (8, 1024):
        x = sequences(length, n=2)
        errors.append(float((found.network(x) - net(x)).abs().max()))
    bound = attention_bound(net, found.error_qk, found.error_vo, 1.5)
    assert max(errors) <= bound


def test_budgets_are_enough():
    """Entries within theorem 3's budgets leave the attention within eps."""
    eps, alpha = 0.3, math.sqrt(2)
    net = target(2, 2, outputs=2)
    qk, vo = entry_budgets(eps, heads=2, alpha=alpha, inputs=2, outputs=2)
    ones = torch.ones(2, dtype=torch.float64)
    assert attention_bound(net, qk * ones, vo * ones, alpha) <= eps


def test_budgets_of_blocks():
    budgets = block_budgets(0.1, 3, heads=2, alpha=1.5, inputs=4)
    growth = 4 * 2 * 2
    norm = [1.5, 1.5 * growth, 1.5 * growth**2]
    assert budgets[2] == pytest.approx(0.05)
    assert budgets[1] == pytest.approx(0.1 / (4 * 16 * 2 * 2 * norm[2] ** 2))
    assert budgets[0] == pytest.approx(0.1 / (4 * (64**2) * norm[1] ** 2 * norm[2] ** 2))
    assert block_budgets(0.1, 1, heads=2, alpha=1.5, inputs=4) == [0.1]


def test_blocks():
    torch.manual_seed(0)
    layers = [nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)]
    feedforward = nn.Sequential(*layers).double()
    net = Block(target(outputs=2), feedforward)
    source = source_block(2, 80, 120, layers=2, seed=3)
    found, report = block_ticket(net, source, 1e-3, objective="min_card")
    assert report["failed"] == 0
    x = sequences(9)
    assert float((found(x) - net(x)).detach().abs().max()) < 0.05
    for kept, random in zip(found.parameters(), source.parameters(), strict=True):
        assert torch.equal(kept[kept != 0], random[kept != 0])
    with pytest.raises(ValueError, match="need two for each"):
        block_ticket(net, source_block(2, 80, 120), 1e-3)


def test_bad_input():
    net = target()
    for width in (1, 130):
        with pytest.raises(ValueError, match=f"got {width} columns"):
            ticket(net, width)
    with pytest.raises(ValueError, match="init"):
        source_attention(2, 1, 8, init="x")
    with pytest.raises(ValueError, match="need >= 1"):
        source_attention(0, 1, 8)
    with pytest.raises(ValueError, match="source: got heads"):
        attention_ticket(net, source_attention(3, 1, 9), 0.1)
    with pytest.raises(ValueError, match="query, key, value"):
        Attention(*(torch.ones(1, 2, n) for n in (3, 4, 3)), torch.ones(1, 3, 2))
    nothing = Attention(*(torch.zeros_like(p) for p in net.parameters()))
    _, found = ticket(nothing, 8)
    assert found.masks["key"].kept == found.masks["output"].kept == 0
    broken = Attention(*(torch.full_like(p, torch.nan) for p in net.parameters()))
    with pytest.raises(ValueError, match="finite"):
        ticket(broken, 8)
