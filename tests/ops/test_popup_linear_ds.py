from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.popup_linear import popup_score_grad
from sparseticket.reference.popup_linear_ds import popup_linear_ds as reference
from sparseticket.reference.regenerate import regenerate

SIGMA = prng.round_bf16(0.37)
RECIPE = (5, 7, SIGMA)
SIZES = [
    *[(1, 1, 1), (1, 63, 3), (3, 17, 100), (4, 100, 17), (2, 4200, 3), (63, 100, 3)],
    *[(0, 5, 4), (2, 0, 4), (3, 5, 0)],
]


def _inputs(batch, k, rows, dtype=torch.float32, scores_dtype=torch.float32):
    """grad, x, scores; some scores are exactly 0."""
    scores = torch.randn(rows, k, dtype=scores_dtype)
    scores[torch.rand(rows, k) < 0.1] = 0
    return torch.randn(batch, rows, dtype=dtype), torch.randn(batch, k, dtype=dtype), scores


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_dense_gradient_times_weight_and_sign(isa, threads, transform, dtype):
    torch.manual_seed(0)
    for batch, k, rows in SIZES:
        for scores_dtype in (torch.float32, torch.float64):
            grad, x, scores = _inputs(batch, k, rows, dtype, scores_dtype)
            got = ops.popup_linear_ds(grad, x, scores, transform, *RECIPE)
            weight = regenerate(5, 7, (rows, k), "signed_constant", SIGMA, dtype=dtype)
            expected = popup_score_grad(grad.t() @ x, weight, scores, transform)
            assert got.dtype == scores_dtype
            assert torch.equal(got, expected), (batch, k, rows)
            assert torch.equal(reference(grad, x, scores, transform, *RECIPE), expected)


def test_layouts_and_leading_dimensions():
    torch.manual_seed(0)
    inputs = _inputs(12, 70, 17)
    expected = reference(*inputs, "abs", *RECIPE)
    for change in oracle.FORMATS.values():
        got = ops.popup_linear_ds(*(change(t) for t in inputs), "abs", *RECIPE)
        torch.testing.assert_close(got, expected)
    grad, x, scores = inputs
    got = ops.popup_linear_ds(grad.view(3, 4, 17), x.view(3, 4, 70), scores, "abs", *RECIPE)
    assert torch.equal(got, expected)


def test_gradcheck_where_the_op_is_linear():
    torch.manual_seed(0)
    grad, x, scores = _inputs(4, 5, 3, torch.float64, torch.float64)

    def op(g, x):
        return ops.popup_linear_ds(g, x, scores, "abs", *RECIPE)

    assert torch.autograd.gradcheck(op, (oracle.leaf(grad), oracle.leaf(x)))
    assert torch.autograd.gradgradcheck(op, (oracle.leaf(grad), oracle.leaf(x)))


def test_opcheck_and_compiled():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        grad, x, scores = _inputs(3, 70, 5, dtype)
        args = (oracle.leaf(grad), oracle.leaf(x), scores, "abs", *RECIPE)
        torch.library.opcheck(ops.popup_linear_ds, args)

    def op(g, x, s):
        return ops.popup_linear_ds(g, x, s, "abs", *RECIPE)

    oracle.check_compiled(op, _inputs(3, 70, 5), [0, 1])


def test_errors():
    grad, x, scores = _inputs(3, 70, 5)
    with pytest.raises(ValueError, match=r"popup_linear_ds: transform: got 'x', accepted: abs"):
        ops.popup_linear_ds(grad, x, scores, "x", *RECIPE)
    for args in [(grad[:2], x, scores), (grad[:, :4], x, scores), (grad, x, scores[:, 1:])]:
        with pytest.raises(ValueError, match=r"popup_linear_ds: grad, x, scores: got"):
            ops.popup_linear_ds(*args, "abs", *RECIPE)
    with pytest.raises(ValueError, match=r"seed: got -1"):
        ops.popup_linear_ds(grad, x, scores, "abs", -1, 7, SIGMA)
