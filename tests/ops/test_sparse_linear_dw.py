from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.sparse_linear_dw import sparse_linear_dw as reference

SIZES = [(1, 17, 63), (5, 100, 3), (40, 300, 130), (130, 20, 90), (0, 3, 4), (3, 0, 4), (3, 4, 0)]


def _pair(words, kept, *derived):
    return (
        lambda g, x: ops.sparse_linear_dw(g, x, words, kept, *derived),
        lambda g, x: reference(g, x, words, kept),
    )


@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype):
    torch.manual_seed(0)
    for batch, rows, k in SIZES:
        for _, mask, words in oracle.patterns((rows, k)):
            kept = int(mask.sum())
            inputs = [torch.randn(batch, rows, dtype=dtype), torch.randn(batch, k, dtype=dtype)]
            derived = [ops.sparse_pattern(words, k, kept, t) for t in (False, True)]
            oracle.compare(*_pair(words, kept), inputs, [0, 1])
            oracle.compare(*_pair(words, kept, *derived), inputs, [0, 1])


def test_batch_inner_inputs(isa, path):
    words, kept = oracle.live(30, 90, 0.3)
    x = torch.randn(2, 90, 32).mT
    for grad in (torch.randn(2, 30, 32).mT, torch.randn(2, 32, 30)):
        oracle.compare(*_pair(words, kept), [grad, x], [0, 1])


def test_gradcheck(path):
    words, kept = oracle.live(5, 7, 0.5)
    inputs = [oracle.leaf(torch.randn(4, n, dtype=torch.float64)) for n in (5, 7)]
    assert torch.autograd.gradgradcheck(_pair(words, kept)[0], inputs)


def test_opcheck_and_compiled():
    words, kept = oracle.live(5, 70, 0.3)
    inputs = [torch.randn(20, 5), torch.randn(20, 70)]
    leaves = [oracle.leaf(t) for t in inputs]
    torch.library.opcheck(ops.sparse_linear_dw, (*leaves, words, kept))
    oracle.check_compiled(_pair(words, kept)[0], inputs, [0, 1])


def test_errors():
    words = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sparse_linear_dw: grad, x: got .*need \[\.\.\., 3\]"):
        ops.sparse_linear_dw(torch.ones(2, 4), torch.ones(2, 70), words, 210)
    with pytest.raises(ValueError, match=r"sparse_linear_dw: kept: got 211"):
        ops.sparse_linear_dw(torch.ones(2, 3), torch.ones(2, 70), words, 211)
    with pytest.raises(ValueError, match=r"words: 210 live weights, but there are 200 values"):
        ops.sparse_linear_dw(torch.ones(2, 3), torch.ones(2, 70), words, 200)
