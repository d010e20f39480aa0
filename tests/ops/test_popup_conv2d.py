from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from sparseticket import ops, prng
from sparseticket.reference.masked_conv2d import masked_conv2d
from sparseticket.reference.popup_conv2d import popup_conv2d as reference
from sparseticket.reference.popup_linear import popup_score_grad
from sparseticket.reference.regenerate import regenerate

MODULE = oracle.module_of("masked_conv2d")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIGMA = prng.round_bf16(0.37)
RECIPE = (5, 7, SIGMA)
SMALL = ((2, 4, 5, 6), (6, 2, 3, 2), ((2, 1), (1, 0), (1, 2), 2))


def _inputs(x_shape, shape, dtype, bias=True):
    """x, weight, scores, bias; the weight is the regenerated one, some scores are exactly 0."""
    scores = torch.randn(shape)
    scores[torch.rand(shape) < 0.1] = 0
    return [
        torch.randn(x_shape, dtype=dtype),
        regenerate(5, 7, shape, "signed_constant", SIGMA, dtype=dtype),
        scores,
        torch.randn(shape[0], dtype=dtype) if bias else None,
    ]


def _op(words, geometry, transform="abs", seeded=False):
    return lambda x, w, s, b: ops.popup_conv2d(
        x, None if seeded else w, s, words, b, transform, *RECIPE, *geometry
    )


def _straight_through(words, geometry, transform="abs"):
    """Forward W*mask; backward as if the mask were |s| (or s) itself."""

    def op(x, w, s, b):
        key = s.abs() if transform == "abs" else s
        mask = ops.unpack_mask(words, w.shape)
        return F.conv2d(x, w * ((key - key.detach()) + mask), b, *geometry)

    return op


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype, transform):
    torch.manual_seed(0)
    for i, (x_shape, shape, *geometry) in enumerate(oracle.CONVS):
        for _, _, words in oracle.patterns(shape, "half rows"):
            inputs = _inputs(x_shape, shape, dtype, bias=i % 2 == 0)
            expected = _straight_through(words, geometry, transform)
            oracle.compare(_op(words, geometry, transform), expected, inputs, [0, 1, 2, 3])
            seeded = _op(words, geometry, transform, seeded=True)
            oracle.compare(seeded, expected, inputs, [0, 2, 3])


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("seeded", [False, True])
def test_score_gradient_is_the_dense_weight_gradient_times_weight_and_sign(path, seeded, transform):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    mask = torch.rand(shape) < 0.5
    words = ops.pack_mask(mask)
    inputs = _inputs(x_shape, shape, torch.float32)
    x, weight, scores, bias = inputs
    _, grad, (gs,) = oracle.gradients(_op(words, geometry, transform, seeded), inputs, [2])
    effective = torch.where(mask, weight, 0).requires_grad_()  # a leaf of the same dense layer
    (dense,) = torch.autograd.grad(F.conv2d(x, effective, bias, *geometry), effective, grad)
    sign = scores.sign() if transform == "abs" else 1
    torch.testing.assert_close(gs, dense * weight * sign)
    zero = scores == 0
    assert bool((gs[~mask & ~zero] != 0).all())  # dropped edges included
    assert bool(zero.any())
    assert bool((gs[zero] == 0).all()) == (transform == "abs")


@pytest.mark.parametrize("path", ["materialised"], indirect=True)
def test_regenerated_equals_given_weight_bit_for_bit(path):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    for dtype in DTYPES:
        inputs = _inputs(x_shape, shape, dtype)
        y, grad, grads = oracle.gradients(_op(words, geometry), inputs, [0, 2, 3])
        seeded = _op(words, geometry, seeded=True)
        y2, _, grads2 = oracle.gradients(seeded, inputs, [0, 2, 3], grad)
        for a, b in zip((y, *grads), (y2, *grads2), strict=True):
            assert torch.equal(a, b)


def test_the_reference_is_masked_conv2d():
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    x, weight, scores, bias = _inputs(x_shape, shape, torch.float64)
    expected = masked_conv2d(x, weight, words, bias, *geometry)
    for given in (weight, None):
        got = reference(x, given, scores, words, bias, "abs", *RECIPE, *geometry)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", ["fused"], indirect=True)
@pytest.mark.parametrize("seeded", [False, True])
def test_threads_give_equal_bits(isa, path, seeded):
    torch.manual_seed(0)
    for x_shape, shape, *geometry in oracle.CONVS:
        _, _, words = next(oracle.patterns(shape, "rows"))
        inputs = _inputs(x_shape, shape, torch.float32)
        run = _op(words, geometry, seeded=seeded)
        assert torch.equal(*oracle.by_threads(lambda run=run, inputs=inputs: run(*inputs)))


