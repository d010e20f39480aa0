"""form='compressed' of SparseConv2d: what depends on the image size, and machine code."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn

import sparseticket as st
from sparseticket import _C, ops

LAYERS = {
    "plain": ((64, 64, 3), {"padding": 1}),
    "same, even kernel": ((8, 12, (4, 2)), {"padding": "same", "bias": False}),
    "strided groups": ((8, 12, 3), {"padding": (1, 2), "stride": 2, "groups": 2}),
    "depthwise reflect": ((6, 6, 3), {"padding": 1, "padding_mode": "reflect", "groups": 6}),
    "dilated": ((5, 16, 3), {"padding": 2, "dilation": (2, 1)}),
}


@pytest.fixture(params=LAYERS)
def pair(request):
    torch.manual_seed(0)
    args, kwargs = LAYERS[request.param]
    sparse = st.SparseConv2d.from_dense(nn.Conv2d(*args, **kwargs), density=0.1, form="compressed")
    return sparse, sparse.to_dense()


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _image(module, *size):
    return torch.randn(*size[:-2], module.in_channels, *size[-2:])


def test_forward_and_gradients_are_the_dense_layers(pair):
    sparse, dense = pair
    for size in [(2, 20, 18), (20, 18), (3, 9, 11), (1, 9, 11), (1, 9, 11)]:
        x = _image(sparse, *size).requires_grad_()
        y, expected = sparse(x), dense(x)
        _close(y, expected)
        grad = torch.randn_like(y)
        gx, gv = torch.autograd.grad(y, [x, sparse.values], grad)
        ex, ew = torch.autograd.grad(expected, [x, dense.weight], grad)
        _close(gx, ex)
        _close(gv, ops.gather_live(ew, sparse.mask_words, gv.numel()))


def test_any_optimizer_trains_the_values(pair):
    sparse, dense = pair
    x = _image(sparse, 2, 20, 18)
    for module in pair:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(x).square().mean().backward()
        optimizer.step()
    live = ops.gather_live(dense.weight.detach(), sparse.mask_words, sparse.values.numel())
    _close(sparse.values.detach(), live)
    _close(sparse(x), st.SparseConv2d.from_dense(dense, mask=sparse.mask)(x))


def test_derived_data_follow_the_image_size_when_it_comes_twice(pair):
    sparse, _ = pair
    a, b = _image(sparse, 1, 20, 18), _image(sparse, 1, 9, 11)
    sparse(a)
    first = sparse._image
    sparse(b)
    assert sparse._image == first
    sparse(b)
    assert sparse._image != first
    sparse(a)
    sparse(b)
    sparse(a)
    assert sparse._image != first


def test_copies_and_state(pair):
    sparse, _ = pair
    x = _image(sparse, 2, 20, 18)
    y = sparse(x)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(sparse), torch.load(buffer, weights_only=False)):
        assert other._code == 0 and other.pattern is None
        assert torch.equal(other(x), y)
    other = st.SparseConv2d.from_dense(sparse.to_dense(), mask=sparse.mask, form="compressed")
    other(x)
    other.load_state_dict(sparse.state_dict())
    assert other._image is None
    assert torch.equal(other(x), y)


def test_compiled(pair):
    sparse, _ = pair
    x = _image(sparse, 2, 20, 18)
    y = sparse(x)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)


def test_machine_code_is_freed_with_the_module(require):
    if _C.isa() != "avx512":
        require("avx512", "machine code is for AVX-512")
    gc.collect()
    before = _C.code_bytes()
    args, kwargs = LAYERS["plain"]
    sparse = st.SparseConv2d.from_dense(nn.Conv2d(*args, **kwargs), density=0.1, form="compressed")
    sparse(torch.randn(2, 64, 20, 18))
    assert sparse._code and _C.code_bytes() > before
    sparse.load_state_dict(sparse.state_dict())
    assert not sparse._code and _C.code_bytes() == before
    sparse(torch.randn(2, 64, 20, 18))
    del sparse
    gc.collect()
    assert _C.code_bytes() == before
