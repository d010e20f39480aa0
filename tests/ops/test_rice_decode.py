from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.rice_decode import rice_decode as reference
from sparseticket.reference.rice_encode import rice_encode


@pytest.mark.parametrize("parameter", [0, 1, 4, 11, 30])
def test_against_reference(isa, parameter):
    torch.manual_seed(0)
    for shape in [(1, 1), (3, 17), (17, 63), (13, 77), (0, 5), (5, 0), (1, 300)]:
        for _, mask, words in oracle.patterns(shape):
            payload = rice_encode(words, shape[1], parameter)
            recipe = (*shape, int(mask.sum()), parameter)
            assert torch.equal(ops.rice_decode(payload, *recipe), words), shape
            assert torch.equal(reference(payload, *recipe), words)


def _both(payload, *recipe):
    """(kernel's, reference's) words, None where it raises."""
    out = []
    for decode in (ops.rice_decode, reference):
        try:
            out.append(decode(payload, *recipe))
        except ValueError as error:
            assert "payload:" in str(error)
            out.append(None)
    return out


def test_damage_is_found_or_decodes_alike(isa):
    """Every flipped bit and every cut: the kernel accepts what the reference accepts, no more."""
    torch.manual_seed(0)
    mask = torch.rand(7, 53) < 0.2
    kept, payload = int(mask.sum()), rice_encode(ops.pack_mask(mask), 53, 2)
    refused = 0
    for bit in range(8 * payload.numel()):
        damaged = payload.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        got, expected = _both(damaged, 7, 53, kept, 2)
        refused += got is None
        assert (got is None) == (expected is None), bit
        if got is not None:
            assert torch.equal(got, expected)
            assert int(ops.mask_ops(got, None, "popcount")) == kept
    assert refused > 0
    for n in range(payload.numel()):
        assert _both(payload[:n], 7, 53, kept, 2) == [None, None]
    for other in (kept - 1, kept + 1):
        assert _both(payload, 7, 53, other, 2) == [None, None]
    longer = torch.cat([payload, torch.zeros(1, dtype=torch.uint8)])
    assert _both(longer, 7, 53, kept, 2) == [None, None]
    with pytest.raises(ValueError, match=r"rice_decode: payload: is not the Rice code of 9 ones"):
        ops.rice_decode(payload[:0], 7, 53, 9, 2)


def test_opcheck_and_compiled():
    torch.manual_seed(0)
    mask = torch.rand(5, 70) < 0.2
    words = ops.pack_mask(mask)
    args = (rice_encode(words, 70, 2), 5, 70, int(mask.sum()), 2)
    torch.library.opcheck(ops.rice_decode, args)
    assert torch.equal(oracle.compiled(ops.rice_decode)(*args), words)


def test_errors():
    payload = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"rice_decode: payload: got torch\.int32 .*need 1-D uint8"):
        ops.rice_decode(payload.int(), 3, 3, 1, 0)
    with pytest.raises(TypeError, match=r"payload: got torch\.uint8 \(1, 3\), need 1-D uint8"):
        ops.rice_decode(payload[None], 3, 3, 1, 0)
    for parameter in (-1, 31):
        with pytest.raises(ValueError, match=rf"parameter: got {parameter}, need 0\.\.30"):
            ops.rice_decode(payload, 3, 3, 1, parameter)
    for numbers in ((-3, 3, 0), (3, -3, 0), (-3, -3, 0), (3, 3, -1), (3, 3, 10)):
        listed = ", ".join(map(str, numbers))
        with pytest.raises(ValueError, match=rf"rows, k, kept: got {listed}, need 0 <= kept <="):
            ops.rice_decode(payload, *numbers, 0)
        with pytest.raises(ValueError, match=rf"rows, k, kept: got {listed}, need 0 <= kept <="):
            ops.rice_decode(payload.to("meta"), *numbers, 0)