@pytest.mark.parametrize("seeded", [False, True])
def test_explain_tells_what_runs(calls, seeded):
    torch.manual_seed(0)
    shape, geometry = (10, 10, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    kept = [round(900 * d) for d in (MODULE.FUSED_DENSITY, MODULE.FUSED_DENSITY + 0.1)]
    for count in kept:
        (words,), _ = ops.select_mask([torch.rand(shape)], [count])
        for batch in (1, 2, 20):
            x, w, s, b = _inputs((batch, 10, 8, 8), shape, torch.float32)
            args = (x, None if seeded else w, s, words, b, "abs", *RECIPE, *geometry)
            fused = ops.explain_op("popup_conv2d", *args).kernel.startswith("fused")
            assert fused == (count == kept[0] and batch * 64 >= MODULE.FEW_PIXELS)
            calls.clear()
            ops.popup_conv2d(*args)
            assert calls == ([f"{'ticket' if seeded else 'masked'}_conv2d"] if fused else [])


@pytest.mark.parametrize("weight_layout", oracle.FORMATS)
@pytest.mark.parametrize("x_layout", oracle.FORMATS)
def test_layouts(path, x_layout, weight_layout):
    torch.manual_seed(0)
    shape, geometry = (6, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    _, _, words = next(oracle.patterns(shape, "rows"))
    change = oracle.FORMATS[weight_layout]
    for x_shape in [(2, 4, 7, 5), (1, 4, 7, 5), (4, 7, 5)]:
        x, weight, scores, bias = _inputs(x_shape, shape, torch.float32)
        inputs = [oracle.FORMATS[x_layout](x), change(weight), change(scores), bias]
        expected = _straight_through(words, geometry)
        for seeded in (False, True):
            wrt = [0, 2, 3] if seeded else [0, 1, 2, 3]
            oracle.compare(_op(words, geometry, seeded=seeded), expected, inputs, wrt)
            x, w, s, b = (oracle.leaf(t) for t in inputs)
            args = (x, None if seeded else w, s, words, b, "abs", *RECIPE, *geometry)
            torch.library.opcheck(
                ops.popup_conv2d, args, test_utils=("test_schema", "test_faketensor")
            )


def test_gradcheck_where_the_op_is_linear():
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    _, _, words = next(oracle.patterns(shape, "rows"))
    inputs = [oracle.leaf(t) for t in _inputs(x_shape, shape, torch.float64)]
    x, weight, scores, bias = inputs
    for seeded in (False, True):
        op = _op(words, geometry, seeded=seeded)

        def of_x(x, b, op=op):
            return op(x, weight, scores.detach(), b)

        assert torch.autograd.gradcheck(of_x, (x, bias), fast_mode=True)
        assert torch.autograd.gradgradcheck(of_x, (x, bias), fast_mode=True)
    op = _op(words, geometry)
    assert torch.autograd.gradcheck(lambda w: op(x, w, scores.detach(), bias), weight)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(path, dtype, seeded):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    x, w, s, b = (oracle.leaf(t) for t in _inputs(x_shape, shape, dtype))
    args = (x, None if seeded else w, s, words, b, "abs", *RECIPE, *geometry)
    torch.library.opcheck(ops.popup_conv2d, args)


@pytest.mark.parametrize("seeded", [False, True])
def test_compiled(path, seeded):
    torch.manual_seed(0)
    for x_shape, shape, *geometry in oracle.CONVS[2:4]:
        words = ops.pack_mask(torch.rand(shape) < 0.5)
        inputs = _inputs(x_shape, shape, torch.float32)
        wrt = [0, 2, 3] if seeded else [0, 1, 2, 3]
        oracle.check_compiled(_op(words, geometry, "abs", seeded), inputs, wrt)


def test_errors():
    shape, rest = (6, 2, 3, 3), ((1, 1), (1, 1), (1, 1))
    x, weight, scores, bias = _inputs((2, 4, 7, 5), shape, torch.float32)
    words = ops.pack_mask(torch.ones(shape).bool())
    for error, text, x_, weight_, scores_, words_, transform, groups in [
        (ValueError, r"transform: got 'square', accepted", x, None, scores, words, "square", 2),
        (ValueError, r"weight: .*\(5, 2, 3, 3\), need", x, weight[1:], scores, words, "abs", 2),
        (ValueError, r"weight: got torch\.float64", x, weight.double(), scores, words, "abs", 2),
        (ValueError, r"weight: got \(6, 2, 3\)", x, None, scores[..., 0], words, "abs", 2),
        (ValueError, r"x: got shape \(2, 3, 7, 5\)", x[:, 1:], None, scores, words, "abs", 2),
        (ValueError, r"groups: got 4, need a divisor", x, None, scores, words, "abs", 4),
        (ValueError, r"words: .*need int32 \(6, 2\)", x, None, scores, words[1:], "abs", 2),
    ]:
        with pytest.raises(error, match="popup_conv2d: " + text):
            ops.popup_conv2d(x_, weight_, scores_, words_, None, transform, *RECIPE, *rest, groups)
    with pytest.raises(ValueError, match=r"popup_conv2d: bias: .*\(5,\), need"):
        ops.popup_conv2d(x, weight, scores, words, bias[1:], "abs", *RECIPE, *rest, 2)


def test_raw_gradient_is_that_of_the_masked_weight(path):
    torch.manual_seed(0)
    x_shape, shape, geometry = SMALL
    words = ops.pack_mask(torch.rand(shape) < 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _inputs(x_shape, shape, dtype)
        _, weight, scores, bias = inputs

        def op(x, w, s, b):
            return ops.popup_conv2d(x, w, s, words, b, "abs", *RECIPE, *geometry, True)

        _, grad, (gs,) = oracle.gradients(op, inputs, [2])
        _, _, (plain,) = oracle.gradients(_op(words, geometry), inputs, [2], grad)
        assert torch.equal(popup_score_grad(gs, weight, scores, "abs"), plain)
        leaves = (inputs[0], weight, oracle.leaf(scores), words, bias)
        torch.library.opcheck(ops.popup_conv2d, (*leaves, "abs", *RECIPE, *geometry, True))
