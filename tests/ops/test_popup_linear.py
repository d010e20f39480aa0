from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from sparseticket import ops, prng
from sparseticket.reference.masked_linear import masked_linear
from sparseticket.reference.popup_linear import popup_linear as reference
from sparseticket.reference.popup_linear import popup_score_grad
from sparseticket.reference.regenerate import regenerate

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIGMA = prng.round_bf16(0.37)
RECIPE = (5, 7, SIGMA)
SIZES = [
    *[(1, 1, 1), (1, 63, 3), (3, 17, 100), (4, 100, 17), (2, 130, 1), (17, 3, 1), (63, 100, 3)],
    *[(0, 5, 4), (2, 0, 4), (100, 0, 4), (3, 5, 0)],
]


def _inputs(batch, k, rows, dtype, bias=True, scores_dtype=torch.float32):
    """x, weight, scores, bias; the weight is the regenerated one, some scores are exactly 0."""
    scores = torch.randn(rows, k, dtype=scores_dtype)
    scores[torch.rand(rows, k) < 0.1] = 0
    return [
        torch.randn(batch, k, dtype=dtype),
        regenerate(5, 7, (rows, k), "signed_constant", SIGMA, dtype=dtype),
        scores,
        torch.randn(rows, dtype=dtype) if bias else None,
    ]


def _op(words, transform="abs", seeded=False):
    return lambda x, w, s, b: ops.popup_linear(
        x, None if seeded else w, s, words, b, transform, *RECIPE
    )


