from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch

from sparseticket import _C, ops
from sparseticket.reference.masked_step import masked_step as reference
from sparseticket.reference.unpack_mask import unpack_mask

SHAPES = [
    *[(), (1,), (5,), (1, 1), (3, 17), (17, 63), (2, 64), (3, 129), (100, 100), (2, 3, 4)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (2, 130, 3, 3), (2, 3, 9, 11), (0, 5), (5, 0)],
]
SGD = {"lr": 0.1, "beta1": 0.9, "weight_decay": 1e-2}
RULES = {
    "plain": {"lr": 0.1},
    "momentum": SGD,
    "nesterov": {**SGD, "nesterov": True},
    "adamw": {"lr": 0.01, "beta1": 0.9, "weight_decay": 0.01, "step": 3},
}
LAYOUTS = [oracle.FORMATS["contiguous"], oracle.FORMATS["channels_last"]]


def inputs_of(shapes, rule, change=LAYOUTS[0], shadow=torch.bfloat16, density=0.4):
    """The lists of masked_step; dead gradients and moments are NaN, which must not matter."""
    masks = [torch.rand(s) < density for s in shapes]

    def made(value):
        return [change(torch.where(m, value(m.shape), torch.nan)) for m in masks]

    weights = [change(torch.randn(s)) for s in shapes]
    held = made(lambda s: 0.1 * torch.randn(s)) if RULES[rule].get("beta1") else []
    squares = made(torch.rand) if rule == "adamw" else []
    shadows = [torch.empty_like(w, dtype=shadow) for w in weights] if shadow else []
    words = [ops.pack_mask(m) for m in masks]
    return weights, made(torch.randn), held, squares, shadows, words


def run(op, inputs, **options):
    """Everything ``op`` leaves behind, from copies of the inputs."""
    copied = [[t.clone() for t in tensors] for tensors in inputs[:5]]
    op(*copied, inputs[5], **options)
    return copied[0], *copied[2:5]


