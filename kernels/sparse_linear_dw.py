"""The gradient of compressed values of live blocks: ``grad^T @ x`` of those blocks alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import block_of, block_tile, dot
from .variants import Variant

__all__ = ["VARIANTS", "sparse_linear_dw"]


@triton.jit
def _block_dw(
    p_grad, p_x, p_list, p_values, m, rows, k, live, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_place = tl.program_id(0)
    p_column = p_list + rows // BLOCK + 1 + i_place
    i_column, i_row = tl.load(p_column), tl.load(p_column + live)
    o_n, o_m = tl.arange(0, BLOCK), tl.arange(0, BM)
    p_g = p_grad + o_m.to(tl.int64)[:, None] * rows + (i_row * BLOCK + o_n)[None, :]
    p_b = p_x + o_m.to(tl.int64)[:, None] * k + (i_column * BLOCK + o_n)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, m, BM):
        m_m = (start + o_m < m)[:, None]
        offset = tl.cast(start, tl.int64)
        grad = tl.load(p_g + offset * rows, mask=m_m, other=0.0)
        x = tl.load(p_b + offset * k, mask=m_m, other=0.0)
        acc = dot(tl.trans(grad), x, acc)
    p_tile, stride = block_tile(p_values, p_list, i_row, i_place, BLOCK)
    p_out = p_tile + o_n[:, None] * stride + o_n[None, :]
    tl.store(p_out, acc.to(p_values.dtype.element_ty))


def _samples(m: int, block: int, halves: bool) -> int:
    return 16 if m <= 16 else 64 if halves and block < 128 else 32


def _warps(block: int) -> int:
    return 8 if block == 128 else 4


def sparse_linear_dw(
    grad: torch.Tensor, x: torch.Tensor, pattern: torch.Tensor, values: torch.Tensor
) -> None:
    """``grad`` ``[M, O]``, ``x`` ``[M, K]``, ``values`` (written) of one dtype; ``pattern``: see
    blocks.py."""
    (m, rows), k = grad.shape, x.shape[1]
    if not values.numel():
        return
    block = block_of(pattern.numel(), rows, k, values.numel())
    live = values.numel() // block**2
    samples = _samples(m, block, x.element_size() == 2)
    _block_dw[(live,)](
        grad, x, pattern, values, m, rows, k, live, BLOCK=block, BM=samples, num_warps=_warps(block)
    )  # fmt: skip


VARIANTS = [
    Variant(
        f"sparse_linear_dw {block} {dtype} M={m}",
        _block_dw,
        {**dict.fromkeys(("p_grad", "p_x", "p_values"), f"*{dtype}"), "p_list": "*i32",
         **dict.fromkeys(("m", "rows", "k", "live"), "i32")},
        {"BLOCK": block, "BM": _samples(m, block, dtype != "fp32")},
        warps=_warps(block),
        aligned=("rows", "k"),
        wgmma=dtype != "fp32" and block >= 64,
    )
    for block in (128, 64, 32)
    for dtype, m in (("bf16", 4096), ("bf16", 16), ("fp32", 4096))
]  # fmt: skip
