"""Integers of the random-number contract and the decode recipe, as helpers for other kernels.

All words are uint32. "Interleaved" is the order in which weight k of a 32-weight word sits at bit
``16*(k & 1) + 2*((k >> 1) & 7) + ((k >> 4) & 1)``: then two weights are one shift and one AND.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "decode",
    "interleave",
    "normal_values",
    "philox_words",
    "population",
    "sign_word",
    "uniform_values",
]

_MULTIPLIER = tl.constexpr(0xD256D193)
_WEYL = tl.constexpr(0x9E3779B9)
_ROUNDS = tl.constexpr(7)
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit
def philox_words(key, high, low):
    """Philox-2x32-7 of counters ``(low, high)``: two words shaped like ``low``. The words of a
    unit's sign stream are its sign words in interleaved order: word 0 serves k < 32."""
    multiplier = tl.full([], _MULTIPLIER, tl.uint32)
    weyl = tl.full([], _WEYL, tl.uint32)
    bump = tl.cast(key, tl.uint32)  # scalars of 2**31 and more arrive as 64-bit integers
    c0 = tl.cast(low, tl.uint32)
    c1 = tl.cast(high, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        hi = tl.umulhi(c0, multiplier)
        lo = c0 * multiplier
        c0 = hi ^ bump ^ c1
        c1 = lo
        bump = bump + weyl
    return c0, c1


@triton.jit
def interleave(word):
    """Between plain (LSB-first) and interleaved order; its own inverse."""
    t = ((word >> 15) ^ word) & 0xAAAA
    return word ^ (t ^ (t << 15))


@triton.jit
def sign_word(word):
    """A Philox word as a sign word in plain order (bit k of it is the sign of weight k)."""
    word = interleave(word)
    return (word << 16) | (word >> 16)


@triton.jit
def population(word):
    """Ones in each int32 word."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _pair(fields, shift: tl.constexpr, dtype: tl.constexpr):
    """Weights 2f and 2f+1 of every word: ``[..., 2]``, 0x4000 being 2.0 in both half precisions."""
    both = (fields << shift) & 0xC000C000
    low = (both & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _sixteen(fields, dtype: tl.constexpr):
    """The sixteen weights of a word's fields: ``[..., 2 (half), 2 (f0), 2 (f1), 2 (f2)]``."""
    f0 = tl.join(_pair(fields, 14, dtype), _pair(fields, 12, dtype))
    f1 = tl.join(_pair(fields, 10, dtype), _pair(fields, 8, dtype))
    f2 = tl.join(_pair(fields, 6, dtype), _pair(fields, 4, dtype))
    f3 = tl.join(_pair(fields, 2, dtype), _pair(fields, 0, dtype))
    return tl.join(tl.join(f0, f1), tl.join(f2, f3))


@triton.jit
def decode(mask, signs, dtype: tl.constexpr, transposed: tl.constexpr):
    """+-2 where the mask has a 1, else a zero, in float16 or bfloat16: scale by sigma/2 afterwards.

    ``mask`` and ``signs`` (interleaved) are ``[N, K/32]`` and make ``[N, K]``; ``transposed``:
    they are ``[K/32, N]`` and make ``[K, N]``. A thread owns whole words, so that nothing is
    hashed twice, and the joins cost no instruction.
    """
    even = (mask & 0x55555555) | (signs & 0xAAAAAAAA)  # weights 0..15: (sign, mask) pairs
    odd = ((mask >> 1) & 0x55555555) | ((signs << 1) & 0xAAAAAAAA)  # weights 16..31
    tile = tl.join(_sixteen(even, dtype), _sixteen(odd, dtype))
    rows: tl.constexpr = mask.shape[0]
    columns: tl.constexpr = mask.shape[1]
    if transposed:
        return tl.reshape(tl.permute(tile, (0, 6, 5, 4, 3, 2, 1)), (rows * 32, columns))
    return tl.reshape(tl.permute(tile, (0, 1, 6, 5, 4, 3, 2)), (rows, columns * 32))


@triton.jit
def uniform_values(words, scale):
    """Words of a 32-bit stream as fp32 in (-scale, scale); scale = fp32(sqrt(3)*sigma)."""
    centred = ((words >> 8) * 2).to(tl.int32) + (1 - 16777216)
    return (centred.to(tl.float32) * _UNIFORM_STEP) * scale


@triton.jit
def normal_values(words, p_table, sigma, mask):
    """Words of a 32-bit stream as normal fp32; p_table: the contract's 65,536 quantiles."""
    return tl.load(p_table + (words >> 16), mask=mask, other=0.0) * sigma
