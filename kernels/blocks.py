"""Lists of live blocks, as the sparse_linear kernels read them.

A mask ``[O, K]`` of whole ``b x b`` blocks has O/b block rows and K/b block columns. Its list is
one int32 tensor of sections: for each block row how many blocks lie before it (O/b + 1 numbers),
the block column and the block row of every block, row after row; then for each block column how
many lie before it (K/b + 1), and of every block, column after column, its block row and its place
in the first order. Values are those of ``sparse_linear``, row after row of ``[O, K]``: the rows of
a block lie as far apart as its block row has live columns, so that a block is a strided tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCKS", "block_of", "block_tile", "dot", "tiles_of", "warps_of"]

BLOCKS = (128, 64, 32)


def block_of(size: int, rows: int, k: int, kept: int) -> int:
    """The block size that a list of ``size`` numbers was made for."""
    for block in BLOCKS:
        if size == rows // block + k // block + 2 + 4 * (kept // block**2):
            return block
    raise ValueError(f"a list of {size} numbers is none of the blocks of [{rows}, {k}]")


def tiles_of(block: int, m: int, halves: bool) -> dict[str, int]:
    """Samples and columns of a tile: 128 x 64 of 2 bytes feed the tensor cores of Hopper."""
    samples = 16 if m <= 16 else 64 if m <= 64 or not halves else 128
    return {"BM": samples, "BK": min(block, 64 if halves else 32)}


def warps_of(block: int, m: int) -> int:
    return 8 if block == 128 and m > 16 else 4


@triton.jit
def block_tile(p_values, p_list, i_row, i_place, BLOCK: tl.constexpr):
    """Where the values of block number ``i_place``, of block row ``i_row``, begin, and how far its
    rows are apart."""
    first, end = tl.load(p_list + i_row), tl.load(p_list + i_row + 1)
    p_tile = p_values + first.to(tl.int64) * (BLOCK * BLOCK) + (i_place - first) * BLOCK
    return p_tile, (end - first) * BLOCK


@triton.jit
def dot(a, b, acc):
    """fp32 operands are multiplied as such, not cut to fewer bits."""
    return tl.dot(a, b, acc, input_precision="ieee")
