from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.sparse_linear_dx import sparse_linear_dx as reference

SIZES = [(1, 17, 63), (5, 100, 3), (40, 300, 130), (0, 3, 4), (3, 0, 4), (3, 4, 0)]


def _pair(words, k, *derived):
    return (
        lambda g, v: ops.sparse_linear_dx(g, v, words, k, *derived),
        lambda g, v: reference(g, v, words, k),
    )


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for batch, rows, k in SIZES:
        for _, mask, words in oracle.patterns((rows, k)):
            kept = int(mask.sum())
            inputs = [torch.randn(batch, rows, dtype=dtype), torch.randn(kept, dtype=dtype)]
            derived = [ops.sparse_pattern(words, k, kept, t) for t in (False, True)]
            oracle.compare(*_pair(words, k), inputs, [0, 1])
            oracle.compare(*_pair(words, k, *derived), inputs, [0, 1])


def test_gradcheck(path):
    words, kept = oracle.live(5, 7, 0.5)
    inputs = [torch.randn(4, 5, dtype=torch.float64), torch.randn(kept).double()]
    inputs = [oracle.leaf(t) for t in inputs]
    assert torch.autograd.gradgradcheck(_pair(words, 7)[0], inputs)


def test_opcheck_and_compiled():
    words, kept = oracle.live(5, 70, 0.3)
    inputs = [torch.randn(20, 5), torch.randn(kept)]
    leaves = [oracle.leaf(t) for t in inputs]
    torch.library.opcheck(ops.sparse_linear_dx, (*leaves, words, 70))
    oracle.check_compiled(_pair(words, 70)[0], inputs, [0, 1])


def test_errors():
    words, values = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool)), torch.ones(210)
    with pytest.raises(ValueError, match=r"sparse_linear_dx: grad: got shape \(2, 4\), need last"):
        ops.sparse_linear_dx(torch.ones(2, 4), values, words, 70)
    with pytest.raises(ValueError, match=r"sparse_linear_dx: words: got .*need int32 \(3, 6\)"):
        ops.sparse_linear_dx(torch.ones(2, 3), values, words, 130)
    with pytest.raises(ValueError, match=r"sparse_linear_dx: values: got torch\.float64"):
        ops.sparse_linear_dx(torch.ones(2, 3), values.double(), words, 70)
