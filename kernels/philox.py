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
    "tile_sign",
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
def tile_sign(word):
    """Inverse of :func:`sign_word`: a stored sign word as :func:`decode` takes it."""
    return interleave((word << 16) | (word >> 16))


@triton.jit
def population(word):
    """Ones in each int32 word."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _pairs(fields, shift: tl.constexpr):
    """Weights k and k + 1 in the halves of a word; 0x4000 is 2.0 in both half precisions."""
    return (fields << shift) & 0xC000C000


@triton.jit
def decode(mask, signs, dtype: tl.constexpr, transposed: tl.constexpr):
    """+-2 where the mask has a 1, else a zero, in float16 or bfloat16: scale by sigma/2 afterwards.

    ``mask`` and ``signs`` (interleaved) are ``[N, K/32]`` and make ``[N, K]``; ``transposed``:
    they are ``[K/32, N]`` and make ``[K, N]``. A thread owns whole words, so that nothing is
    hashed twice, and the joins cost no instruction: they run from the highest bit of k to the
    lowest, so that neighbours lie in one register and go to shared memory sixteen bytes at a time.
    """
    even = (mask & 0x55555555) | (signs & 0xAAAAAAAA)  # weights 0..15: (sign, mask) pairs
    odd = ((mask >> 1) & 0x55555555) | ((signs << 1) & 0xAAAAAAAA)  # weights 16..31
    both = tl.join(even, odd)
    low = tl.join(
        tl.join(_pairs(both, 14), _pairs(both, 6)), tl.join(_pairs(both, 10), _pairs(both, 2))
    )
    high = tl.join(
        tl.join(_pairs(both, 12), _pairs(both, 4)), tl.join(_pairs(both, 8), _pairs(both, 0))
    )
    tile = tl.join(low, high)  # [..., k bit 4, bit 3, bit 2, bit 1]
    tile = tl.join((tile & 0xFFFF).to(tl.uint16), (tile >> 16).to(tl.uint16))
    rows: tl.constexpr = mask.shape[0]
    columns: tl.constexpr = mask.shape[1]
    if transposed:
        tile = tl.reshape(tl.permute(tile, (0, 2, 3, 4, 5, 6, 1)), (rows * 32, columns))
    else:
        tile = tl.reshape(tile, (rows, columns * 32))
    # after the reshape: between it and a dot, it keeps Triton from rewriting the pair
    return tile.to(dtype, bitcast=True)


@triton.jit
def uniform_values(words, scale):
    """Words of a 32-bit stream as fp32 in (-scale, scale); scale = fp32(sqrt(3)*sigma)."""
    centred = ((words >> 8) * 2).to(tl.int32) + (1 - 16777216)
    return (centred.to(tl.float32) * _UNIFORM_STEP) * scale


@triton.jit
def normal_values(words, p_table, sigma, mask):
    """Words of a 32-bit stream as normal fp32; p_table: the contract's 65,536 quantiles."""
    return tl.load(p_table + (words >> 16), mask=mask, other=0.0) * sigma
