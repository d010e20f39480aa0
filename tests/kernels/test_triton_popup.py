"""The CUDA bodies of popup_linear and popup_conv2d, which are made of other ops."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng

SIGMA = prng.round_bf16(0.37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dense", [False, True])
def test_popup_linear(device, on_cuda, dtype, dense):
    torch.manual_seed(0)
    scores, x = torch.randn(17, 70).to(device), torch.randn(2, 3, 70).to(dtype).to(device)
    words = ops.pack_mask(torch.rand(17, 70) < 0.5).to(device)
    weight = torch.randn(17, 70).to(dtype).to(device) if dense else None
    bias = torch.randn(17).to(dtype).to(device)
    args = (x, weight, scores, words, bias, "abs", 5, 7, SIGMA)
    expected = ops.popup_linear(*(t.cpu() if torch.is_tensor(t) else t for t in args))
    tolerance = 3e-3 if dtype == torch.float16 else 1e-5
    got = on_cuda(ops.popup_linear, *args)
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)
    choice = oracle.module_of("popup_linear")._choose_cuda(*args)
    assert choice.kernel == ("masked_linear" if dense else "Triton skinny")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_popup_conv2d(device, on_cuda, dense, memory):
    torch.manual_seed(0)
    scores = torch.randn(6, 4, 3, 3).to(device, memory_format=memory)
    x = torch.randn(2, 4, 7, 5).to(device, memory_format=memory)
    words = ops.pack_mask(torch.rand(6, 4, 3, 3) < 0.5).to(device)
    weight = torch.randn_like(scores) if dense else None
    args = (x, weight, scores, words, None, "abs", 5, 7, SIGMA, (2, 1), (1, 0), (1, 1), 1)
    expected = ops.popup_conv2d(*(t.cpu() if torch.is_tensor(t) else t for t in args))
    got = on_cuda(ops.popup_conv2d, *args)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert oracle.module_of("popup_conv2d")._choose_cuda(*args).kernel == "materialised"
