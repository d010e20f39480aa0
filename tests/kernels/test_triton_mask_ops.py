"""The CUDA body of mask_ops, bit by bit against the reference."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.mask_ops import mask_ops as reference


@pytest.mark.parametrize("op", ["and", "or", "xor", "andnot", "popcount", "hamming"])
def test_against_the_reference(device, on_cuda, op):
    torch.manual_seed(0)
    for shape in [(0, 2), (3, 0), (1, 2), (17, 10), (70, 64)]:
        a, b = torch.randint(-(2**31), 2**31, (2, *shape)).to(torch.int32)
        for left, right in ((a, b), (a, a), (torch.full_like(a, -1), torch.zeros_like(a))):
            for change in (oracle.FORMATS["contiguous"], oracle.FORMATS["sliced"]):
                given = change(left).to(device), None if op == "popcount" else right.to(device)
                got = on_cuda(ops.mask_ops, *given, op)
                expected = reference(left, None if op == "popcount" else right, op)
                assert got.dtype == expected.dtype and torch.equal(got.cpu(), expected)
