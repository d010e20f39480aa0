from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.sign_words import sign_words as reference

SHAPES = [(), (5,), (1, 1), (3, 17), (17, 63), (100, 640), (0, 5), (5, 0), (8, 3, 3, 3)]


def test_bit_identical_to_the_reference(isa, threads):
    for shape in [*SHAPES, (40, 8200)]:  # the last: more units than one thread's chunk
        for seed, layer in [(0, 0), (2**63 - 1, -1), (5, 7)]:
            got = ops.sign_words(seed, layer, shape)
            assert got.dtype == torch.int32
            assert torch.equal(got, reference(seed, layer, shape)), (shape, seed, layer)


def test_they_are_the_signs_of_regenerate():
    shape = (9, 5, 3, 3)
    negative = ops.unpack_mask(ops.sign_words(3, 4, shape), shape)
    weight = ops.regenerate(3, 4, shape, "signed_constant", 0.5)
    assert torch.equal(weight, torch.where(negative, -0.5, 0.5))


def test_opcheck_and_compiled():
    torch.library.opcheck(ops.sign_words, (3, 4, (5, 70)))
    add = oracle.compiled(lambda x: x + ops.sign_words(3, 4, (5, 70)))
    assert torch.equal(add(torch.zeros(5, 4, dtype=torch.int32)), reference(3, 4, (5, 70)))


def test_errors():
    with pytest.raises(ValueError, match=r"seed: got -1, need an integer in \[0, 2\*\*63\)"):
        ops.sign_words(-1, 0, (3, 3))
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r"needs 4398046511104 generator calls, a stream has"):
            ops.sign_words(1, 0, (2**20, 2**28), device=device)
