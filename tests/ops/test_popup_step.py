from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch

from sparseticket import _C, ops
from sparseticket.reference.popup_step import popup_step as reference
from sparseticket.reference.unpack_mask import unpack_mask

TRANSFORMS = ["abs", "identity"]
SHAPES = [
    *[(), (1,), (5,), (1, 1), (3, 17), (17, 63), (2, 64), (3, 129), (100, 100), (2, 3, 4)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (2, 130, 3, 3), (2, 3, 9, 11), (0, 5), (5, 0)],
]
SGD = {"lr": 0.1, "beta1": 0.9, "weight_decay": 1e-4}
RULES = {
    "plain": {"lr": 0.1},
    "momentum": SGD,
    "nesterov": {**SGD, "nesterov": True},
    "adamw": {"lr": 0.01, "beta1": 0.9, "weight_decay": 0.01, "step": 3},
}
LAYOUTS = [oracle.FORMATS["contiguous"], oracle.FORMATS["channels_last"]]


def _inputs(shapes, rule, signed=True, change=LAYOUTS[0], ties=False):
    """Arguments of popup_step up to ``sigmas`` that are not settings; every other tensor signed."""
    made = [change(torch.randn(s)) for s in shapes]
    if ties:
        made = [change((2 * s).round()) for s in made]
    held = [change(0.1 * torch.randn(s)) for s in shapes] if RULES[rule].get("beta1") else []
    squares = [change(torch.rand(s)) for s in shapes] if rule == "adamw" else []
    words = [ops.pack_mask(torch.zeros(s, dtype=torch.bool)) for s in shapes]
    signs = [
        ops.sign_words(0, i, s) if signed and i % 2 == 0 else None for i, s in enumerate(shapes)
    ]
    grads = [change(torch.randn(s)) for s in shapes]
    return made, grads, held, squares, words, signs, [0.0625 * (i + 1) for i in range(len(shapes))]


def _run(op, inputs, kept, state, **options):
    """Everything ``op`` leaves behind, from copies of the inputs."""
    copied = [[None if t is None else t.clone() for t in ts] for ts in inputs[:6]]
    scores, grads, momenta, variances, words, signs = copied
    state = state.clone()
    op(scores, grads, momenta, variances, words, state, kept, signs, inputs[6], **options)
    return scores, momenta, variances, words, state


