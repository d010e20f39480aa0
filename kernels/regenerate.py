"""Random weights from their seed, dropped ones zeroed, in the layer's dtype and memory order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import normal_values, philox_words, sign_word, uniform_values
from .variants import Variant

__all__ = ["VARIANTS", "regenerate"]

_UNITS = 32  # 64-weight units a program makes


@triton.jit
def _unit_values(o_unit, m_unit, key, high, sigma, p_table, DIST: tl.constexpr):
    """fp32 ``[units, 64]`` of units ``o_unit``: 0 signed constant, 1 uniform, 2 normal."""
    if DIST == 0:
        o_bit = tl.arange(0, 64)
        first, second = philox_words(key, high, o_unit)
        word = tl.where(
            (o_bit < 32)[None, :], sign_word(first)[:, None], sign_word(second)[:, None]
        )
        sign = ((word >> (o_bit & 31)[None, :]) & 1) << 31
        bits = sign ^ tl.cast(sigma, tl.float32).to(tl.uint32, bitcast=True)
        return bits.to(tl.float32, bitcast=True)  # not -sigma: 0 - sigma in some versions
    o_call = o_unit.to(tl.uint32)[:, None] * 32 + tl.arange(0, 32)[None, :].to(tl.uint32)
    first, second = philox_words(key, high, o_call)
    words = tl.reshape(tl.join(first, second), (o_unit.shape[0], 64))
    if DIST == 1:
        return uniform_values(words, sigma)
    return normal_values(words, p_table, sigma, m_unit[:, None])


@triton.jit
def _write_units(
    p_out, p_words, p_table, i_block, units, row_units, k, channels, taps, sigma, key, high,
    DIST: tl.constexpr, MASKED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    o_unit = i_block * UNITS + tl.arange(0, UNITS)
    m_unit = o_unit < units
    value = _unit_values(o_unit, m_unit, key, high, sigma, p_table, DIST)
    o_bit = tl.arange(0, 64)
    i_row = o_unit // row_units
    o_k = ((o_unit - i_row * row_units) * 64)[:, None] + o_bit[None, :]
    m_value = m_unit[:, None] & (o_k < k)
    if MASKED:
        p_word = (p_words + o_unit.to(tl.int64) * 2)[:, None] + (o_bit >> 5)[None, :]
        word = tl.load(p_word, mask=m_value, other=0)
        value = tl.where(((word >> (o_bit & 31)[None, :]) & 1) != 0, value, 0.0)
    p_row = p_out + i_row.to(tl.int64) * k
    value = value.to(p_out.dtype.element_ty)
    if taps == 1:  # memory order is canonical order
        tl.store(p_row[:, None] + o_k, value, mask=m_value)
    else:
        i_tap = o_k // channels
        tl.store(p_row[:, None] + (o_k - i_tap * channels) * taps + i_tap, value, mask=m_value)


@triton.jit
def _regenerate(
    p_out, p_words, p_table, units, row_units, k, channels, taps, sigma, key, high,
    DIST: tl.constexpr, MASKED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    _write_units(
        p_out, p_words, p_table, tl.program_id(0), units, row_units, k, channels, taps, sigma,
        key, high, DIST, MASKED, UNITS,
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
    _regenerate[(triton.cdiv(units, _UNITS),)](
        out, out if words is None else words, out if table is None else table,
        units, row_units, k, channels, taps, sigma, key, high,
        DIST=dist, MASKED=words is not None, UNITS=_UNITS,
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
        f"regenerate {name} {dtype}",
        _regenerate,
        {"p_out": f"*{dtype}", **_TYPES},
        {"DIST": dist, "MASKED": True, "UNITS": _UNITS},
        elements=64 * _UNITS,
        ceiling=ceiling,
    )
    for dist, name, ceiling in ((0, "signed", 110), (1, "uniform", 100), (2, "normal", 100))
    for dtype in ("bf16", "fp32")
]
