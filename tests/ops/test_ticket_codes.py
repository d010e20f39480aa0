from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.regenerate import regenerate
from sparseticket.reference.ticket_codes import ticket_codes as reference

SHAPES = [
    *[(1, 1), (3, 17), (17, 63), (63, 100), (100, 16), (16, 15), (2, 4100), (40, 640)],
    *[(0, 5), (5, 0), (0, 0)],
]


def _all(words, k, signs):
    for transposed in (False, True):
        for args in [(words, None), (words, signs), (None, signs)]:
            yield args[0], k, 5, 7, args[1], transposed


def test_bit_identical_to_the_reference(isa, threads):
    torch.manual_seed(0)
    for rows, k in SHAPES:
        signs = ops.sign_words(5, 7, (rows, k))
        for _, _, words in oracle.patterns((rows, k)):
            for args in _all(words, k, signs):
                got = ops.ticket_codes(*args)
                assert got.dtype == torch.int32
                assert torch.equal(got, reference(*args)), (rows, k, args[-1])


def test_codes_spell_the_weights():
    """Decoded digit by digit: 1 plus the sign of each weight."""
    torch.manual_seed(0)
    rows, k = 5, 37
    _, mask, words = next(oracle.patterns((rows, k), "rows"))
    signed = regenerate(5, 7, (rows, k), "signed_constant", 1.0) * mask
    codes = ops.ticket_codes(words, k, 5, 7)
    assert codes.shape == (3, 16)
    for row in range(16):
        for column in range(48):
            code, (group, i) = int(codes[column // 16, row]), divmod(column % 16, 4)
            digit = code >> 20 + 2 * group & 3 if i == 3 else (code >> 5 * group & 31) // 3**i % 3
            inside = row < rows and column < k
            assert digit == 1 + (int(signed[row, column]) if inside else 0)


def test_layouts_and_padding():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((17, 63), "rows"))
    signs = ops.sign_words(5, 7, (17, 63))
    dirty = words.clone()
    dirty[:, -1] |= -(2**31)  # a padding bit: kernels never read them
    for args in _all(words, 63, signs):
        expected = reference(*args)
        for change in oracle.FORMATS.values():
            w, s = (None if t is None else change(t) for t in (args[0], args[4]))
            assert torch.equal(ops.ticket_codes(w, *args[1:4], s, args[5]), expected)
        if args[0] is not None:
            assert torch.equal(ops.ticket_codes(dirty, *args[1:]), expected)


def test_opcheck_and_compiled():
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    for transposed in (False, True):
        torch.library.opcheck(ops.ticket_codes, (words, 70, 5, 7, None, transposed))

        def op(w, transposed=transposed):
            return ops.ticket_codes(w, 70, 5, 7, None, transposed)

        assert torch.equal(oracle.compiled(op)(words), op(words))


def test_errors():
    words = torch.zeros(5, 4, dtype=torch.int32)
    for text, args in [
        (r"words: .*\(5, 4\), need int32 \(5, 2\)", (words, 9, 5, 7)),
        (r"words: got torch\.int64", (words.long(), 70, 5, 7)),
        (r"signs: .*\(4, 4\), need int32 \(5, 4\)", (words, 70, 5, 7, words[1:])),
    ]:
        with pytest.raises(ValueError, match="ticket_codes: " + text):
            ops.ticket_codes(*args)
    with pytest.raises(ValueError, match=r"seed: got -1, need an integer in \[0, 2\*\*63\)"):
        ops.ticket_codes(words, 70, -1, 7)
