"""The CUDA bodies of sparse_linear and its gradients: live blocks, and lists for few samples."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_bounded

from sparseticket import ops
from sparseticket.reference.sparse_linear import sparse_linear
from sparseticket.reference.sparse_linear_dw import sparse_linear_dw
from sparseticket.reference.sparse_linear_dx import sparse_linear_dx

DTYPES = [torch.float32, torch.float16]


def _block_mask(block, rows, columns, density):
    """Whole blocks; the first block row and the second block column are empty."""
    live = torch.rand(rows, columns) < density
    live[0], live[:, 1] = False, False
    live[-1, 0] = True
    return live.repeat_interleave(block, 0).repeat_interleave(block, 1)


def _random(shape):
    """No products of float16 so small that they would lose bits."""
    made = torch.randn(shape)
    return made + 0.25 * made.sign()


def _case(mask, m, dtype, device):
    torch.manual_seed(0)
    rows, k = mask.shape
    words = ops.pack_mask(mask)
    kept = int(mask.sum())
    pattern = ops.device_pattern(words, k, kept)
    x, grad, values, bias = (_random(s).to(dtype) for s in ((m, k), (m, rows), (kept,), (rows,)))
    moved = (t.to(device) for t in (x, grad, values, words, bias))
    return *moved, None if pattern is None else pattern.to(device)


def _bounded(got, reference, *tensors):
    """``reference(*tensors)`` in float64, with its absolute values and counts of terms."""
    exact = [t.double().cpu() for t in tensors]
    made = (reference(*(change(t) for t in exact)) for change in (torch.clone, torch.abs))
    terms = reference(*(torch.ones_like(t) for t in exact))
    assert_bounded(got.cpu(), *made, terms)


def _check(mask, m, dtype, device, on_cuda, launches, kernels):
    x, grad, values, words, bias, pattern = _case(mask, m, dtype, device)
    k, w = mask.shape[1], words.cpu()
    launches.clear()
    y = on_cuda(ops.sparse_linear, x, values, words, bias, pattern)
    _bounded(y, lambda x, v, b: sparse_linear(x, v, w, b), x, values, bias)
    y = on_cuda(ops.sparse_linear, x, values, words, None, pattern)
    _bounded(y, lambda x, v: sparse_linear(x, v, w), x, values)
    gx = on_cuda(ops.sparse_linear_dx, grad, values, words, k, pattern)
    _bounded(gx, lambda g, v: sparse_linear_dx(g, v, w, k), grad, values)
    gv = on_cuda(ops.sparse_linear_dw, grad, x, words, len(values), pattern)
    _bounded(gv, lambda g, x: sparse_linear_dw(g, x, w, len(values)), grad, x)
    assert launches == kernels


BLOCK_KERNELS = ["_block_forward", "_block_forward", "_block_dx", "_block_dw"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_blocks(device, on_cuda, launches, block, dtype):
    torch.manual_seed(0)
    for density in (0.0, 0.4):
        mask = _block_mask(block, 3, 4, density)
        for m in (1, 17, 70, 130):
            _check(mask, m, dtype, device, on_cuda, launches, BLOCK_KERNELS)


def test_the_list_of_blocks_is_of_the_largest(device):
    mask = _block_mask(128, 2, 3, 0.5)
    words = ops.pack_mask(mask)
    pattern = ops.device_pattern(words, mask.shape[1], int(mask.sum()))
    live = int(mask.sum()) // 128**2
    assert pattern.shape == (1, 2 + 3 + 2 + 4 * live)
    for other in (mask ^ mask, mask | True, torch.rand(mask.shape) < 0.5):
        kept = int(other.sum())
        assert ops.device_pattern(ops.pack_mask(other), mask.shape[1], kept) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 30), (3, 17), (17, 100), (63, 300), (9, 1500)])
def test_lists(device, on_cuda, launches, shape, dtype):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.08
    mask[0] = False
    mask[-1, :3] = True
    while mask.sum() > 0.1 * mask.numel():
        mask[tuple(mask.nonzero()[0])] = False
    for m in (1, 2, 3, 4):
        _check(mask, m, dtype, device, on_cuda, launches, ["_list_forward"] * 2)
    _check(mask, 5, dtype, device, on_cuda, launches, [])


def test_other_shapes_of_batches(device, on_cuda):
    mask = _block_mask(32, 3, 4, 0.5)
    x, _, values, words, bias, pattern = _case(mask, 6, torch.float32, device)
    expected = on_cuda(ops.sparse_linear, x, values, words, bias, pattern)
    for given in (x.view(2, 3, -1), x.t().contiguous().t(), x.view(2, 3, -1).mT.contiguous().mT):
        y = on_cuda(ops.sparse_linear, given, values, words, bias, pattern)
        assert torch.equal(y.reshape(6, -1), expected)
        meta = ops.sparse_linear(*(t.to("meta") for t in (given, values, words, bias, pattern)))
        assert (y.shape, y.stride()) == (meta.shape, meta.stride())
    assert on_cuda(ops.sparse_linear, x[:0], values, words, bias, pattern).shape == (0, 96)
    gv = on_cuda(ops.sparse_linear_dw, expected[:0], x[:0], words, len(values), pattern)
    assert not gv.any()
