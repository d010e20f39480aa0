"""The CUDA body of regenerate, bit by bit against the reference."""

from __future__ import annotations

import os

import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.regenerate import regenerate as reference
from sparseticket.reference.regenerate_many import regenerate_many as many_reference
from tests.ops.test_regenerate_many import layers_of, same

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [
    *[(), (5,), (1, 1), (3, 17), (17, 63), (2, 64), (70, 130), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (2, 3, 4), (0, 3, 3, 3)],
]


def _same(a, b):
    assert a.dtype == b.dtype
    for memory in (torch.contiguous_format, torch.channels_last)[: 1 + (a.ndim == 4)]:
        same = a.is_contiguous(memory_format=memory) == b.is_contiguous(memory_format=memory)
        assert same or not a.numel()
    assert torch.equal(a.cpu(), b.cpu())
    assert torch.equal(a.double().signbit().cpu(), b.double().signbit().cpu())  # +0 where dropped


def _expected(recipe, device, kwargs):
    if not INTERPRETING or kwargs["dtype"] != torch.bfloat16:
        return reference(*recipe, device=device, **kwargs)
    # the interpreter cuts fp32 off to bfloat16 instead of rounding it
    exact = reference(*recipe, device=device, **{**kwargs, "dtype": torch.float32})
    return (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dist", prng.DISTRIBUTIONS)
def test_bit_identical(device, on_cuda, launches, dist, dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        half = ops.pack_mask(torch.rand(shape) < 0.5).to(device)
        for words in (None, half):
            for last in (False, True):
                kwargs = {"dtype": dtype, "words": words, "channels_last": last}
                recipe = (5, 7, shape, dist, 0.37)
                got = on_cuda(ops.regenerate, *recipe, device=device, **kwargs)
                _same(got, _expected(recipe, device, kwargs))
    drawn = [] if dist == "constant" else [s for s in SHAPES if 0 not in s]  # it is torch's fill
    assert launches == ["_regenerate"] * 4 * len(drawn)


@pytest.mark.parametrize("dist", prng.DISTRIBUTIONS)
def test_streams_and_subnormals(device, on_cuda, dist):
    for sigma in (0.0, 1e-40, 3e38):
        for options in ({"stream": "mask", "draw": 3}, {}):
            recipe = (2**63 - 1, -1, (9, 70), dist, sigma)
            got = on_cuda(ops.regenerate, *recipe, device=device, **options)
            _same(got, reference(*recipe, **options))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_many_layers_in_one_launch(device, on_cuda, launches, dtype, last):
    shapes = [(17, 63), (), (8, 3, 3, 3), (0, 4), (300, 192), (4, 64, 3, 2), (2, 3, 4)]
    given = layers_of(shapes, device=device)
    launches.clear()
    got = on_cuda(ops.regenerate_many, *given, dtype, last)
    assert launches == ["_fill", "_regenerate_many"]  # the table, and all layers
    same(got, many_reference(*given, dtype, last))
    assert on_cuda(ops.regenerate_many, *layers_of([(0, 4)], device=device))[0].shape == (0, 4)
