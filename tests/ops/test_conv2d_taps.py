from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.conv2d_taps import conv2d_taps as reference

MANY = [
    ((1, 100, 30, 31), (17, 100, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 126, 17, 19), (10, 63, 3, 3), (2, 2), (1, 1), (1, 3), 2),
    ((1, 300, 8, 16), (3, 300, 1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def test_against_the_reference(isa):
    torch.manual_seed(0)
    for x_shape, weight_shape, *geometry in [*oracle.CONVS, *MANY]:
        for _, _, words in oracle.patterns(weight_shape):
            args = (words, weight_shape, x_shape[-2:], *geometry)
            assert torch.equal(ops.conv2d_taps(*args), reference(*args))


def test_opcheck_and_errors():
    words = ops.pack_mask(torch.rand(6, 2, 3, 3) < 0.5)
    geometry = ((1, 1), (1, 1), (1, 1), 2)
    torch.library.opcheck(ops.conv2d_taps, (words, (6, 2, 3, 3), (5, 6), *geometry))
    with pytest.raises(ValueError, match=r"conv2d_taps: words"):
        ops.conv2d_taps(words[1:], (6, 2, 3, 3), (5, 6), *geometry)
    with pytest.raises(ValueError, match=r"conv2d_taps: image: got \(5,\)"):
        ops.conv2d_taps(words, (6, 2, 3, 3), (5,), *geometry)
    with pytest.raises(ValueError, match=r"smaller than the kernel"):
        ops.conv2d_taps(words, (6, 2, 3, 3), (0, 0), *geometry)