def _straight_through(words, transform="abs"):
    """Forward W*mask; backward as if the mask were |s| (or s) itself."""

    def op(x, w, s, b):
        key = s.abs() if transform == "abs" else s
        mask = ops.unpack_mask(words, w.shape)
        return F.linear(x, w * ((key - key.detach()) + mask), b)

    return op


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype, transform):
    torch.manual_seed(0)
    for i, size in enumerate(SIZES):
        for _, _, words in oracle.patterns((size[2], size[1]), "half none rows"):
            inputs = _inputs(*size, dtype, bias=i % 2 == 0)
            expected = _straight_through(words, transform)
            oracle.compare(_op(words, transform), expected, inputs, [0, 1, 2, 3])
            oracle.compare(_op(words, transform, seeded=True), expected, inputs, [0, 2, 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_tells_what_runs(calls, dtype):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    most = oracle.module_of("masked_linear").FUSED_ROWS.get(dtype, 1)
    for batch in (1, most, most + 1, 129):
        x, w, s, b = _inputs(batch, 70, 5, dtype)
        args = (x, w, s, words, b, "abs", *RECIPE)
        choice = ops.explain_op("popup_linear", *args)
        assert choice[1:] == ops.explain_op("masked_linear", x, w, words)[1:]
        kernel = choice.kernel.partition(" ")[0]
        if batch <= most:
            assert kernel == ("materialised" if dtype == torch.float64 else "fused")
        calls.clear()
        ops.popup_linear(*args)
        called = {"fused": ["masked_linear"], "live": ["masked_linear_live"], "materialised": []}
        assert calls == called[kernel]


def test_explain_tells_what_runs_from_the_seed(calls, path):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    x, _, s, b = _inputs(40, 70, 5, torch.float32)
    args = (x.requires_grad_(), None, s, words, b, "abs", *RECIPE)
    lookup = ["ticket_codes", "lookup_linear"] if path == "fused" else []
    y = ops.popup_linear(*args)
    assert calls == lookup
    y.sum().backward()
    assert calls == 2 * lookup
    kernel = ops.explain_op("popup_linear", *args).kernel
    assert kernel.startswith("four-Russians" if path == "fused" else "materialised")


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("seeded", [False, True])
def test_score_gradient_is_the_dense_weight_gradient_times_weight_and_sign(path, seeded, transform):
    torch.manual_seed(0)
    mask = torch.rand(5, 70) < 0.5
    words = ops.pack_mask(mask)
    inputs = _inputs(3, 70, 5, torch.float32)
    x, weight, scores, bias = inputs
    _, grad, (gs,) = oracle.gradients(_op(words, transform, seeded), inputs, [2])
    effective = torch.where(mask, weight, 0).requires_grad_()  # a leaf of the same dense layer
    (dense,) = torch.autograd.grad(F.linear(x, effective, bias), effective, grad)
    sign = scores.sign() if transform == "abs" else 1
    torch.testing.assert_close(gs, dense * weight * sign)
    assert torch.equal(popup_score_grad(dense, weight, scores, transform), dense * weight * sign)
    zero = scores == 0
    assert bool((gs[~mask & ~zero] != 0).all())  # dropped edges included
    assert bool(zero.any())
    assert bool((gs[zero] == 0).all()) == (transform == "abs")


def test_scores_dtypes_and_no_gradient_for_frozen_weights():
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    for scores_dtype in (torch.float32, torch.float64):
        inputs = _inputs(3, 70, 5, torch.float64, scores_dtype=scores_dtype)
        oracle.compare(_op(words), _straight_through(words), inputs, [0, 1, 2, 3])
    x, weight, scores, _ = _inputs(3, 70, 5, torch.float32)
    scores.requires_grad_()
    ops.popup_linear(x, weight, scores, words, None, "abs", *RECIPE).sum().backward()
    assert scores.grad is not None
    assert weight.grad is None
    assert not weight.requires_grad


@pytest.mark.parametrize("path", ["materialised"], indirect=True)
def test_regenerated_equals_given_weight_bit_for_bit(path):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    for dtype in DTYPES:
        inputs = _inputs(6, 70, 5, dtype)
        y, grad, grads = oracle.gradients(_op(words), inputs, [0, 2, 3])
        y2, _, grads2 = oracle.gradients(_op(words, seeded=True), inputs, [0, 2, 3], grad)
        for a, b in zip((y, *grads), (y2, *grads2), strict=True):
            assert torch.equal(a, b)


def test_the_reference_is_masked_linear():
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    x, weight, scores, bias = _inputs(3, 70, 5, torch.float64)
    expected = masked_linear(x, weight, words, bias)
    for given in (weight, None):
        got = reference(x, given, scores, words, bias, "abs", *RECIPE)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", ["fused"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("seeded", [False, True])
def test_threads_give_equal_bits(isa, path, dtype, seeded):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(63, 300) < 0.5)
    inputs = _inputs(4, 300, 63, dtype)
    assert torch.equal(*oracle.by_threads(lambda: _op(words, seeded=seeded)(*inputs)))


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_layouts(path, layout):
    torch.manual_seed(0)
    change = oracle.FORMATS[layout]
    _, _, words = next(oracle.patterns((17, 63), "rows"))
    for dtype in DTYPES:
        inputs = [change(t) for t in _inputs(5, 63, 17, dtype)]
        expected = _straight_through(words)
        oracle.compare(_op(change(words)), expected, inputs, [0, 1, 2, 3])
        oracle.compare(_op(change(words), seeded=True), expected, inputs, [0, 2, 3])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 2)])
def test_leading_dimensions(path, lead):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    inputs = [torch.randn(*lead, 70), *_inputs(1, 70, 5, torch.float32)[1:]]
    oracle.compare(_op(words), _straight_through(words), inputs, [0, 1, 2, 3])


