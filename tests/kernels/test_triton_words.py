"""The CUDA bodies of pack_mask, unpack_mask and sign_words, bit by bit against the reference."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference import pack_mask as packed
from sparseticket.reference import sign_words as signs

SHAPES = [
    *[(), (5,), (1, 1), (3, 17), (17, 63), (2, 64), (70, 130), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (2, 3, 4), (0, 3, 3, 3), (4, 0, 3, 3)],
]


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_pack_and_unpack(device, on_cuda, launches, density):
    torch.manual_seed(0)
    for shape in SHAPES:
        mask = torch.rand(shape) < density
        expected = packed.pack_mask(mask)
        for change in (oracle.FORMATS["contiguous"], oracle.FORMATS["channels_last"]):
            words = on_cuda(ops.pack_mask, change(mask).to(device))
            assert torch.equal(words.cpu(), expected)
        assert torch.equal(on_cuda(ops.unpack_mask, words, shape).cpu(), mask)
    filled = [s for s in SHAPES if 0 not in s]
    assert launches == ["_pack", "_pack", "_unpack"] * len(filled)


def test_sign_words(device, on_cuda):
    for shape in SHAPES:
        for recipe in ((0, 0, shape), (2**63 - 1, -1, shape)):
            got = on_cuda(ops.sign_words, *recipe, device=device)
            assert torch.equal(got.cpu(), signs.sign_words(*recipe))
