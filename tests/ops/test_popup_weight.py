from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.popup_linear import popup_score_grad
from sparseticket.reference.popup_weight import popup_weight as reference

SHAPES = [(1, 1), (3, 17), (17, 63), (2, 129), (0, 5), (5, 0), (7,), (4, 3, 3, 2), (2, 3, 4)]


def _tensors(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype), torch.randn(shape)


@pytest.mark.parametrize("transform", ["abs", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_straight_through_gradient(isa, threads, dtype, transform):
    for shape in SHAPES:
        weight, scores = _tensors(shape, dtype)
        for _, mask, words in oracle.patterns(shape):
            y, grad, (gw, gs) = oracle.gradients(
                lambda w, s, m=words: ops.popup_weight(w, s, m, transform), [weight, scores], [0, 1]
            )
            assert torch.equal(y, reference(weight, scores, words, transform))
            assert torch.equal(gw, torch.where(mask, grad, 0))
            assert torch.equal(gs, popup_score_grad(grad, weight, scores, transform))
            assert gs.dtype == torch.float32  # dense, dropped positions included


def test_raw_gradient():
    weight, scores = _tensors((5, 70), torch.bfloat16)
    words = ops.pack_mask(torch.rand(5, 70) < 0.3)
    _, grad, (gs,) = oracle.gradients(
        lambda w, s: ops.popup_weight(w, s, words, "abs", True), [weight, scores], [1]
    )
    assert torch.equal(gs, grad.float())


def test_gradgradcheck_and_zero_scores():
    weight, scores = _tensors((3, 5), torch.float64)
    words = ops.pack_mask(torch.rand(3, 5) < 0.5)
    leaves = [oracle.leaf(weight), oracle.leaf(scores.double())]

    def squared(w, s):
        return ops.popup_weight(w, s, words, "identity").square().sum()

    # the gradient of the scores is G * W: twice differentiable, as G and W are
    (gs,) = torch.autograd.grad(squared(*leaves), leaves[1], create_graph=True)
    (gw,) = torch.autograd.grad(gs.sum(), leaves[0])
    kept = ops.unpack_mask(words, (3, 5))
    torch.testing.assert_close(gw, 4 * weight * kept)
    zero = torch.zeros(3, 5, requires_grad=True)
    ops.popup_weight(weight, zero, words, "abs").sum().backward()
    assert not zero.grad.any()


def test_opcheck_and_compiled():
    weight, scores = _tensors((4, 5, 3, 3))
    words = ops.pack_mask(torch.rand(weight.shape) < 0.5)
    args = (oracle.leaf(weight), oracle.leaf(scores), words, "abs")
    torch.library.opcheck(ops.popup_weight, args)
    oracle.check_compiled(
        lambda w, s: ops.popup_weight(w, s, words, "abs") * 2, [weight, scores], [0, 1]
    )


def test_errors():
    weight, scores = _tensors((3, 70))
    words = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"popup_weight: weight: .*\(3, 69\), need .*\(3, 70\)"):
        ops.popup_weight(weight[:, :69], scores, words, "abs")
    with pytest.raises(ValueError, match=r"popup_weight: words: .*need int32 \(3, 4\)"):
        ops.popup_weight(weight, scores, words[:, :2], "abs")
    with pytest.raises(ValueError, match=r"popup_weight: transform: got 'square', accepted: abs"):
        ops.popup_weight(weight, scores, words, "square")
