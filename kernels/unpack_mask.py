"""The bool mask of packed words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .variants import Variant

__all__ = ["VARIANTS", "unpack_mask"]

_BLOCK = 2048


@triton.jit
def _unpack(p_words, p_mask, n, row_words, k, channels, taps, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # in the mask's memory
    m = o < n
    i_row = o // k
    o_flat = (o - i_row * k).to(tl.int32)
    i_channel = o_flat // taps
    o_k = (o_flat - i_channel * taps) * channels + i_channel
    word = tl.load(p_words + i_row * row_words + (o_k >> 5), mask=m, other=0)
    tl.store(p_mask + o, ((word >> (o_k & 31)) & 1).to(tl.uint8), mask=m)


def unpack_mask(
    words: torch.Tensor, mask: torch.Tensor, rows: int, channels: int, taps: int
) -> None:
    """Fill a contiguous bool ``mask`` ``[rows, channels, taps]`` from int32 words."""
    k = channels * taps
    if n := rows * k:
        _unpack[(triton.cdiv(n, _BLOCK),)](
            words, mask.view(torch.uint8), n, words.shape[1], k, channels, taps, BLOCK=_BLOCK
        )


VARIANTS = [
    Variant(
        "unpack_mask",
        _unpack,
        {
            "p_words": "*i32",
            "p_mask": "*u8",
            **dict.fromkeys(("n", "row_words", "k", "channels", "taps"), "i32"),
        },
        {"BLOCK": _BLOCK},
        elements=_BLOCK,
        ceiling=160,
    )
]
