from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.ops.rice_encode import rice_bits
from sparseticket.reference.rice_encode import rice_encode as reference

SHAPES = [(1, 1), (3, 17), (17, 63), (13, 77), (2, 64), (0, 5), (5, 0), (1, 300)]


@pytest.mark.parametrize("parameter", [0, 1, 4, 11, 30])
def test_against_reference(isa, parameter):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            payload = ops.rice_encode(words, shape[1], parameter)
            assert torch.equal(payload, reference(words, shape[1], parameter)), shape
            bits = rice_bits(words, shape[1], parameter)
            assert (bits + 7) // 8 == payload.numel()
            assert torch.equal(ops.rice_decode(payload, *shape, int(mask.sum()), parameter), words)


def test_by_hand():
    """Gaps 1, 0, 5 with one low bit: quotients 0, 0, 2 in unary ones, then the low bit."""
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, [1, 2, 8]] = True
    bits = [*(0, 1), *(0, 0), *(1, 1, 0, 1)]
    expected = sum(bit << i for i, bit in enumerate(bits))
    assert ops.rice_encode(ops.pack_mask(mask), 9, 1).tolist() == [expected]


def test_opcheck():
    torch.manual_seed(0)
    torch.library.opcheck(ops.rice_encode, (ops.pack_mask(torch.rand(5, 70) < 0.2), 70, 2))


def test_compiled():
    words = ops.pack_mask(torch.rand(5, 70) < 0.2)
    encode = oracle.compiled(lambda w: ops.rice_encode(w, 70, 2) ^ 1)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(encode(words), reference(words, 70, 2) ^ 1)


def test_errors():
    words = torch.zeros(3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"rice_encode: words: .*\(3, 4\), need int32 \(3, 2\)"):
        ops.rice_encode(words, 60, 0)
    for parameter in (-1, 31):
        with pytest.raises(ValueError, match=rf"parameter: got {parameter}, need 0\.\.30"):
            ops.rice_encode(words, 70, parameter)
    with pytest.raises(NotImplementedError, match="rice_encode: words: the code of a meta tensor"):
        ops.rice_encode(words.to("meta"), 70, 0)
