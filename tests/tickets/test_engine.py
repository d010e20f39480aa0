"""The selection engine: exact counts, scopes, patterns, ties; frozen patterns; collapse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket.formats import kept_count
from sparseticket.masks import PackedMask
from sparseticket.nn import FrozenPattern
from sparseticket.tickets import select
from sparseticket.tickets.engine import draw_scores, warn_of_collapse

DENSITIES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
SHAPES = {
    1: (1, 1),
    2: (1, 2),
    3: (3, 1),
    10: (2, 5),
    100: (4, 25),
    1728: (64, 3, 3, 3),
    36864: (64, 64, 3, 3),
}


def scores_of(shape, seed=1):
    return draw_scores(seed, "a", shape, "normal", 1.0)


@pytest.mark.parametrize("n", SHAPES)
def test_exact_counts(n):
    scores = scores_of(SHAPES[n])
    for density in DENSITIES:
        (mask,) = select([scores], [kept_count(density, n)])
        assert mask.kept == kept_count(density, n)
        if 0 < mask.kept < n:
            dense = mask.to_dense()
            assert scores[dense].abs().min() >= scores[~dense].abs().max()
    assert select([scores], [n])[0] == PackedMask.full(scores.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ],
)
def test_memory_formats_give_one_mask(change):
    scores = scores_of((8, 6, 3, 3))
    assert select([change(scores)], [100]) == select([scores], [100])


def test_ties_go_to_the_lowest_index():
    (mask,) = select([torch.ones(3, 4)], [5])
    assert mask.to_dense().flatten().tolist() == [True] * 5 + [False] * 7
    first, second = select([torch.ones(2, 3), torch.ones(2, 3)], 8, scope="global")
    assert (first.kept, second.kept) == (6, 2)


def test_scale_shift_and_permutation():
    scores = scores_of((20, 30))
    (mask,) = select([scores], [123])
    assert select([3.7 * scores], [123]) == [mask]
    shifted = scores.abs().double().add(2).mul(scores.sign()).float()
    assert select([shifted], [123]) == [mask]
    order = torch.randperm(20)
    assert torch.equal(select([scores[order]], [123])[0].to_dense(), mask.to_dense()[order])


def test_global_equals_the_concatenated_top():
    parts = [scores_of((7, 9)), scores_of((4, 3, 3, 3), 2), scores_of((1, 50), 3)]
    masks = select(parts, 60, scope="global")
    flat = torch.cat([p.flatten() for p in parts]).abs()
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[flat.argsort(descending=True, stable=True)[:60]] = True
    got = torch.cat([m.to_dense().flatten() for m in masks])
    assert torch.equal(got, expected)
    floor = select(parts, 60, scope="global", min_keep_per_layer=15)
    assert min(m.kept for m in floor) >= 15 and sum(m.kept for m in floor) == 60


def test_within_limits_the_choice():
    scores = [scores_of((6, 6)), scores_of((6, 6), 2)]
    within = [PackedMask.from_dense(torch.rand(6, 6) < 0.5) for _ in scores]
    for mask, limit in zip(select(scores, 9, scope="global", within=within), within, strict=True):
        assert mask & limit == mask
    with pytest.raises(ValueError, match="kept: got 72"):
        select(scores, 72, scope="global", within=within)


def test_patterns_are_exact_and_regenerated():
    pattern = FrozenPattern(3, 9, (16, 5, 3, 3), 200, 100)
    again = FrozenPattern(3, 9, (16, 5, 3, 3), 200, 100)
    free, locked = pattern.free, pattern.locked_mask
    assert (free.kept, locked.kept, pattern.free_count) == (420, 100, 420)
    assert (free & locked).kept == 0 and (~(free | locked)).kept == 200
    assert again.free == free and again.locked_mask == locked
    assert FrozenPattern(4, 9, (16, 5, 3, 3), 200, 100).free != free
    # a share that only grows keeps what it had: nested by construction
    assert FrozenPattern(3, 9, (16, 5, 3, 3), 300, 0).free & free == free
    dense = torch.randn(16, 5, 3, 3)
    compact = pattern.compact(dense)
    assert torch.equal(pattern.spread(compact), dense * free.to_dense())
    with pytest.raises(ValueError, match="pruned, locked: got 500 and 300"):
        FrozenPattern(3, 9, (16, 5, 3, 3), 500, 300)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_selection_under_a_pattern(scope):
    shapes = [(16, 9), (4, 4, 3, 3)]
    patterns = [FrozenPattern(1, i, s, 40, 30) for i, s in enumerate(shapes)]
    scores = [p.compact(scores_of(s)) for p, s in zip(patterns, shapes, strict=True)]
    kept = 130 if scope == "global" else [60, 70]
    masks = select(scores, kept, scope=scope, patterns=patterns)
    assert sum(m.kept for m in masks) == 130
    for mask, pattern in zip(masks, patterns, strict=True):
        assert mask & pattern.locked_mask == pattern.locked_mask
        assert mask & (pattern.free | pattern.locked_mask) == mask
        assert pattern.expand(pattern.restrict(mask)) == mask
    with pytest.raises(ValueError, match="differs from the pattern"):
        patterns[0].restrict(~masks[0])
    for infeasible in (10, 250):
        wrong = infeasible if scope == "global" else [infeasible, 70]
        with pytest.raises(ValueError, match="locked and"):
            select(scores, wrong, scope=scope, patterns=patterns)


def test_an_empty_pattern_is_no_pattern():
    shapes = [(16, 9), (4, 4, 3, 3)]
    scores = [scores_of(s, i) for i, s in enumerate(shapes)]
    patterns = [FrozenPattern(1, i, s, 0, 0) for i, s in enumerate(shapes)]
    compact = [p.compact(s) for p, s in zip(patterns, scores, strict=True)]
    got = select(compact, 100, scope="global", patterns=patterns)
    assert got == select(scores, 100, scope="global")


def test_collapse_is_reported(caplog):
    model = nn.Sequential()
    model.wide, model.narrow = nn.Linear(400, 30), nn.Linear(4, 4)
    st.sparsify_(model, st.EdgePopup(density=0.001, scope="global"))
    masks = [(n, m.mask) for n, m in model.named_modules() if isinstance(m, st.SparseLinear)]
    assert warn_of_collapse(masks) == ["wide"]
    assert "layer collapse: nothing is kept in wide" in caplog.text
