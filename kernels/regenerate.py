"""Random weights from their seed, dropped ones zeroed, in the layer's dtype and memory order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import decode, interleave, normal_values, philox_words, uniform_values
from .variants import Variant

__all__ = ["FEW", "MANY", "SIGNED", "VARIANTS", "regenerate", "write_units"]

SIGNED = tl.constexpr(0)
FEW, MANY = 32, 128  # 64-weight units a program makes; MANY: a thread opens one of its own


@triton.jit
def _signed_units(
    o_unit, m_unit, p_words, key, high, sigma, dtype: tl.constexpr, MASKED: tl.constexpr
):
    """``[units, 64]`` of +-sigma and 0: every thread hashes and opens units of its own."""
    first, second = philox_words(key, high, o_unit)
    signs = tl.join(first, second)
    if MASKED:
        p_word = p_words + (o_unit.to(tl.int64) * 2)[:, None] + tl.arange(0, 2)[None, :]
        word = tl.load(p_word, mask=m_unit[:, None], other=0).to(tl.uint32, bitcast=True)
        mask = interleave(word)
    else:
        mask = tl.full(signs.shape, 0xFFFFFFFF, tl.uint32)
    fields = decode(mask, signs, tl.float16, False).to(tl.int16, bitcast=True)
    sign, kept = fields & -32768, (fields & 16384) != 0
    sigma = tl.cast(sigma, tl.float32)
    if dtype == tl.float32:
        bits = sigma.to(tl.int32, bitcast=True) ^ (sign.to(tl.int32) << 16)
        value = tl.where(kept, bits, 0).to(tl.float32, bitcast=True)
    else:
        bits = sigma.to(dtype).to(tl.int16, bitcast=True) ^ sign
        value = tl.where(kept, bits, 0).to(tl.int16).to(dtype, bitcast=True)
    return value


@triton.jit
def _drawn_units(
    o_unit, m_unit, p_words, p_table, key, high, sigma, dtype: tl.constexpr,
    DIST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``[units, 64]`` of uniform (1) or normal (2) values, dropped ones 0."""
    o_call = o_unit.to(tl.uint32)[:, None] * 32 + tl.arange(0, 32)[None, :].to(tl.uint32)
    first, second = philox_words(key, high, o_call)
    drawn = tl.reshape(tl.join(first, second), (o_unit.shape[0], 64))
    if DIST == 1:
        value = uniform_values(drawn, sigma)
    else:
        value = normal_values(drawn, p_table, sigma, m_unit[:, None])
    if MASKED:
        o_bit = tl.arange(0, 64)
        p_word = (p_words + o_unit.to(tl.int64) * 2)[:, None] + (o_bit >> 5)[None, :]
        word = tl.load(p_word, mask=m_unit[:, None], other=0)
        value = tl.where(((word >> (o_bit & 31)[None, :]) & 1) != 0, value, 0.0)
    return value.to(dtype)


@triton.jit
def write_units(
    p_out, p_words, p_table, i_block, units, row_units, k, channels, taps, sigma, key, high,
    DIST: tl.constexpr, MASKED: tl.constexpr, UNITS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Block ``i_block`` of UNITS units of one tensor. DENSE: memory order is that of the units."""
    o_unit = i_block * UNITS + tl.arange(0, UNITS)
    m_unit = o_unit < units
    dtype: tl.constexpr = p_out.dtype.element_ty
    if DIST == SIGNED:
        value = _signed_units(o_unit, m_unit, p_words, key, high, sigma, dtype, MASKED)
    else:
        value = _drawn_units(
            o_unit, m_unit, p_words, p_table, key, high, sigma, dtype, DIST, MASKED
        )
    o_bit = tl.arange(0, 64)
    if DENSE:  # units follow each other in memory
        p_block = p_out + i_block.to(tl.int64) * (UNITS * 64)
        o_value = (tl.arange(0, UNITS) * 64)[:, None] + o_bit[None, :]
        tl.store(p_block + o_value, value, mask=m_unit[:, None])
    else:
        i_row = o_unit // row_units
        o_k = ((o_unit - i_row * row_units) * 64)[:, None] + o_bit[None, :]
        i_tap = o_k // channels
        o_memory = tl.where(taps == 1, o_k, (o_k - i_tap * channels) * taps + i_tap)
        p_row = p_out + i_row.to(tl.int64) * k
        tl.store(p_row[:, None] + o_memory, value, mask=m_unit[:, None] & (o_k < k))


@triton.jit
def _regenerate(
    p_out, p_words, p_table, units, row_units, k, channels, taps, sigma, key, high,
    DIST: tl.constexpr, MASKED: tl.constexpr, UNITS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    write_units(
        p_out, p_words, p_table, tl.program_id(0), units, row_units, k, channels, taps, sigma,
        key, high, DIST, MASKED, UNITS, DENSE,
    )  # fmt: skip


def regenerate(
    out: torch.Tensor,
    words: torch.Tensor | None,
    table: torch.Tensor | None,
    rows: int,
    channels: int,
    taps: int,
    dist: int,
    sigma: float,
    key: int,
    high: int,
) -> None:
    """Fill ``out`` (fp32, bf16 or fp16, ``rows * channels * taps`` in memory order).

    ``words``: packed mask or None. ``table``: the normal quantiles for ``dist`` 2. ``taps`` is 1
    where memory order is canonical order. ``sigma``: half-width for ``dist`` 1 (uniform).
    """
    k = channels * taps
    row_units = triton.cdiv(k, 64)
    units = rows * row_units
    if not units:
        return
    dense = k % 64 == 0 and taps == 1
    size = MANY if dense and dist == 0 else FEW
    _regenerate[(triton.cdiv(units, size),)](
        out, out if words is None else words, out if table is None else table,
        units, row_units, k, channels, taps, sigma, key, high,
        DIST=dist, MASKED=words is not None, UNITS=size, DENSE=dense,
    )  # fmt: skip


_TYPES = {
    "p_words": "*i32",
    "p_table": "*fp32",
    "sigma": "fp32",
    "key": "i64",
    "high": "i64",
    **dict.fromkeys(("units", "row_units", "k", "channels", "taps"), "i32"),
}
VARIANTS = [
    Variant(
        f"regenerate {name} {dtype}{'' if dense else ' ragged'}",
        _regenerate,
        {"p_out": f"*{dtype}", **_TYPES},
        {"DIST": dist, "MASKED": True, "UNITS": units, "DENSE": dense},
        elements=64 * units,
        ceiling=ceiling,
    )
    for dist, name, dense, units, ceiling in (
        *((0, "signed", True, MANY, 10), (0, "signed", False, FEW, 80)),
        *((1, "uniform", True, FEW, 34), (2, "normal", True, FEW, 34)),
    )
    for dtype in ("bf16", "fp32")
]
