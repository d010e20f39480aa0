"""Masks: exact selection, packed storage, random masks, regenerated weights, refusals."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

import sparseticket as st
from sparseticket import reference
from sparseticket.formats import kept_count, to_canonical
from sparseticket.prng import layer_id

DENSITIES = [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
SHAPES = [(), (5,), (3, 17), (4, 64), (2, 100), (6, 3, 3, 3), (1, 1, 1, 1), (0, 7), (7, 0)]


def _scores(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _top(scores, kept):
    """bool: the ``kept`` largest of flat ``scores``, ties to the lowest index."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.view(scores.shape)


# Selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1728, 36864])
def test_kept_counts_and_order(n):
    scores = _scores(n)
    for density in DENSITIES:
        mask = st.select_mask(scores, density=density)
        kept = math.floor(density * n + 0.5)
        assert mask.kept == kept == int(mask.to_dense().sum())
        assert torch.equal(mask.to_dense(), _top(scores.abs(), kept))


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_equals_the_reference(shape, transform):
    scores = _scores(*shape).mul(3).round()  # many ties
    for density in (0.3, 0.5, 1.0):
        kept = kept_count(density, scores.numel())
        words, _ = reference.select_mask.select_mask([scores], [kept], transform=transform)
        got = st.select_mask(scores, density=density, transform=transform)
        assert torch.equal(got.words, words[0])


def test_ties_go_to_the_lowest_index():
    mask = st.select_mask(torch.ones(3, 5), kept=7).to_dense()
    assert mask.flatten().tolist() == [True] * 7 + [False] * 8


def test_kept_edges_have_the_larger_scores():
    scores = _scores(40, 30)
    for transform, keys in (("abs", scores.abs()), ("identity", scores)):
        mask = st.select_mask(scores, density=0.3, transform=transform).to_dense()
        assert keys[mask].min() >= keys[~mask].max()


def test_layout_does_not_change_the_mask():
    scores = _scores(8, 5, 3, 3)
    expected = st.select_mask(scores, density=0.4)
    strided = torch.randn(8, 10, 3, 3)[:, ::2].copy_(scores)
    transposed = scores.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (scores.to(memory_format=torch.channels_last), strided, transposed):
        assert not same.is_contiguous()
        assert st.select_mask(same, density=0.4) == expected


