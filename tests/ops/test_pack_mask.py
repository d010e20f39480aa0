from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.pack_mask import pack_mask as reference

SHAPES = [
    *[(), (5,), (64,), (1, 1), (3, 17), (17, 63), (100, 100), (2, 64), (3, 129), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 1, 5, 5), (2, 32, 3, 3), (2, 3, 4)],
    *[(2, 64, 2, 2), (0, 3, 3, 3), (4, 0, 3, 3), (2, 3, 2, 2, 2)],
]


def test_threads(threads):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape, "half"):
            assert torch.equal(ops.pack_mask(mask), words), shape


def test_against_reference(isa):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            for layout in oracle.FORMATS.values():
                assert torch.equal(ops.pack_mask(layout(mask)), words), shape


def test_bit_order():
    """LSB first, channels-last columns, padding bits 0."""
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0, [0, 31, 32, 69]] = True
    mask[1] = True
    words = [[0x80000001, 1, 0x20, 0], [0xFFFFFFFF, 0xFFFFFFFF, 0x3F, 0]]
    assert torch.equal(ops.pack_mask(mask), torch.stack([oracle.signed(w) for w in words]))
    conv = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    conv[0, 1, 0, 1] = True  # tap 1, channel 1: column 1 * 3 + 1
    assert ops.pack_mask(conv).tolist() == [[1 << 4, 0]]


@pytest.mark.parametrize("shape", [(4, 70), (4, 5, 3, 3)])
def test_opcheck_and_compiled(shape):
    mask = torch.rand(shape) < 0.5
    torch.library.opcheck(ops.pack_mask, (mask,))
    assert torch.equal(oracle.compiled(ops.pack_mask)(mask), reference(mask))


def test_errors():
    with pytest.raises(TypeError, match=r"pack_mask: mask: got torch\.uint8, need torch\.bool"):
        ops.pack_mask(torch.ones(3, 3, dtype=torch.uint8))
