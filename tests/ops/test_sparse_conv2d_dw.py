"""Beyond test_sparse_conv2d.py, whose backward this op is."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.sparse_conv2d_dw import sparse_conv2d_dw as reference

MODULE = oracle.module_of("sparse_conv2d_dw")
GEOMETRY = ((2, 1), (1, 0), (1, 2), 2)


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch) -> str:
    monkeypatch.setattr(MODULE, "DW_DENSITY", 1.0 if request.param == "sparse" else -1.0)
    monkeypatch.setattr(MODULE, "GROUP_OUTPUTS", 0)
    return request.param


def _case(x_shape, weight_shape, geometry, dtype=torch.float32, density=0.5):
    mask = torch.rand(weight_shape) < density
    words = ops.pack_mask(mask)
    x = torch.randn(x_shape, dtype=dtype)
    size = oracle.module_of("conv2d_taps").output_size(x_shape[-2:], weight_shape, *geometry[:3])
    grad = torch.randn(*x_shape[:-3], weight_shape[0], *size, dtype=dtype)
    return x, grad, words, int(mask.sum()), weight_shape, *geometry


def test_against_the_reference(path, isa):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in oracle.CONVS:
        if 0 in x_shape:
            continue
        for density in (0.0, 0.1, 1.0):
            x, grad, words, *rest = _case(x_shape, weight_shape, geometry, density=density)
            got = ops.sparse_conv2d_dw(x, grad, words, *rest)
            sums = [
                reference(change(x.double()), change(grad.double()), words, *rest)
                for change in (lambda t: t, torch.abs, torch.ones_like)
            ]
            oracle.assert_bounded(got, *sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(path, dtype):
    x, grad, *rest = _case((2, 4, 5, 6), (6, 2, 3, 2), GEOMETRY, dtype)
    torch.library.opcheck(ops.sparse_conv2d_dw, (oracle.leaf(x), oracle.leaf(grad), *rest))


def test_compiled(path):
    x, grad, *rest = _case((2, 4, 5, 6), (6, 2, 3, 2), GEOMETRY)
    oracle.check_compiled(lambda x, g: ops.sparse_conv2d_dw(x, g, *rest), [x, grad], [0, 1])


def test_explain():
    for density, kernel in ((0.02, "sparse"), (0.95, "dense")):
        args = _case((2, 10, 5, 6), (10, 10, 3, 3), ((1, 1), (1, 1), (1, 1), 1), density=density)
        assert ops.explain_op("sparse_conv2d_dw", *args).kernel.startswith(kernel)


def test_errors(path):
    x, grad, words, live, *rest = _case((2, 4, 5, 6), (6, 2, 3, 2), GEOMETRY)
    for text, args in [
        (r"grad: got torch\.float32 \(1, ", (x, grad[1:], words, live)),
        (r"grad: got torch\.float64", (x, grad.double(), words, live)),
        (r"x: got shape", (x[:, 1:], grad, words, live)),
        (r"words: ", (x, grad, words[1:], live)),
    ]:
        with pytest.raises(ValueError, match=f"sparse_conv2d_dw: {text}"):
            ops.sparse_conv2d_dw(*args, *rest)
    with pytest.raises(ValueError, match=r"live|out"):
        ops.sparse_conv2d_dw(x, grad, words, live + 1, *rest)
