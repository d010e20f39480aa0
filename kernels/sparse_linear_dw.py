"""The gradient of compressed values of live blocks: ``grad^T @ x`` of those blocks alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import block_of, block_sizes, block_tile, block_variants, dot

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
    sizes = block_sizes("sparse_linear_dw", block, m, x.dtype, x.device)
    _block_dw[(live,)](
        grad, x, pattern, values, m, rows, k, live, BLOCK=block, **sizes.blocks,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


VARIANTS = block_variants(
    "sparse_linear_dw",
    _block_dw,
    ("p_grad", "p_x", "p_values"),
    ("m", "rows", "k", "live"),
    lambda block, m: block >= 64,
)
