from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.mask_ops import mask_ops as reference

BINARY = {"and": "&", "or": "|", "xor": "^", "andnot": "& ~", "hamming": None}
SHAPES = [(0, 4), (4, 0), (1, 2), (3, 34), (17, 2), (63, 100), (700, 100)]  # the last: threaded


def _words(shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("op", BINARY)
def test_two_masks(isa, threads, op):
    torch.manual_seed(0)
    for shape in SHAPES:
        a, b = _words(shape), _words(shape)
        for x, y in [(a, b), (a.t(), b.t()), (a, torch.zeros_like(a)), (~torch.zeros_like(a), b)]:
            got = ops.mask_ops(x, y, op)
            assert torch.equal(got, reference(x, y, op)), shape
            assert got.dtype == (torch.int64 if op == "hamming" else torch.int32)


def test_popcount(isa, threads):
    torch.manual_seed(0)
    for shape in SHAPES:
        words = _words(shape)
        got = ops.mask_ops(words, None, "popcount")
        assert torch.equal(got, reference(words, None, "popcount"))
        assert got.dtype == torch.int64
    for _, mask, words in oracle.patterns((17, 63)):
        assert int(ops.mask_ops(words, None, "popcount")) == int(mask.sum())


def test_truth_tables():
    a, b = oracle.signed([0b1100, 0xFFFFFFFF]), oracle.signed([0b1010, 0x80000000])
    expected = {
        "and": [0b1000, 0x80000000],
        "or": [0b1110, 0xFFFFFFFF],
        "xor": [0b0110, 0x7FFFFFFF],
        "andnot": [0b0100, 0x7FFFFFFF],
    }
    for op, words in expected.items():
        assert torch.equal(ops.mask_ops(a, b, op), oracle.signed(words)), op
    assert int(ops.mask_ops(a, b, "hamming")) == 2 + 31
    assert int(ops.mask_ops(a, None, "popcount")) == 2 + 32


@pytest.mark.parametrize("op", [*BINARY, "popcount"])
def test_opcheck_and_compiled(op):
    a, b = _words((4, 6)), None if op == "popcount" else _words((4, 6))
    torch.library.opcheck(ops.mask_ops, (a, b, op))
    assert torch.equal(oracle.compiled(ops.mask_ops)(a, b, op), reference(a, b, op))
    torch.library.opcheck(ops.mask_ops, (a.t(), None if b is None else b.t(), op))


def test_errors():
    a = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"mask_ops: op: got 'nand', accepted: and, or, xor"):
        ops.mask_ops(a, a, "nand")
    with pytest.raises(ValueError, match=r"mask_ops: b: and takes two masks"):
        ops.mask_ops(a, None, "and")
    with pytest.raises(ValueError, match=r"mask_ops: b: popcount takes one mask"):
        ops.mask_ops(a, a, "popcount")
    with pytest.raises(TypeError, match=r"mask_ops: a: got torch\.int64, need int32 words"):
        ops.mask_ops(a.long(), a, "and")
    with pytest.raises(TypeError, match=r"mask_ops: b: got torch\.bool, need int32 words"):
        ops.mask_ops(a, a.bool(), "and")
    with pytest.raises(ValueError, match=r"mask_ops: masks differ in shape: \(2, 2\), \(2, 4\)"):
        ops.mask_ops(a, torch.zeros(2, 4, dtype=torch.int32), "or")
