"""The CUDA bodies of masked_step and apply_mask, and of the ops that rest on them."""

from __future__ import annotations

import os

import pytest
import torch

from sparseticket import ops
from sparseticket.reference.apply_mask import apply_mask
from tests.ops.test_masked_step import LAYOUTS, RULES, check_step, inputs_of, run

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(), (5,), (3, 17), (17, 63), (2, 64), (0, 5), (5, 0), (40, 129)]
CONVS = [(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (2, 3, 4), (9, 300, 3, 3), (3, 2100)]


def _on(device, inputs):
    return [[t.to(device) for t in tensors] for tensors in inputs]


def _check_rounded(made, exact):
    """``exact`` rounded to the dtype of ``made``; the interpreter cuts off for bfloat16."""
    cut = INTERPRETING and made.dtype == torch.bfloat16
    error = (made.double() - exact.double()).abs()
    assert bool((error <= (2 if cut else 1) * torch.finfo(made.dtype).eps * exact.abs()).all())
    assert not made.view(torch.int16)[exact == 0].any()


@pytest.mark.parametrize("rule", RULES)
def test_masked_step(device, on_cuda, launches, rule):
    torch.manual_seed(0)
    for change, density, shadow in (
        (LAYOUTS[0], 0.4, torch.float16),
        (LAYOUTS[1], 0.4, torch.bfloat16),
        (LAYOUTS[1], 0.0, torch.float16),
        (LAYOUTS[0], 1.0, None),
    ):
        inputs = _on(device, inputs_of([*SHAPES, *CONVS], rule, change, shadow, density))
        launches.clear()
        got = run(lambda *a, **k: on_cuda(ops.masked_step, *a, **k), inputs, **RULES[rule])
        assert launches.count("_masked_step") == 1
        for made, exact in check_step(got, inputs, RULES[rule]):
            _check_rounded(made, exact)


def test_masked_step_off_the_grid(device, on_cuda):
    """Tensors that do not start at a multiple of 16 bytes, and none at all."""
    torch.manual_seed(0)
    inputs = _on(device, inputs_of([(40, 129)], "adamw"))
    shifted = [
        [torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape) for t in ts]
        for ts in inputs[:5]
    ]
    for new, old in zip(shifted, inputs[:5], strict=True):
        new[0].copy_(old[0])
    on_cuda(ops.masked_step, *shifted, inputs[5], **RULES["adamw"])
    on_cuda(ops.masked_step, *inputs, **RULES["adamw"])
    for new, old in zip(shifted, inputs[:5], strict=True):
        assert torch.equal(new[0].nan_to_num(), old[0].nan_to_num())
    on_cuda(ops.masked_step, [], [], [], [], [], [], lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_apply_mask(device, on_cuda, launches, dtype):
    torch.manual_seed(0)
    for shape in [*SHAPES, *CONVS]:
        for change in LAYOUTS:
            for density in (0.0, 0.4):
                mask = torch.rand(shape, device=device) < density
                words = ops.pack_mask(mask.cpu()).to(device)
                dense = change(torch.randn(shape, device=device).to(dtype))
                dense = torch.where(mask, dense, torch.nan)
                for to in (None, torch.float16):
                    got = on_cuda(ops.apply_mask, dense, words, to)
                    assert torch.equal(got, apply_mask(dense, words, to))
                    assert got.stride() == dense.stride() or not got.numel()
    assert set(launches) == {"_apply_mask"}


def test_masked_products(device, on_cuda):
    """One masked copy and torch's product, or torch's product on the shadow."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, device=device) for s in ((9, 70), (5, 70), (5,)))
    words = ops.pack_mask(torch.rand(5, 70) < 0.4).to(device)
    shadow = apply_mask(weight, words)
    expected = torch.nn.functional.linear(x, shadow, bias)
    for given in (None, shadow):
        args = (x, weight, words, bias, False, False, given)
        assert torch.equal(on_cuda(ops.masked_linear, *args), expected)
    image, filters = torch.randn(2, 4, 7, 9, device=device), torch.randn(6, 2, 3, 3, device=device)
    words = ops.pack_mask(torch.rand(6, 2, 3, 3) < 0.4).to(device)
    shadow = apply_mask(filters, words)
    geometry = ((1, 1), (1, 1), (1, 1), 2)
    expected = torch.nn.functional.conv2d(image, shadow, None, *geometry)
    for given in (None, shadow):
        args = (image, filters, words, None, *geometry, False, given)
        assert torch.equal(on_cuda(ops.masked_conv2d, *args), expected)