def test_scaling_shifting_and_permuting_scores():
    scores = _scores(20, 30)
    mask = st.select_mask(scores, density=0.3)
    assert st.select_mask(scores * 4, density=0.3) == mask
    assert st.select_mask(scores.sign() * (scores.abs() + 8), density=0.3) == mask
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    permuted = st.select_mask(scores.flatten()[order], density=0.3).to_dense()
    assert torch.equal(permuted, mask.to_dense().flatten()[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_rank_as_in_float32(dtype):
    scores = _scores(50, 40).to(dtype)
    assert st.select_mask(scores, density=0.2) == st.select_mask(scores.float(), density=0.2)


def test_threads_do_not_change_masks(threads):
    scores = [_scores(300, 1000).mul(8).round(), _scores(70, 9)]
    words, _ = reference.select_mask.select_mask(scores, [111_111], scope="global")
    masks = st.select_mask(scores, kept=111_111, scope="global")
    assert all(torch.equal(m.words, w) for m, w in zip(masks, words, strict=True))


def test_a_list_takes_one_number_or_one_per_tensor():
    scores = [_scores(10), _scores(4, 5)]
    assert [m.kept for m in st.select_mask(scores, density=0.3)] == [3, 6]
    assert [m.kept for m in st.select_mask(scores, density=[0.5, 0.1])] == [5, 2]
    assert [m.kept for m in st.select_mask(scores, kept=[0, 20])] == [0, 20]
    assert isinstance(st.select_mask(scores[0], kept=1), st.PackedMask)


def test_global_equals_concatenated_top():
    scores = [_scores(30, 10), _scores(7, seed=1), _scores(4, 3, 3, 3, seed=2)]
    masks = st.select_mask(scores, density=0.2, scope="global")
    flat = torch.cat([s.abs().flatten() for s in scores])
    expected = _top(flat, kept_count(0.2, flat.numel()))
    assert torch.equal(torch.cat([m.to_dense().flatten() for m in masks]), expected)
    kept = torch.cat([s.abs()[m.to_dense()] for s, m in zip(scores, masks, strict=True)])
    dropped = torch.cat([s.abs()[~m.to_dense()] for s, m in zip(scores, masks, strict=True)])
    assert kept.min() >= dropped.max()  # one threshold for all


def test_min_keep_guards_against_layer_collapse():
    scores = [_scores(100) + 100, _scores(50) * 1e-3]
    assert [m.kept for m in st.select_mask(scores, density=0.2, scope="global")] == [30, 0]
    guarded = st.select_mask(scores, density=0.2, scope="global", min_keep_per_layer=4)
    assert [m.kept for m in guarded] == [26, 4]
    assert torch.equal(guarded[1].to_dense(), _top(scores[1].abs(), 4))


def test_within_limits_the_choice_but_not_the_count():
    scores = _scores(10, 10)
    allowed = torch.zeros(10, 10, dtype=torch.bool)
    allowed[:4] = True
    for within in (allowed, st.PackedMask.from_dense(allowed)):
        mask = st.select_mask(scores, density=0.3, within=within)
        assert mask.kept == 30
        assert torch.equal(mask.to_dense()[:4], _top(scores[:4].abs(), 30))


@pytest.mark.parametrize(
    ("scores", "kwargs", "error", "text"),
    [
        (torch.tensor([1.0, math.nan]), {"density": 0.5}, ValueError, "NaN"),
        (torch.ones(4), {"density": 1.5}, ValueError, "density: got 1.5"),
        (torch.ones(4), {"density": -0.1}, ValueError, "density"),
        (torch.ones(4), {"density": math.nan}, ValueError, "density"),
        (torch.ones(4), {"density": "half"}, TypeError, "density: got .half."),
        (torch.ones(4), {"kept": 5}, ValueError, "kept: got 5"),
        (torch.ones(4), {"kept": -1}, ValueError, "kept: got -1"),
        (torch.ones(4), {"kept": 1.5}, TypeError, "kept"),
        (torch.ones(4), {}, ValueError, "exactly one"),
        (torch.ones(4), {"density": 0.5, "kept": 2}, ValueError, "exactly one"),
        (torch.ones(4), {"density": 0.5, "scope": "model"}, ValueError, "layer, global"),
        (torch.ones(4), {"density": 0.5, "transform": "sign"}, ValueError, "abs, identity"),
        (
            torch.ones(4),
            {"density": 0.5, "min_keep_per_layer": 1},
            ValueError,
            "min_keep_per_layer",
        ),
        (torch.ones(4), {"density": 0.5, "within": torch.ones(5).bool()}, ValueError, "within"),
        (torch.ones(4), {"density": 0.5, "within": torch.ones(4)}, TypeError, "within"),
        (torch.ones(4), {"density": 1.0, "within": torch.zeros(4).bool()}, ValueError, "kept"),
        (torch.ones(4, dtype=torch.int32), {"density": 0.5}, TypeError, "int32"),
        (torch.ones(4, dtype=torch.float64), {"density": 0.5}, TypeError, "float64"),
        (torch.ones(4), {"density": "0.5"}, TypeError, "density: got '0.5'"),
        (torch.ones(4), {"density": ["0.5"]}, TypeError, "select_mask: density: got '0.5'"),
        (torch.ones(4), {"density": object()}, TypeError, "density"),
        (torch.ones(4), {"density": True}, TypeError, "density"),
        (torch.ones(4), {"kept": "2"}, TypeError, "kept: got '2'"),
        (torch.ones(4), {"kept": np.float64(2)}, TypeError, "kept"),
        (torch.ones(4), {"kept": torch.tensor(True)}, TypeError, "kept"),
        (
            [torch.ones(4)] * 2,
            {"density": 0.5, "within": st.PackedMask.full((4,))},
            TypeError,
            "within: got one PackedMask",
        ),
        (
            [torch.ones(4)] * 2,
            {"density": 0.5, "within": torch.ones(2, 4).bool()},
            TypeError,
            "within: got one Tensor",
        ),
        (
            torch.ones(4),
            {"density": 0.5, "scope": "global", "min_keep_per_layer": "1"},
            TypeError,
            "min_keep_per_layer: got '1'",
        ),
        ([], {"density": 0.5}, ValueError, "empty"),
        (3.0, {"density": 0.5}, TypeError, "float"),
        ([torch.ones(4), 3.0], {"density": 0.5}, TypeError, "float"),
        ([torch.ones(4)] * 2, {"density": [0.5] * 3}, ValueError, "3 numbers"),
        ([torch.ones(4)] * 2, {"kept": [1, 1], "scope": "global"}, ValueError, "2 numbers"),
        ([torch.ones(4)] * 2, {"density": 0.5, "within": [None]}, ValueError, "1 masks"),
        ([torch.ones(4), torch.ones(4, device="meta")], {"kept": 1}, ValueError, "devices"),
        (
            [torch.ones(4)] * 2,
            {"kept": 3, "scope": "global", "min_keep_per_layer": 2},
            ValueError,
            "alone keeps 4",
        ),
    ],
)
def test_select_mask_refuses(scores, kwargs, error, text):
    with pytest.raises(error, match=text):
        st.select_mask(scores, **kwargs)


# PackedMask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_mask_against_bool_tensors(shape):
    a, b = _scores(*shape) > 0, _scores(*shape, seed=1) > 0
    p, q = st.PackedMask.from_dense(a), st.PackedMask.from_dense(b)
    for got, expected in ((p & q, a & b), (p | q, a | b), (p ^ q, a ^ b), (~p, ~a)):
        assert torch.equal(got.to_dense(), expected)
        assert got == st.PackedMask.from_dense(expected)  # padding bits too
    assert p.kept == int(a.sum())
    assert p.distance(q) == int((a ^ b).sum())
    assert (p.shape, p.numel) == (tuple(shape), a.numel())
    assert p.density == (a.double().mean().item() if a.numel() else 1.0)


def test_bit_order_is_canonical_and_lowest_first():
    mask = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    mask[1, 2, 0, 1] = True
    words = st.PackedMask.from_dense(mask).words
    column = int(to_canonical(mask)[1].nonzero())
    assert column == 5  # (row 0, column 1) of 5 taps, channel 2 of 3
    assert words.shape == (2, 4)
    assert words.tolist() == [[0] * 4, [1 << 5, 0, 0, 0]]


def test_equality_hash_and_copies():
    a = st.PackedMask.from_dense(_scores(6, 70) > 0)
    assert a == st.PackedMask(a.words.clone(), a.shape)
    assert hash(a) == hash(st.PackedMask(a.words.clone(), a.shape))
    assert a != ~a
    assert st.PackedMask.full((2, 64)) != st.PackedMask.full((2, 8, 8))  # same words, other shape
    assert a != "mask"
    assert copy.deepcopy(a) == a == pickle.loads(pickle.dumps(a))
    assert "kept=" in repr(a)


@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2), np.array(2)])
def test_scalars_of_numpy_and_torch_are_numbers(half, two):
    scores = _scores(4)
    expected = st.select_mask(scores, kept=2)
    assert st.select_mask(scores, density=half) == st.select_mask(scores, kept=two) == expected
    assert st.select_mask([scores] * 2, density=[half, 0.5]) == [expected] * 2
    assert st.select_mask([scores] * 2, kept=torch.stack([torch.tensor(2)] * 2)) == [expected] * 2


