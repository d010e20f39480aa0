"""Dense tensors under their masks, cast on the way: one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .variants import Variant

__all__ = ["VARIANTS", "all_of", "apply_mask", "live_bits"]

_BLOCK = 2048


@triton.jit
def _quotient(o, divisor):
    """``o // divisor`` by one multiplication; exact for 0 <= o, o * divisor < 2**32."""
    magic = tl.full([], 0xFFFFFFFF, tl.uint32) // tl.cast(divisor, tl.uint32) + 1
    quotient = tl.umulhi(o.to(tl.uint32), magic).to(tl.int32)
    return tl.where(divisor == 1, o, quotient)  # whose magic would be 2**32


@triton.jit
def live_bits(p_words, o, k, channels, taps, m):
    """Whether the mask keeps the elements ``o``, successive int32 in memory order, counted from the
    start of the row in which the first one lies and whose words begin at ``p_words``. ``taps``: 1
    where memory order is canonical order."""
    i_row = (o >= k).to(tl.int32)  # enough where a block is in two rows at most
    if k < o.shape[0]:
        i_row = _quotient(o, k)
    o_k = o - i_row * k
    if taps > 1:
        i_channel = _quotient(o_k, taps)
        o_k = (o_k - i_channel * taps) * channels + i_channel
    row_words = (k + 63) // 64 * 2
    word = tl.load(p_words + i_row * row_words + (o_k >> 5), mask=m, other=0)
    return ((word >> (o_k & 31)) & 1) != 0


@triton.jit
def all_of(BLOCK: tl.constexpr):
    """The mask of a block that lies inside: a constant, so that accesses are as wide as can be."""
    return tl.full([BLOCK], True, tl.int1)


@triton.jit
def _apply_block(
    p_dense, p_words, p_out, start, o, m, k, channels, taps,
):  # fmt: skip
    i_row = start // k
    p_row = p_words + i_row * ((k + 63) // 64 * 2)
    live = live_bits(p_row, (start - i_row * k).to(tl.int32) + o, k, channels, taps, m)
    value = tl.load(p_dense + start + o, mask=m, other=0.0)
    value = tl.where(live, value, 0.0)
    tl.store(p_out + start + o, value.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _apply_mask(p_dense, p_words, p_out, size, k, channels, taps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _apply_block(p_dense, p_words, p_out, start, o, all_of(BLOCK), k, channels, taps)
    else:
        _apply_block(p_dense, p_words, p_out, start, o, start + o < size, k, channels, taps)


def apply_mask(
    dense: torch.Tensor, words: torch.Tensor, out: torch.Tensor, channels: int, taps: int
) -> None:
    """``out = dense * mask``, +0 where dropped; both flat in the same memory order, of any two
    floating dtypes. ``taps``: 1 where memory order is canonical order."""
    if not out.numel():
        return
    grid = (triton.cdiv(out.numel(), _BLOCK),)
    _apply_mask[grid](
        dense, words, out, out.numel(), channels * taps, channels, taps, BLOCK=_BLOCK
    )  # fmt: skip


VARIANTS = [
    Variant(
        f"apply_mask {source} to {target}",
        _apply_mask,
        {
            "p_dense": f"*{source}",
            "p_words": "*i32",
            "p_out": f"*{target}",
            "size": "i64",
            **dict.fromkeys(("k", "channels", "taps"), "i32"),
        },
        {"BLOCK": _BLOCK},
        elements=_BLOCK,
        ceiling=90,  # counts all the ways: rows short or long, taps or none, inside or at the end
    )
    for source, target in (("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"))
]