def _close(got, expected, transform, kept, scope="layer", min_keep=0):
    """Scores and moments within rounding; masks and state exactly those of the scores made."""
    for mine, theirs in zip(got[:3], expected[:3], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=4e-6, atol=1e-6)
    words, state = ops.select_mask(got[0], kept, None, None, scope, transform, min_keep)
    for a, b in zip((*got[3], got[4]), (*words, state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rule", RULES)
def test_against_the_reference(isa, rule, transform):
    torch.manual_seed(0)
    for change in LAYOUTS:
        inputs = _inputs(SHAPES, rule, change=change)
        for part in (0, 1, 3):
            kept = [s.numel() * part // 3 for s in inputs[0]]
            state = torch.zeros(len(SHAPES), 2, dtype=torch.int32)
            options = {**RULES[rule], "transform": transform}
            got = _run(ops.popup_step, inputs, kept, state, **options)
            _close(got, _run(reference, inputs, kept, state, **options), transform, kept)
            again = _run(ops.popup_step, inputs, kept, got[4], **options)  # a perfect hint
            _same(got, again)


def _same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_the_same_bits_on_every_level_and_for_any_thread_count(rule, transform):
    torch.manual_seed(0)
    shapes = [(200, 513), (64, 64, 3, 3), (33000,)]
    for change in LAYOUTS:
        inputs = _inputs(shapes, rule, change=change)
        for scope in ("layer", "global"):
            kept = [20000, 9000, 7] if scope == "layer" else [50000]
            options = {**RULES[rule], "scope": scope, "transform": transform}
            state = torch.zeros(len(kept), 2, dtype=torch.int32)
            before, made = _C.isa(), []
            for level in _C.isas():
                _C.set_isa(level)
                for hint in (state, made[0][4] if made else state):
                    step = partial(_run, ops.popup_step, inputs, kept, hint, **options)
                    made += oracle.by_threads(step)
            _C.set_isa(before)
            _close(made[0], _run(reference, inputs, kept, state, **options), transform, kept, scope)
            for other in made[1:]:
                _same(other, made[0])


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_steps_of_torch(isa, rule):
    """Five steps of torch.optim and select_mask, on gradients made from the scores."""
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(100, 130))
    mine = theirs.detach().clone()
    if rule == "adamw":
        optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=1e-4)
    moments = [torch.zeros_like(mine)], [torch.zeros_like(mine)] if rule == "adamw" else []
    words, state = [ops.pack_mask(torch.zeros(100, 130) > 0)], torch.zeros(1, 2, dtype=torch.int32)
    for step in range(1, 6):
        theirs.grad = (theirs.detach() - 1) * torch.linspace(0, 1, 130)
        grad = (mine - 1) * torch.linspace(0, 1, 130)
        optimizer.step()
        options = {**RULES[rule], "step": step}
        ops.popup_step([mine], [grad], *moments, words, state, [4000], [None], [1.0], **options)
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
        expected, _ = ops.select_mask([mine], [4000])
        assert torch.equal(words[0], expected[0])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_raw_gradients_are_finished_with_the_weights_sign(isa, transform):
    torch.manual_seed(0)
    for shape in [(17, 63), (8, 70, 3, 3)]:
        for change in LAYOUTS:
            scores = change(torch.randn(shape))
            scores[0, 0] = 0.0
            scores[0, 1] = -0.0
            grad, signs = change(torch.randn(shape)), ops.sign_words(0, 1, shape)
            weight = torch.where(unpack_mask(signs, shape), -0.5, 0.5)
            sign = scores.sign() if transform == "abs" else 1
            expected = scores - 0.1 * (grad * weight * sign)
            words = [ops.pack_mask(torch.zeros(shape, dtype=torch.bool))]
            state = torch.zeros(1, 2, dtype=torch.int32)
            args = ([scores], [grad], [], [], words, state, [5], [signs], [0.5], 0.1)
            ops.popup_step(*args, transform=transform)
            assert torch.equal(scores, expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_ties_and_missed_hints(isa, transform):
    torch.manual_seed(0)
    inputs = _inputs([(300, 437)], "plain", signed=False, ties=True)
    inputs[1][0].zero_()
    for bits in (0, 1, 0x3F800000, -1, -(2**31), 2**31 - 1):
        state = torch.tensor([[bits, 0]], dtype=torch.int32)
        got = _run(ops.popup_step, inputs, [40000], state, lr=0.1, transform=transform)
        assert torch.equal(got[0][0], inputs[0][0])
        _close(got, got, transform, [40000])


@pytest.mark.parametrize("least", [1, 7])
def test_min_keep(isa, least):
    torch.manual_seed(0)
    inputs = _inputs([(17, 63), (8, 3, 3, 3), (5,)], "momentum")
    inputs[0][1].mul_(1e-3)
    inputs[1][1].mul_(1e-3)
    state = torch.zeros(1, 2, dtype=torch.int32)
    options = {**SGD, "scope": "global", "min_keep": least}
    got = _run(ops.popup_step, inputs, [500], state, **options)
    _close(got, _run(reference, inputs, [500], state, **options), "abs", [500], "global", least)


def test_gradients_of_any_layout_and_dtype():
    torch.manual_seed(0)
    inputs = _inputs([(8, 5, 3, 3), (17, 63)], "momentum")
    state = torch.zeros(2, 2, dtype=torch.int32)
    expected = _run(ops.popup_step, inputs, [100, 100], state, **SGD)
    for change in oracle.FORMATS.values():
        grads = [change(g) for g in inputs[1]]
        clones = [[t.clone() for t in inputs[i]] for i in (0, 2, 4)]
        fresh = state.clone()
        ops.popup_step(
            clones[0], grads, clones[1], [], clones[2], fresh, [100, 100], inputs[5], inputs[6],
            **SGD,
        )  # fmt: skip
        _same((clones[0], clones[1], clones[2]), (expected[0], expected[1], expected[3]))
    halves = (inputs[0], [g.bfloat16() for g in inputs[1]], *inputs[2:])
    floats = (inputs[0], [g.bfloat16().float() for g in inputs[1]], *inputs[2:])
    _same(
        _run(ops.popup_step, halves, [9, 9], state, **SGD),
        _run(ops.popup_step, floats, [9, 9], state, **SGD),
    )


def test_nan_raises(isa):
    torch.manual_seed(0)
    inputs = _inputs([(5, 70), (300, 437)], "plain", signed=False)
    inputs[1][1][7, 7] = torch.nan
    for hint in (0, 0x3F000000):
        state = torch.full((2, 2), hint, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"popup_step: scores: NaN in tensor 1 \(1 with"):
            _run(ops.popup_step, inputs, [9, 9], state, lr=0.1)


def test_versions_are_counted():
    inputs = _inputs([(5, 70)], "momentum")
    state = torch.zeros(1, 2, dtype=torch.int32)
    tensors = [inputs[0][0], inputs[2][0], inputs[4][0], state]
    before = [t._version for t in tensors]
    ops.popup_step(*inputs[:5], state, [9], *inputs[5:], **SGD)
    assert all(t._version > b for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_opcheck(scope):
    torch.manual_seed(0)
    kept = [100, 50] if scope == "layer" else [150]
    for rule in ("plain", "momentum", "adamw"):
        inputs = _inputs([(17, 63), (8, 3, 3, 3)], rule)
        state = torch.zeros(len(kept), 2, dtype=torch.int32)
        args = (*inputs[:5], state, kept, *inputs[5:])
        torch.library.opcheck(ops.popup_step, args, {**RULES[rule], "scope": scope})


def test_compiled():
    torch.manual_seed(0)
    inputs = _inputs([(17, 63)], "momentum")
    state = torch.zeros(1, 2, dtype=torch.int32)

    def op(score, grad, held, words, state):
        args = ([score], [grad], [held], [], [words], state, [100], inputs[5], inputs[6])
        ops.popup_step(*args, **SGD)
        return score + 0

    clone = [[t.clone() for t in (*(inputs[i][0] for i in (0, 1, 2, 4)), state)] for _ in range(2)]
    for a, b in zip(
        (oracle.compiled(op)(*clone[0]), *clone[0]), (op(*clone[1]), *clone[1]), strict=True
    ):
        assert torch.equal(a, b)


def test_errors():
    def args(**changes):
        scores, grads, momenta, variances, words, signs, sigmas = _inputs([(5, 70)], "momentum")
        given = {
            "scores": scores,
            "grads": grads,
            "momenta": momenta,
            "variances": variances,
            "words": words,
            "state": torch.zeros(1, 2, dtype=torch.int32),
            "kept": [9],
            "signs": signs,
            "sigmas": sigmas,
            "lr": 0.1,
        }
        return given | changes

    wide = torch.zeros(5, 140)
    for error, text, changes in [
        (
            TypeError,
            r"scores: got torch\.float64, need float32",
            {"scores": [wide[:, :70].double()]},
        ),
        (ValueError, r"scores: got strides \(140, 2\)", {"scores": [wide[:, ::2]]}),
        (ValueError, r"grads: got shape \(5, 140\), need \(5, 70\)", {"grads": [wide]}),
        (ValueError, "grads: got 0 for 1 score tensors", {"grads": []}),
        (ValueError, r"momenta: got torch\.float32 \(5, 140\), need", {"momenta": [wide]}),
        (
            ValueError,
            r"momenta: got strides \(140, 2\), need \(70, 1\)",
            {"momenta": [wide[:, ::2]]},
        ),
        (ValueError, "momenta: AdamW", {"momenta": [], "variances": [wide[:, :70].clone()]}),
        (ValueError, r"words: got torch\.int32 \(0, 4\)", {"words": [torch.zeros(0, 4).int()]}),
        (ValueError, r"signs: got torch\.int32 \(0, 4\)", {"signs": [torch.zeros(0, 4).int()]}),
        (ValueError, "signs: got 2 for 1", {"signs": [None, None]}),
        (ValueError, r"state: got torch\.int32 \(2, 2\), need", {"state": torch.zeros(2, 2).int()}),
        (ValueError, "kept: got 351, need 0 <= kept <= 350", {"kept": [351]}),
        (ValueError, "scope: got 'net', accepted", {"scope": "net"}),
        (ValueError, "transform: got 'square', accepted", {"transform": "square"}),
    ]:
        with pytest.raises(error, match="popup_step: " + text):
            ops.popup_step(**args(**changes))
