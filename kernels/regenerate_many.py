"""Masked frozen weights of many layers from their seeds and mask bits, in one launch."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from .regenerate import FEW, MANY, SIGNED, write_units
from .table import aligned, device_table
from .variants import Variant

__all__ = ["VARIANTS", "regenerate_many"]


@triton.jit
def _regenerate_many(
    p_layers, layers, LANES: tl.constexpr, DTYPE: tl.constexpr,
    UNITS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Masked signed constants of many layers; rows of p_layers are columns of the launcher."""
    i_block = tl.program_id(0)
    o = tl.arange(0, LANES)
    first = tl.load(p_layers + 5 * layers + o, mask=o < layers, other=2**62)
    i_layer = tl.sum((first <= i_block).to(tl.int32)) - 1
    i_block = i_block - tl.load(p_layers + 5 * layers + i_layer).to(tl.int32)
    p_out = tl.load(p_layers + i_layer).to(tl.pointer_type(DTYPE))
    p_words = tl.load(p_layers + layers + i_layer).to(tl.pointer_type(tl.int32))
    p_out, p_words = tl.multiple_of(p_out, 16), tl.multiple_of(p_words, 16)
    size = tl.load(p_layers + 2 * layers + i_layer)
    layout = tl.load(p_layers + 3 * layers + i_layer)
    seed = tl.load(p_layers + 4 * layers + i_layer)
    sigma = tl.load(p_layers + 6 * layers + i_layer).to(tl.int32).to(tl.float32, bitcast=True)
    rows, k = (size >> 32).to(tl.int32), size.to(tl.int32)
    channels, taps = (layout >> 32).to(tl.int32), layout.to(tl.int32)
    row_units = (k + 63) // 64
    key, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    if k == row_units * 64 and taps == 1:
        write_units(
            p_out, p_words, p_out, i_block, rows * row_units, row_units, k, channels, taps,
            sigma, key, high, SIGNED, True, UNITS, True,
        )  # fmt: skip
    else:
        for i in range(UNITS // FEW):
            write_units(
                p_out, p_words, p_out, i_block * (UNITS // FEW) + i, rows * row_units, row_units,
                k, channels, taps, sigma, key, high, SIGNED, True, FEW, False,
            )  # fmt: skip


def regenerate_many(
    outs: list[torch.Tensor],
    words: list[torch.Tensor],
    layouts: list[tuple[int, int, int]],
    sigmas: list[float],
    seeds: list[tuple[int, int]],
) -> None:
    """Fill every layer's tensor (one 16-bit dtype or fp32) with its masked signed constants.

    ``layouts``: (rows, channels, taps) as in regenerate; ``seeds``: (key, high). Every
    ``out`` starts at a multiple of 16 bytes, as whole allocations do.
    """
    words = [aligned(w) for w in words]
    given = [
        entry for entry in zip(outs, words, layouts, sigmas, seeds, strict=True) if entry[0].numel()
    ]
    if not given:
        return
    blocks = [triton.cdiv(rows * triton.cdiv(c * s, 64), MANY) for _, _, (rows, c, s), *_ in given]
    columns = [
        [out.data_ptr() for out, *_ in given],
        [w.data_ptr() for _, w, *_ in given],
        [rows << 32 | c * s for _, _, (rows, c, s), *_ in given],
        [c << 32 | s for _, _, (rows, c, s), *_ in given],
        [_signed(high << 32 | key) for *_, (key, high) in given],
        [sum(blocks[:i]) for i in range(len(blocks))],
        [struct.unpack("<i", struct.pack("<f", sigma))[0] for *_, sigma, _ in given],
    ]
    table = device_table([value for column in columns for value in column], outs[0].device)
    _regenerate_many[(sum(blocks),)](
        table, layers=len(given), LANES=triton.next_power_of_2(len(given)),
        DTYPE=_DTYPES[given[0][0].dtype], UNITS=MANY, FEW=FEW,
    )  # fmt: skip


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
VARIANTS = [
    Variant(
        f"regenerate_many {dtype}",
        _regenerate_many,
        {"p_layers": "*i64", "layers": "i32"},
        {"LANES": 64, "DTYPE": dtype, "UNITS": MANY, "FEW": FEW},
    )
    for dtype in (tl.bfloat16, tl.float32)
]