def check_step(got, inputs, options):
    """Live weights and moments within a few roundings of float64; the rest bit for bit."""
    exact = [[t.double() for t in tensors] for tensors in inputs[:4]]
    expected = run(reference, (*exact, inputs[4], inputs[5]), **options)
    for mine, theirs in zip(got[:3], expected[:3], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.stride() == b.stride()
            size = 1 + b.abs()  # of the operands, all of order 1
            assert bool(((a - b).abs() <= 8 * torch.finfo(a.dtype).eps * size).all())
    for i, words in enumerate(inputs[5]):
        live = unpack_mask(words, inputs[0][i].shape)
        assert torch.equal(got[0][i][~live], inputs[0][i][~live])
        for states in got[1:3]:
            assert not states or not states[i][~live].view(torch.int32).any()
        if got[3]:
            shadow = torch.where(live, got[0][i], 0.0).to(got[3][i].dtype)
            assert got[3][i].stride() == got[0][i].stride()
            yield got[3][i], shadow


@pytest.mark.parametrize("rule", RULES)
def test_against_the_reference(isa, rule):
    torch.manual_seed(0)
    for change in LAYOUTS:
        for density in (0.0, 0.4, 1.0):
            for shadow in (torch.bfloat16, torch.float16, None):
                inputs = inputs_of(SHAPES, rule, change, shadow, density)
                got = run(ops.masked_step, inputs, **RULES[rule])
                for made, expected in check_step(got, inputs, RULES[rule]):
                    assert torch.equal(made, expected)


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_the_same_bits_on_every_level_and_for_any_thread_count(rule):
    torch.manual_seed(0)
    inputs = inputs_of([(200, 513), (64, 64, 3, 3), (33000,)], rule)
    before, made = _C.isa(), []
    for level in _C.isas():
        _C.set_isa(level)
        made += oracle.by_threads(partial(run, ops.masked_step, inputs, **RULES[rule]))
    _C.set_isa(before)
    for other in made[1:]:
        for mine, theirs in zip(other, made[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("rule", ["plain", "momentum", "nesterov", "adamw"])
def test_steps_of_torch(isa, rule):
    """Five steps of torch.optim on the live weights alone, and a new mask after two."""
    torch.manual_seed(0)
    shape, options = (17, 130), {**RULES[rule], "weight_decay": 0.0}
    mask = torch.rand(shape) < 0.4
    mine = torch.randn(shape)
    theirs = torch.nn.Parameter(mine.clone())
    kind = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    given = {"lr": options["lr"], "weight_decay": 0.0}
    if rule != "adamw":
        given |= {"momentum": options.get("beta1", 0.0), "nesterov": rule == "nesterov"}
    optimizer = kind([theirs], **given)
    held = [torch.zeros(shape)] if rule != "plain" else []
    squares = [torch.zeros(shape)] if rule == "adamw" else []
    for step in range(1, 6):
        grad = torch.randn(shape)
        theirs.grad = grad * mask
        optimizer.step()
        words = [ops.pack_mask(mask)]
        ops.masked_step([mine], [grad], held, squares, [], words, **{**options, "step": step})
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_of_any_layout_and_dtype():
    torch.manual_seed(0)
    inputs = inputs_of([(8, 5, 3, 3), (17, 63)], "momentum")
    expected = run(ops.masked_step, inputs, **SGD)
    for change in oracle.FORMATS.values():
        other = (inputs[0], [change(g) for g in inputs[1]], *inputs[2:])
        _same(run(ops.masked_step, other, **SGD), expected)
    halves = (inputs[0], [g.bfloat16() for g in inputs[1]], *inputs[2:])
    floats = (inputs[0], [g.bfloat16().float() for g in inputs[1]], *inputs[2:])
    _same(run(ops.masked_step, halves, **SGD), run(ops.masked_step, floats, **SGD))


def _same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_versions_are_counted():
    inputs = inputs_of([(5, 70)], "adamw")
    tensors = [inputs[i][0] for i in (0, 2, 3, 4)]
    before = [t._version for t in tensors]
    ops.masked_step(*inputs, **RULES["adamw"])
    assert all(t._version > b for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    torch.manual_seed(0)
    weights, _, held, squares, shadows, words = inputs_of([(17, 63), (8, 3, 3, 3)], rule)
    held, squares = ([torch.zeros_like(t) for t in ts] for ts in (held, squares))
    grads = [torch.randn_like(w) for w in weights]
    shadows = [torch.zeros_like(s) for s in shadows]
    args = (weights, grads, held, squares, shadows, words)
    torch.library.opcheck(ops.masked_step, args, RULES[rule])


def test_compiled():
    torch.manual_seed(0)
    inputs = inputs_of([(17, 63)], "momentum")

    def op(weight, grad, held, shadow):
        ops.masked_step([weight], [grad], [held], [], [shadow], inputs[5], **SGD)
        return weight + 0

    clone = [[inputs[i][0].clone() for i in (0, 1, 2, 4)] for _ in range(2)]
    made, eager = oracle.compiled(op)(*clone[0]), op(*clone[1])
    assert torch.equal(made, eager)
    for a, b in zip(*clone, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_errors():
    def args(**changes):
        names = ("weights", "grads", "momenta", "variances", "shadows", "words")
        given = dict(zip(names, inputs_of([(5, 70)], "momentum"), strict=True))
        return given | {"lr": 0.1} | changes

    wide = torch.zeros(5, 140)
    for error, text, changes in [
        (TypeError, "weights: got torch.float64, need float32", {"weights": [wide.double()]}),
        (ValueError, r"weights: got strides \(140, 2\)", {"weights": [wide[:, ::2]]}),
        (ValueError, r"grads: got shape \(5, 140\), need \(5, 70\)", {"grads": [wide]}),
        (ValueError, "grads: got 0 for 1 weights", {"grads": []}),
        (ValueError, r"momenta: got torch.float32 \(5, 140\), need", {"momenta": [wide]}),
        (ValueError, r"momenta: got strides \(140, 2\)", {"momenta": [wide[:, ::2]]}),
        (ValueError, "momenta: AdamW", {"momenta": [], "variances": [wide[:, :70].clone()]}),
        (ValueError, "shadows: got torch.float32", {"shadows": [wide[:, :70].clone()]}),
        (ValueError, "words: got torch.int32", {"words": [torch.zeros(0, 4).int()]}),
    ]:
        with pytest.raises(error, match="masked_step: " + text):
            ops.masked_step(**args(**changes))
