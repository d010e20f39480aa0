"""The compiled module's own checks: what reaches a kernel fits it, whoever calls."""

from __future__ import annotations

import pytest
import torch
from torch.utils.dlpack import to_dlpack as cap

from sparseticket import _C, ops


def _apply(dense, words, out, rows=5, channels=70, taps=1, nthreads=1):
    _C.apply_mask(cap(dense), cap(words), cap(out), rows, channels, taps, nthreads)


def test_arguments_are_checked():
    dense, words = torch.randn(5, 70), torch.zeros(5, 4, dtype=torch.int32)
    out = torch.empty(5, 70)
    _apply(dense, words, out)
    assert not out.any()
    for text, args in [
        ("dense: has 280 elements, need 350", (dense[1:], words, out)),
        ("dense: need a contiguous tensor", (torch.randn(70, 5).t(), words, out)),
        ("dense: need 2-, 4- or 8-byte elements", (dense.byte(), words, out)),
        ("out: has another dtype than dense", (dense, words, out.double())),
        ("words: has another dtype", (dense, words.float(), out)),
        ("words: has 16 elements, need 20", (dense, words[1:], out)),
        ("layout: sizes must not be negative", (dense, words, out, -5, -70)),
        ("layout: sizes must not be negative", (dense, words, out, 5, 70, 0)),
        ("nthreads: need at least 1", (dense, words, out, 5, 70, 1, 0)),
    ]:
        with pytest.raises(ValueError, match=r"sparseticket\._C: " + text):
            _apply(*args)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        _C.apply_mask("no capsule", cap(words), cap(out), 5, 70, 1, 1)


def test_memory_must_be_aligned_to_its_elements():
    words = torch.frombuffer(bytearray(8 * 4 + 1), dtype=torch.int32, offset=1).view(2, 4)
    with pytest.raises(ValueError, match="a: its memory is not aligned to its elements: clone it"):
        ops.mask_ops(words, words, "and")
    assert not ops.mask_ops(words.clone(), None, "popcount")


@pytest.mark.parametrize("padding", [2**24, 2**30, 2**31, 2**61])
def test_padding_beyond_memory(padding):
    """Products of such sizes wrap around 64 bits."""
    x, weight, words = (
        torch.ones(1, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        ops.pack_mask(torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
    )
    with pytest.raises(ValueError, match="no memory holds it with this padding"):
        ops.masked_conv2d(x, weight, words, None, [2**62] * 2, [padding] * 2, [1, 1], 1)
