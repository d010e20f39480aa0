"""The CUDA body of ticket_conv2d and its implicit GEMM against the reference."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from sparseticket import ops, prng
from sparseticket.kernels.ticket_conv2d import ticket_conv2d as launch
from sparseticket.kernels.tuning import Config
from sparseticket.reference.ticket_conv2d import ticket_conv2d as reference

SIGMA = prng.round_bf16(0.37)
RECIPE = (5, 7, "signed_constant", SIGMA)
TILES = Config("test", 1, "gemm", 16, 16, 128, 4, 2, programs=4)
CASES = [  # images, channels, height, width; outputs, kernel; stride, padding, dilation
    ((2, 64, 5, 4), (17, 3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 128, 4, 5), (3, 3, 2), (2, 1), (0, 2), (1, 2)),
    ((1, 64, 3, 3), (5, 1, 1), (2, 2), (1, 0), (1, 1)),
    ((0, 64, 3, 3), (5, 3, 3), (1, 1), (1, 1), (1, 1)),
]


def _case(case, dtype, device):
    size, (outputs, *kernel), *geometry = case
    shape = (outputs, size[1], *kernel)
    x = torch.randn(size).to(dtype).to(device, memory_format=torch.channels_last)
    return x, torch.randn(outputs).to(dtype).to(device), shape, (*geometry, 1)


def _check(y, x, words, bias, shape, geometry, signs=None):
    x, bias = x.double().cpu(), None if bias is None else bias.double().cpu()
    exact = reference(x, words, bias, *RECIPE, shape, *geometry, signs)
    kept = ops.unpack_mask(words, shape).double()
    bound, terms = (
        F.conv2d(a, kept, None if bias is None else b, *geometry)
        for a, b in ((x.abs() * SIGMA, None if bias is None else bias.abs()),
                     (torch.ones_like(x), None if bias is None else torch.ones_like(bias)))
    )  # fmt: skip
    oracle.assert_bounded(y.cpu(), exact, bound, terms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(device, dtype, case):
    torch.manual_seed(0)
    x, bias, shape, geometry = _case(case, dtype, device)
    signs = ops.sign_words(5, 7, shape)
    for name, _, words in oracle.patterns(shape, "half none all"):
        y = F.conv2d(x, torch.zeros(shape, dtype=dtype, device=device), None, *geometry)
        y = y.to(memory_format=torch.channels_last)
        for b, planes in ((None, None), (bias, signs)) if name == "half" else ((bias, None),):
            launch(
                x.movedim(1, -1).contiguous(), words.to(device),
                None if planes is None else planes.to(device), b, y.movedim(1, -1), shape[2:],
                *geometry[:3], SIGMA, *prng.stream_key(5, 7, "sign"), TILES,
            )  # fmt: skip
            _check(y, x, words, b, shape, geometry, planes)


@pytest.mark.parametrize(
    ("weight_shape", "options", "kernel"),
    [
        ((5, 64, 3, 3), {}, "_ticket_conv2d"),
        ((5, 64, 1, 1), {}, "_gemm"),
        ((5, 64, 1, 1), {"stride": (2, 2)}, "_ticket_conv2d"),
        ((6, 32, 3, 3), {"groups": 2}, None),
        ((5, 64, 3, 3), {"channels_last": False}, None),
        ((5, 64, 3, 3), {"dtype": torch.float32}, None),
        ((5, 64, 1, 1), {"dtype": torch.float32}, "_skinny"),
        ((5, 60, 3, 3), {}, None),
        ((5, 64, 3, 3), {"dist": "normal"}, None),
    ],
)
def test_the_op(device, on_cuda, launches, weight_shape, options, kernel):
    torch.manual_seed(0)
    dtype, dist = options.get("dtype", torch.float16), options.get("dist", "signed_constant")
    groups = options.get("groups", 1)
    x = torch.randn(2, weight_shape[1] * groups, 5, 4).to(dtype).to(device)
    if options.get("channels_last", True):
        x = x.to(memory_format=torch.channels_last)
    words = ops.pack_mask(torch.rand(weight_shape) < 0.5).to(device)
    bias = torch.randn(weight_shape[0]).to(dtype).to(device)
    geometry = (options.get("stride", (1, 1)), (0, 0), (1, 1), groups)
    args = (x, words, bias, 5, 7, dist, SIGMA, weight_shape, *geometry)
    y = on_cuda(ops.ticket_conv2d, *args)
    promised = ops.ticket_conv2d(*(a.to("meta") if torch.is_tensor(a) else a for a in args))
    assert y.stride() == promised.stride()
    if dist == "signed_constant":
        _check(y, x, words.cpu(), bias, weight_shape, geometry)
    others = [n for n in launches if n not in ("_regenerate", "_sum_splits")]
    assert others == ([] if kernel is None else [kernel])


def test_explained():
    from sparseticket.ops.ticket_conv2d import cuda_choice

    def chosen(size, weight_shape):
        x = torch.empty(
            size, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last
        )
        return str(cuda_choice(x, "signed_constant", weight_shape, (1, 1), (0, 0), (1, 1), 1))

    assert "implicit GEMM" in chosen((1, 64, 14, 14), (64, 64, 3, 3))
    assert "cuDNN" in chosen((256, 64, 56, 56), (64, 64, 3, 3))
    assert "skinny" in chosen((1, 64, 4, 4), (64, 64, 1, 1))
