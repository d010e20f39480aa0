from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.popup_linear import popup_score_grad
from sparseticket.reference.popup_weight import popup_weight as reference

SHAPES = [(1, 1), (3, 17), (17, 63), (100, 100), (0, 5), (5, 0), (8, 3, 3, 3), (4, 70, 3, 2)]


def _inputs(shape, layout, dtype):
    scores = torch.randn(shape)
    scores[torch.rand(shape) < 0.1] = 0
    return [layout(torch.randn(shape, dtype=dtype)), layout(scores)]


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_backward(isa, dtype, transform):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape, "half rows"):
            for layout in oracle.FORMATS.values():
                weight, scores = inputs = _inputs(shape, layout, dtype)
                y, grad, (gw, gs) = oracle.gradients(
                    lambda w, s, m=words: ops.popup_weight(w, s, m, transform), inputs, [0, 1]
                )
                assert torch.equal(y, reference(weight, scores, words, transform))
                assert torch.equal(gw, torch.where(mask, grad, 0))
                assert torch.equal(gs, popup_score_grad(grad, weight, scores, transform))


def test_raw_gradient_is_that_of_the_masked_weight():
    torch.manual_seed(0)
    weight, scores = torch.randn(5, 70), torch.randn(5, 70, requires_grad=True)
    words, grad = ops.pack_mask(torch.rand(5, 70) < 0.5), torch.randn(5, 70)
    ops.popup_weight(weight, scores, words, "abs", True).backward(grad)
    assert torch.equal(scores.grad, grad)


def test_threads(threads):
    torch.manual_seed(0)
    weight = torch.randn(300, 300)
    words = ops.pack_mask(torch.rand(300, 300) < 0.5)
    y = ops.popup_weight(weight, weight, words, "abs")
    assert torch.equal(y, reference(weight, weight, words, "abs"))


def test_second_derivative():
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    words = ops.pack_mask(torch.rand(3, 4) < 0.5)
    (gs,) = torch.autograd.grad(
        ops.popup_weight(weight, scores, words, "abs").pow(2).sum(), scores, create_graph=True
    )
    (gw,) = torch.autograd.grad(gs.sum(), weight)
    masked = reference(weight, scores, words, "abs")
    assert torch.allclose(gw, 4 * masked * scores.sign())  # of 2 (W m) W sign(s), m constant


def test_opcheck_and_compile():
    weight, scores = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3, requires_grad=True)
    words = ops.pack_mask(torch.rand(4, 3, 3, 3) < 0.5)
    for raw in (False, True):
        torch.library.opcheck(ops.popup_weight, (weight, scores, words, "abs", raw))
    call = torch.compile(ops.popup_weight, fullgraph=True, backend="aot_eager")
    y = call(weight, scores, words, "identity")
    y.sum().backward()
    assert torch.equal(y, reference(weight, scores, words, "identity"))
    assert torch.equal(scores.grad, weight)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"transform": "square"}, ValueError, "transform: got 'square'"),
        ({"weight": torch.ones(2, 3)}, ValueError, r"weight: got torch.float32 \(2, 3\)"),
        ({"scores": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "scores: got torch.int32"),
        ({"words": torch.ones(2, 1, dtype=torch.int32)}, ValueError, "words: got"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    good = {
        "weight": torch.ones(2, 2),
        "scores": torch.ones(2, 2),
        "words": torch.zeros(2, 2, dtype=torch.int32),
        "transform": "abs",
    }
    with pytest.raises(error, match=text):
        ops.popup_weight(**good | change)