def test_packed_mask_is_immutable():
    mask = st.PackedMask.full((2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.words = torch.zeros(2, 2, dtype=torch.int32)


def test_packed_mask_refuses():
    a, b = st.PackedMask.full((2, 3)), st.PackedMask.full((3, 2))
    for combine in (lambda: a & b, lambda: a | b, lambda: a ^ b, lambda: a.distance(b)):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
            combine()
    with pytest.raises(TypeError, match="need another PackedMask"):
        a & torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"torch.bool"):
        st.PackedMask.from_dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"need torch.int32 \(2, 2\)"):
        st.PackedMask(torch.zeros(2, 4, dtype=torch.int32), (2, 3))
    with pytest.raises(ValueError, match="int64"):
        st.PackedMask(torch.zeros(2, 2, dtype=torch.int64), (2, 3))


@pytest.mark.parametrize(("k", "word", "bit"), [(3, 0, 3), (3, 1, 0), (40, 1, 8), (70, 2, 6)])
def test_padding_bits_must_be_zero(k, word, bit):
    words = torch.zeros(2, 2 * -(-k // 64), dtype=torch.int32)
    words[1, word] = 1 << bit
    with pytest.raises(ValueError, match="beyond"):
        st.PackedMask(words, (2, k))
    words[1, word] = 1 << (bit - 1) if bit else 0
    st.PackedMask(words, (2, k))


# Random masks and weights ---------------------------------------------------------------------


def test_random_mask_is_exact_and_addressed_by_seed_and_layer():
    shape = (16, 8, 3, 3)
    mask = st.random_mask(3, "conv1", shape, 345)
    assert (mask.kept, mask.shape) == (345, shape)
    assert mask == st.random_mask(3, layer_id("conv1"), shape, 345)
    assert mask == st.random_mask(3, "module.conv1", shape, 345)
    others = [st.random_mask(4, "conv1", shape, 345), st.random_mask(3, "conv2", shape, 345)]
    for other in others:  # independent masks differ in 2*n*p*(1-p) places, here 484 +- 15
        assert 400 < mask.distance(other) < 570
    larger = st.random_mask(3, "conv1", shape, 400)
    assert larger & mask == mask


@pytest.mark.parametrize("dist", ["signed_constant", "uniform", "normal"])
def test_regenerate_moments_and_dtype(dist):
    w = st.regenerate(0, "fc", (256, 250), dist, sigma=0.25)
    n = w.numel()
    assert abs(w.mean()) < 4 * 0.25 / math.sqrt(n)
    assert abs(w.std() / 0.25 - 1) < 4 / math.sqrt(n)
    assert torch.equal(w, st.regenerate(0, layer_id("fc"), (256, 250), dist, sigma=0.25))
    half = st.regenerate(0, "fc", (256, 250), dist, sigma=0.25, dtype=torch.bfloat16)
    assert torch.equal(half, w.bfloat16())
    if dist == "signed_constant":
        assert w.abs().unique().tolist() == [0.25]


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"layer": 2**64}, ValueError, "layer"),
        ({"layer": 1.0}, TypeError, "layer"),
        ({"dist": "cauchy"}, ValueError, "signed_constant, uniform, normal"),
        ({"sigma": -1.0}, ValueError, "sigma"),
        ({"sigma": math.nan}, ValueError, "sigma"),
        ({"sigma": "x"}, TypeError, "sigma: got 'x'"),
        ({"shape": 3}, TypeError, "shape: got 3"),
        ({"shape": "3"}, TypeError, "shape: got '3'"),
        ({"shape": (-3,)}, ValueError, r"shape: got \(-3,\)"),
        ({"shape": (3.0, 2)}, TypeError, r"shape: got \(3.0, 2\)"),
        ({"dtype": torch.int8}, TypeError, "int8"),
    ],
)
def test_regenerate_refuses(kwargs, error, text):
    good = {"seed": 0, "layer": "a", "shape": (2, 3), "sigma": 1.0}
    with pytest.raises(error, match=text):
        st.regenerate(**(good | kwargs))
