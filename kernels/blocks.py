"""Lists of live blocks, as the sparse_linear kernels read them.

A mask ``[O, K]`` of whole ``b x b`` blocks has O/b block rows and K/b block columns. Its list is
one int32 tensor of sections: for each block row how many blocks lie before it (O/b + 1 numbers),
the block column and the block row of every block, row after row; then for each block column how
many lie before it (K/b + 1), and of every block, column after column, its block row and its place
in the first order. Values are those of ``sparse_linear``, row after row of ``[O, K]``: the rows of
a block lie as far apart as its block row has live columns, so that a block is a strided tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .tuning import Sizes, shipped, targets_of, tuned
from .variants import Variant

__all__ = ["BLOCKS", "block_of", "block_sizes", "block_tile", "block_variants", "dot"]

BLOCKS = (128, 64, 32)


def block_of(size: int, rows: int, k: int, kept: int) -> int:
    """The block size that a list of ``size`` numbers was made for."""
    for block in BLOCKS:
        if size == rows // block + k // block + 2 + 4 * (kept // block**2):
            return block
    raise ValueError(f"a list of {size} numbers is none of the blocks of [{rows}, {k}]")


def block_sizes(op: str, block: int, m: int, dtype: torch.dtype, device: torch.device) -> Sizes:
    """The configuration of ``op`` for blocks of this size and ``m`` samples."""
    return tuned(f"{op} {block}{' fp32' if dtype == torch.float32 else ''}", m, device)


def block_variants(
    op: str,
    kernel: Any,
    pointers: tuple[str, ...],
    integers: tuple[str, ...],
    wgmma: Callable[[int, int], bool],
    listed: str = "",
    **constants: Any,
) -> list[Variant]:
    """``kernel`` in every configuration of ``listed`` (default: ``op``). ``wgmma``: for which block
    size and samples of a tile it is meant to use the tensor cores of Hopper."""
    ways = [f"{listed or op} {block}{kind}" for block in BLOCKS for kind in ("", " fp32")]
    made = []
    for architecture, way, sizes in shipped(*ways):
        _, block, *fp32 = way.split(" ")
        dtype = "*fp32" if fp32 else "*bf16"
        made.append(
            Variant(
                f"{op} {' '.join([block, *fp32])} {sizes.name} {architecture}",
                kernel,
                {
                    **dict.fromkeys(pointers, dtype),
                    "p_list": "*i32",
                    **dict.fromkeys(integers, "i32"),
                },
                {"BLOCK": int(block), **sizes.blocks, **constants},
                warps=sizes.warps,
                stages=sizes.stages,
                aligned=("rows", "k"),
                wgmma=not fp32 and wgmma(int(block), sizes.blocks["BM"]),
                targets=targets_of(architecture),
            )
        )
    return made


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
