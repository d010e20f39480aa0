from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.scatter_live import scatter_live as reference

SHAPES = [
    *[(5,), (1, 1), (3, 17), (17, 63), (100, 100), (2, 64), (3, 129), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 1, 5, 5), (0, 3, 3, 3)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_backward(isa, threads, dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            values = torch.randn(int(mask.sum()), dtype=dtype)
            y, grad, (gv,) = oracle.gradients(
                lambda t, w=words, s=shape: ops.scatter_live(t, w, s), [values], [0]
            )
            assert y.is_contiguous() and torch.equal(y, reference(values, words, shape))
            assert not y[~mask].any()
            assert torch.equal(gv, ops.gather_live(grad, words, values.numel()))
            assert torch.equal(ops.gather_live(y, words, values.numel()), values)


def test_opcheck_and_compiled():
    torch.manual_seed(0)
    mask = torch.rand(4, 5, 3, 3) < 0.5
    words, values = ops.pack_mask(mask), torch.randn(int(mask.sum()))
    torch.library.opcheck(ops.scatter_live, (oracle.leaf(values), words, [4, 5, 3, 3]))
    oracle.check_compiled(lambda v: ops.scatter_live(v, words, mask.shape) * 2, [values], [0])


def test_errors():
    words = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scatter_live: words: .*\(3, 4\), need int32 \(3, 2\)"):
        ops.scatter_live(torch.ones(180), words, (3, 60))
    with pytest.raises(ValueError, match=r"words: 210 live weights, but there are 200 values"):
        ops.scatter_live(torch.ones(200), words, (3, 70))
    with pytest.raises(ValueError, match=r"scatter_live: values: got shape \(2, 5\), need one"):
        ops.scatter_live(torch.ones(2, 5), words, (3, 70))
    with pytest.raises(ValueError, match=r"scatter_live: values: got 211 for a weight of 210"):
        ops.scatter_live(torch.ones(211), words, (3, 70))
