"""``gx = grad @ W`` for compressed W of live blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import block_of, block_sizes, block_tile, block_variants, dot

__all__ = ["VARIANTS", "sparse_linear_dx"]


@triton.jit
def _block_dx(
    p_grad, p_values, p_list, p_out, m, rows, k, live,
    BLOCK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_column = tl.program_id(1)
    p_starts = p_list + rows // BLOCK + 1 + 2 * live
    first, end = tl.load(p_starts + i_column), tl.load(p_starts + i_column + 1)
    p_rows = p_starts + k // BLOCK + 1 + first
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = (o_m < m)[:, None]
    o_n, o_k = tl.arange(0, BLOCK), tl.arange(0, BK)
    acc = tl.zeros((BM, BLOCK), tl.float32)
    STEPS: tl.constexpr = BLOCK // BK
    for i in range((end - first) * STEPS):
        i_row = tl.load(p_rows + i // STEPS)
        p_tile, stride = block_tile(p_values, p_list, i_row, tl.load(p_rows + live + i // STEPS),
                                    BLOCK)  # fmt: skip
        o_row = i % STEPS * BK + o_k
        grad = tl.load(
            p_grad + o_m[:, None] * rows + (i_row * BLOCK + o_row)[None, :], mask=m_m, other=0.0
        )
        w = tl.load(p_tile + o_row[:, None] * stride + o_n[None, :])
        acc = dot(grad, w, acc)
    p_gx = p_out + o_m[:, None] * k + (i_column * BLOCK + o_n)[None, :]
    tl.store(p_gx, acc.to(p_out.dtype.element_ty), mask=m_m)


def sparse_linear_dx(
    grad: torch.Tensor, values: torch.Tensor, pattern: torch.Tensor, out: torch.Tensor
) -> None:
    """``grad`` ``[M, O]``, ``out`` ``[M, K]``, ``values`` of one dtype; ``pattern``: blocks.py."""
    (m, rows), k = grad.shape, out.shape[1]
    if not out.numel():
        return
    block = block_of(pattern.numel(), rows, k, values.numel())
    sizes = block_sizes("sparse_linear", block, m, grad.dtype, grad.device)
    _block_dx[(triton.cdiv(m, sizes.blocks["BM"]), k // block)](
        grad, values, pattern, out, m, rows, k, values.numel() // block**2,
        BLOCK=block, **sizes.blocks, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


VARIANTS = block_variants(
    "sparse_linear_dx",
    _block_dx,
    ("p_grad", "p_values", "p_out"),
    ("m", "rows", "k", "live"),
    lambda block, m: m > 16,
    listed="sparse_linear",
)