def test_gradcheck_where_the_op_is_linear():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((3, 5), "rows"))
    x, weight, scores, bias = (oracle.leaf(t) for t in _inputs(4, 5, 3, torch.float64))
    scores = scores.detach()
    for seeded in (False, True):
        op = _op(words, seeded=seeded)
        assert torch.autograd.gradcheck(lambda x, b, op=op: op(x, weight, scores, b), (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, b, op=op: op(x, weight, scores, b), (x, bias))
    assert torch.autograd.gradcheck(lambda w: _op(words)(x, w, scores, bias), weight)


@pytest.mark.parametrize("seeded", [False, True])
def test_opcheck(path, seeded):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    for dtype in DTYPES:
        x, w, s, b = (oracle.leaf(t) for t in _inputs(3, 70, 5, dtype))
        args = (x, None if seeded else w, s, words, b, "abs", *RECIPE)
        torch.library.opcheck(ops.popup_linear, args)


@pytest.mark.parametrize("seeded", [False, True])
def test_compiled(path, seeded):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    inputs = _inputs(3, 70, 5, torch.float32)
    for transform in ("abs", "identity"):
        wrt = [0, 2, 3] if seeded else [0, 1, 2, 3]
        oracle.check_compiled(_op(words, transform, seeded), inputs, wrt)


@pytest.mark.parametrize("change", [lambda f: f, oracle.compiled], ids=["eager", "compiled"])
def test_torch_func_is_never_silently_wrong(change):
    """The trap of bare straight-through functions: torch.func.grad of them, compiled, is wrong.
    torch refuses registered ops (pytorch#168393); when it no longer does, it has to be right."""
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    x, weight, scores, bias = _inputs(3, 70, 5, torch.float32)

    def loss(s):
        return ops.popup_linear(x, weight, s, words, bias, "abs", *RECIPE).square().sum()

    leaf = oracle.leaf(scores)
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    try:
        got = change(torch.func.grad(loss))(scores)
    except RuntimeError as error:
        got = expected if "setup_context" in str(error) else None
    assert got is not None
    assert torch.equal(got, expected)


def test_errors():
    x, weight, scores, bias = _inputs(3, 70, 5, torch.float32)
    words = torch.zeros(5, 4, dtype=torch.int32)
    for error, text, args in [
        (
            ValueError,
            r"transform: got 'square', accepted: abs",
            (x, weight, scores, words, "square"),
        ),
        (
            ValueError,
            r"weight: .*\(4, 70\), need .*\(5, 70\)",
            (x, weight[1:], scores, words, "abs"),
        ),
        (ValueError, r"weight: got torch\.float64", (x, weight.double(), scores, words, "abs")),
        (ValueError, r"scores: got shape \(5, 70, 1\)", (x, None, scores[..., None], words, "abs")),
        (
            ValueError,
            r"x: got shape \(3, 9\), need last dim",
            (x[:, :9], None, scores, words, "abs"),
        ),
        (ValueError, r"words: .*\(4, 4\), need int32", (x, None, scores, words[1:], "abs")),
        (TypeError, r"scores: got torch\.int64, need a", (x, None, scores.long(), words, "abs")),
    ]:
        *tensors, transform = args
        with pytest.raises(error, match="popup_linear: " + text):
            ops.popup_linear(*tensors, bias, transform, *RECIPE)
    with pytest.raises(ValueError, match=r"popup_linear: bias: .*\(4,\), need torch\.float32 \(5,"):
        ops.popup_linear(x, weight, scores, words, bias[1:], "abs", *RECIPE)


@pytest.mark.parametrize("seeded", [False, True])
def test_raw_gradient_is_that_of_the_masked_weight(path, seeded):
    torch.manual_seed(0)
    mask = torch.rand(5, 70) < 0.5
    words = ops.pack_mask(mask)
    for dtype in DTYPES:
        inputs = _inputs(3, 70, 5, dtype)
        x, weight, scores, bias = inputs

        def op(x, w, s, b):
            given = None if seeded else w
            return ops.popup_linear(x, given, s, words, b, "abs", *RECIPE, True)

        y, grad, (gs, gx) = oracle.gradients(op, inputs, [2, 0])
        y2, _, (plain, gx2) = oracle.gradients(_op(words, "abs", seeded), inputs, [2, 0], grad)
        assert gs.dtype == scores.dtype
        assert torch.equal(popup_score_grad(gs, weight, scores, "abs"), plain)
        assert torch.equal(y, y2)
        assert torch.equal(gx, gx2)
        args = (x, weight, oracle.leaf(scores), words, bias, "abs", *RECIPE, True)
        torch.library.opcheck(ops.popup_linear, args)
