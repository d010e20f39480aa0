"""Packed words of a bool mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .variants import Variant

__all__ = ["VARIANTS", "pack_mask"]

_UNITS = 32


@triton.jit
def _pack(p_mask, p_words, units, row_units, k, channels, taps, UNITS: tl.constexpr):
    o_half = tl.program_id(0) * (UNITS * 4) + tl.arange(0, UNITS * 4)  # 16 bits
    o_bit = tl.arange(0, 16)
    o_unit = o_half // 4
    i_row = o_unit // row_units
    o_k = ((o_unit - i_row * row_units) * 64 + o_half % 4 * 16)[:, None] + o_bit[None, :]
    i_tap = o_k // channels
    o_mask = (i_row.to(tl.int64) * k)[:, None] + (o_k - i_tap * channels) * taps + i_tap
    m_half = o_unit < units
    bit = tl.load(p_mask + o_mask, mask=m_half[:, None] & (o_k < k), other=0)
    word = tl.sum((bit != 0).to(tl.int32) << o_bit[None, :], axis=1)
    tl.store(p_words + o_half, word.to(tl.int16), mask=m_half)


def pack_mask(mask: torch.Tensor, words: torch.Tensor, rows: int, channels: int, taps: int) -> None:
    """Fill int32 ``words`` from a contiguous bool ``mask`` ``[rows, channels, taps]``."""
    k = channels * taps
    row_units = triton.cdiv(k, 64)
    if units := rows * row_units:
        _pack[(triton.cdiv(units, _UNITS),)](
            mask.view(torch.uint8), words.view(torch.int16), units, row_units, k, channels, taps,
            UNITS=_UNITS,
        )  # fmt: skip


VARIANTS = [
    Variant(
        "pack_mask",
        _pack,
        {
            "p_mask": "*u8",
            "p_words": "*i16",
            **dict.fromkeys(("units", "row_units", "k", "channels", "taps"), "i32"),
        },
        {"UNITS": _UNITS},
        elements=64 * _UNITS,
        ceiling=80,
    )
]
