"""Logic and counts on packed masks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import population
from .variants import Variant

__all__ = ["VARIANTS", "mask_count", "mask_logical"]

_BLOCK = 2048
_AND, _OR, _XOR, _ANDNOT = (tl.constexpr(i) for i in range(4))


@triton.jit
def _logical(p_a, p_b, p_out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    a, b = tl.load(p_a + o, mask=m, other=0), tl.load(p_b + o, mask=m, other=0)
    if OP == _AND:
        word = a & b
    elif OP == _OR:
        word = a | b
    elif OP == _XOR:
        word = a ^ b
    else:
        word = a & ~b
    tl.store(p_out + o, word, mask=m)


@triton.jit
def _count(p_a, p_b, p_out, n, HAMMING: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a block's ones to the int64 at ``p_out``."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    word = tl.load(p_a + o, mask=m, other=0)
    if HAMMING:
        word = word ^ tl.load(p_b + o, mask=m, other=0)
    tl.atomic_add(p_out, tl.sum(population(word)).to(tl.int64), sem="relaxed")


def mask_logical(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, op: int) -> None:
    """``out`` = and (0), or (1), xor (2), a & ~b (3) of contiguous int32 words."""
    if n := a.numel():
        _logical[(triton.cdiv(n, _BLOCK),)](a, b, out, n, OP=op, BLOCK=_BLOCK)


def mask_count(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, hamming: bool) -> None:
    """Write to ``out``, an int64 scalar: ones of ``a``, or places where ``a`` and ``b`` differ."""
    out.zero_()
    if n := a.numel():
        _count[(triton.cdiv(n, _BLOCK),)](a, b, out, n, HAMMING=hamming, BLOCK=_BLOCK)


_TYPES = {"p_a": "*i32", "p_b": "*i32", "n": "i32"}
VARIANTS = [
    Variant(
        "mask_ops and",
        _logical,
        {**_TYPES, "p_out": "*i32"},
        {"OP": 0, "BLOCK": _BLOCK},
        elements=32 * _BLOCK,
        ceiling=0.7,
    ),
    Variant(
        "mask_ops hamming",
        _count,
        {**_TYPES, "p_out": "*i64"},
        {"HAMMING": True, "BLOCK": _BLOCK},
        elements=32 * _BLOCK,
        ceiling=1.0,
    ),
]
