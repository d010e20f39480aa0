from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.gather_live import gather_live as reference

SHAPES = [
    *[(5,), (1, 1), (3, 17), (17, 63), (100, 100), (2, 64), (3, 129), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 1, 5, 5), (0, 3, 3, 3)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_backward(isa, threads, dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            kept = int(mask.sum())
            for layout in oracle.FORMATS.values():
                dense = layout(torch.randn(shape, dtype=dtype))
                y, grad, (gx,) = oracle.gradients(
                    lambda t, w=words, n=kept: ops.gather_live(t, w, n), [dense], [0]
                )
                assert torch.equal(y, reference(dense, words, kept))
                assert torch.equal(gx, ops.scatter_live(grad, words, shape))


def test_order_is_row_major_in_canonical_form():
    dense = torch.arange(12.0).view(2, 3, 1, 2)
    words = ops.pack_mask(torch.ones(2, 3, 1, 2, dtype=torch.bool))
    assert ops.gather_live(dense, words, 12).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_opcheck_and_compiled():
    torch.manual_seed(0)
    mask = torch.rand(4, 70) < 0.5
    words, kept = ops.pack_mask(mask), int(mask.sum())
    torch.library.opcheck(ops.gather_live, (oracle.leaf(torch.randn(4, 70)), words, kept))
    oracle.check_compiled(lambda t: ops.gather_live(t, words, kept) * 2, [torch.randn(4, 70)], [0])


def test_errors():
    words = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"gather_live: words: .*\(3, 4\), need int32 \(3, 2\)"):
        ops.gather_live(torch.ones(3, 60), words, 180)
    with pytest.raises(ValueError, match=r"words: 210 live weights, but there are 209 values"):
        ops.gather_live(torch.ones(3, 70), words, 209)
    with pytest.raises(ValueError, match=r"gather_live: kept: got -1"):
        ops.gather_live(torch.ones(3, 70), words, -1)
    with pytest.raises(TypeError, match=r"gather_live: dense: got torch\.uint8, need 2-, 4- or"):
        ops.gather_live(torch.ones(3, 70, dtype=torch.uint8), words, 210)
