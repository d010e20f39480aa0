from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.unpack_mask import unpack_mask as reference

SHAPES = [
    *[(), (5,), (64,), (1, 1), (3, 17), (17, 63), (100, 100), (2, 64), (3, 129), (0, 5), (5, 0)],
    *[(8, 3, 3, 3), (16, 5, 1, 1), (4, 70, 3, 2), (3, 1, 5, 5), (2, 32, 3, 3), (2, 3, 4)],
    *[(2, 64, 2, 2), (0, 3, 3, 3), (4, 0, 3, 3), (2, 3, 2, 2, 2)],
]


def test_threads(threads):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape, "half"):
            assert torch.equal(ops.unpack_mask(words, shape), mask), shape


def test_against_reference_and_round_trip(isa):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            got = ops.unpack_mask(words, shape)
            assert got.is_contiguous()
            assert torch.equal(got, mask), shape
            assert torch.equal(got, reference(words, shape))


def test_non_contiguous_words():
    mask = torch.rand(6, 200) < 0.5
    words = ops.pack_mask(mask)
    spread = torch.stack([words, ~words], -1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(ops.unpack_mask(spread, mask.shape), mask)


def test_padding_bits_do_not_matter():
    words = torch.full((2, 2), -1, dtype=torch.int32)
    assert torch.equal(ops.unpack_mask(words, (2, 37)), torch.ones(2, 37, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(4, 70), (4, 5, 3, 3)])
def test_opcheck_and_compiled(shape):
    mask = torch.rand(shape) < 0.5
    words = ops.pack_mask(mask)
    torch.library.opcheck(ops.unpack_mask, (words, shape))
    assert torch.equal(oracle.compiled(ops.unpack_mask)(words, shape), mask)


def test_errors():
    words = torch.zeros(3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"unpack_mask: words: .*\(3, 4\), need int32 \(3, 2\)"):
        ops.unpack_mask(words, (3, 64))
    with pytest.raises(ValueError, match=r"unpack_mask: words: got torch\.int64"):
        ops.unpack_mask(words.long(), (3, 70))
