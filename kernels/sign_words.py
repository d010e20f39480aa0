"""The sign stream of a layer as packed words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import philox_words, sign_word
from .variants import Variant

__all__ = ["VARIANTS", "sign_words"]

_UNITS = 1024


@triton.jit
def _signs(p_words, units, key, high, UNITS: tl.constexpr):
    o_unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    first, second = philox_words(key, high, o_unit)
    words = tl.join(sign_word(first), sign_word(second)).to(tl.int32, bitcast=True)
    p_word = (p_words + o_unit.to(tl.int64) * 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(p_word, words, mask=(o_unit < units)[:, None])


def sign_words(words: torch.Tensor, key: int, high: int) -> None:
    """Fill contiguous int32 ``words`` with the stream of (key, high): bit 1 = negative."""
    if units := words.numel() // 2:
        _signs[(triton.cdiv(units, _UNITS),)](words, units, key, high, UNITS=_UNITS)


VARIANTS = [
    Variant(
        "sign_words",
        _signs,
        {"p_words": "*i32", "units": "i32", "key": "i64", "high": "i64"},
        {"UNITS": _UNITS},
        elements=64 * _UNITS,
        ceiling=1.5,
    )
]
