from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.apply_mask import apply_mask as reference

SHAPES = [
    *[(), (5,), (1, 1), (3, 17), (17, 63), (100, 100), (2, 64), (3, 129), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 1, 5, 5), (2, 3, 4), (0, 3, 3, 3)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_backward(isa, dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            for layout in oracle.FORMATS.values():
                dense = layout(torch.randn(shape, dtype=dtype))
                y, grad, (gx,) = oracle.gradients(
                    lambda t, w=words: ops.apply_mask(t, w), [dense], [0]
                )
                assert torch.equal(y, reference(dense, words))
                assert torch.equal(y, torch.where(mask, dense, 0))
                assert torch.equal(gx, torch.where(mask, grad, 0))


def test_threads(threads):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, _, words in oracle.patterns(shape, "half"):
            dense = torch.randn(shape)
            assert torch.equal(ops.apply_mask(dense, words), reference(dense, words))


def test_dropped_values_are_positive_zero_whatever_they_were(isa):
    dense = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0, -1.0, 1e-40] * 12])
    kept = torch.zeros(1, 72, dtype=torch.bool)
    kept[0, 66:] = True
    y = ops.apply_mask(dense, ops.pack_mask(kept))
    assert torch.equal(y[0, :66].view(torch.int32), torch.zeros(66, dtype=torch.int32))
    assert torch.equal(y[0, 66:].view(torch.int32), dense[0, 66:].view(torch.int32))


def test_keeps_channels_last():
    dense = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    y = ops.apply_mask(dense, ops.pack_mask(torch.rand(dense.shape) < 0.5))
    assert y.stride() == dense.stride()


def test_gradcheck():
    torch.manual_seed(0)
    mask = torch.rand(3, 2, 3, 1) < 0.5
    words = ops.pack_mask(mask)
    dense = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.apply_mask(t, words), dense)
    assert torch.autograd.gradgradcheck(lambda t: ops.apply_mask(t, words), dense)


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_opcheck(layout):
    torch.manual_seed(0)
    dense = oracle.leaf(oracle.FORMATS[layout](torch.randn(4, 5, 3, 3)))
    words = ops.pack_mask(torch.rand(dense.shape) < 0.5)
    torch.library.opcheck(ops.apply_mask, (dense, words))


def test_compiled():
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(4, 70) < 0.5)
    oracle.check_compiled(lambda t: ops.apply_mask(t, words) * 2, [torch.randn(4, 70)], [0])


def test_errors():
    words = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"apply_mask: words: .*\(3, 4\), need int32 \(3, 2\)"):
        ops.apply_mask(torch.ones(3, 60), words)
    with pytest.raises(ValueError, match=r"apply_mask: words: got torch\.int64"):
        ops.apply_mask(torch.ones(3, 70), words.long())
    with pytest.raises(TypeError, match=r"apply_mask: dense: got torch\.uint8, need 2-, 4- or"):
        ops.apply_mask(torch.ones(3, 70, dtype=torch.uint8), words)
