"""``y = x @ W^T + bias`` for compressed W: over live blocks, or, for few samples, live weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import block_of, block_sizes, block_variants, dot
from .tuning import shipped, targets_of, tuned
from .variants import Variant

__all__ = ["VARIANTS", "sparse_linear"]


@triton.jit
def _block_forward(
    p_x, p_values, p_list, p_bias, p_y, m, rows, k,
    BLOCK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(1)
    first, end = tl.load(p_list + i_row), tl.load(p_list + i_row + 1)
    p_columns = p_list + rows // BLOCK + 1 + first
    p_tile = p_values + first.to(tl.int64) * (BLOCK * BLOCK)
    stride = (end - first) * BLOCK
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = (o_m < m)[:, None]
    o_n, o_k = tl.arange(0, BLOCK), tl.arange(0, BK)
    acc = tl.zeros((BM, BLOCK), tl.float32)
    STEPS: tl.constexpr = BLOCK // BK
    for i in range((end - first) * STEPS):
        column = tl.load(p_columns + i // STEPS) * BLOCK + i % STEPS * BK
        x = tl.load(p_x + o_m[:, None] * k + (column + o_k)[None, :], mask=m_m, other=0.0)
        w = tl.load(p_tile + o_n[:, None] * stride + (i * BK + o_k)[None, :])
        acc = dot(x, tl.trans(w), acc)
    o_y = i_row * BLOCK + o_n
    if BIAS:
        acc += tl.load(p_bias + o_y).to(tl.float32)[None, :]
    p_out = p_y + o_m[:, None] * rows + o_y[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_m)


@triton.jit
def _list_forward(
    p_x, p_values, p_list, p_bias, p_y, m, rows, k,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    first = tl.load(p_list + o_row, mask=m_row, other=0)
    end = tl.load(p_list + o_row + 1, mask=m_row, other=0)
    o_sample = tl.arange(0, SAMPLES)[:, None, None]
    p_sample = p_x + o_sample.to(tl.int64) * k
    acc = tl.zeros((SAMPLES, ROWS, CHUNK), tl.float32)
    for start in range(0, tl.max(end - first), CHUNK):
        o = first[:, None] + start + tl.arange(0, CHUNK)[None, :]
        m_live = o < end[:, None]
        column = tl.load(p_list + rows + 1 + o, mask=m_live, other=0)
        value = tl.load(p_values + o, mask=m_live, other=0.0).to(tl.float32)
        m_x = (o_sample < m) & m_live[None, :, :]
        x = tl.load(p_sample + column[None, :, :], mask=m_x, other=0.0).to(tl.float32)
        acc += x * value[None, :, :]
    y = tl.sum(acc, 2)
    if BIAS:
        y += tl.load(p_bias + o_row, mask=m_row, other=0.0).to(tl.float32)[None, :]
    o_sample = tl.arange(0, SAMPLES)[:, None]
    p_out = p_y + o_sample.to(tl.int64) * rows + o_row[None, :]
    tl.store(p_out, y.to(p_y.dtype.element_ty), mask=(o_sample < m) & m_row[None, :])


def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """``x`` ``[M, K]``, ``y`` ``[M, O]``, ``values`` and ``bias`` of one dtype (fp32, bf16, fp16).
    ``pattern``: ``[1, n]`` as in blocks.py, for any M, or, for M <= 4, ``[n]`` as the reference of
    sparse_pattern gives it."""
    (m, k), rows = x.shape, y.shape[1]
    if not y.numel():
        return
    args = (x, values, pattern, x if bias is None else bias, y, m, rows, k)
    if pattern.ndim == 1:
        sizes = tuned("sparse_linear list", m, x.device)
        _list_forward[(triton.cdiv(rows, sizes.blocks["ROWS"]),)](
            *args, SAMPLES=triton.next_power_of_2(m), **sizes.blocks, BIAS=bias is not None,
            num_warps=sizes.warps,
        )  # fmt: skip
        return
    block = block_of(pattern.numel(), rows, k, values.numel())
    sizes = block_sizes("sparse_linear", block, m, x.dtype, x.device)
    _block_forward[(triton.cdiv(m, sizes.blocks["BM"]), rows // block)](
        *args, BLOCK=block, **sizes.blocks, BIAS=bias is not None,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


_POINTERS, _SIZES = ("p_x", "p_values", "p_bias", "p_y"), ("m", "rows", "k")
VARIANTS = [
    *block_variants(
        "sparse_linear", _block_forward, _POINTERS, _SIZES, lambda block, m: m > 16, BIAS=True
    ),
    *(
        Variant(
            f"sparse_linear list {dtype} M={m} {architecture}",
            _list_forward,
            {
                **dict.fromkeys(_POINTERS, f"*{dtype}"),
                "p_list": "*i32",
                **dict.fromkeys(_SIZES, "i32"),
            },
            {"SAMPLES": m, **sizes.blocks, "BIAS": True},
            warps=sizes.warps,
            unit="live weight",
            elements=sizes.blocks["ROWS"] * sizes.blocks["CHUNK"],
            ceiling=ceiling,
            targets=targets_of(architecture),
        )
        for architecture, _, sizes in shipped("sparse_linear list")
        for dtype, m, ceiling in (("bf16", 1, 25), ("bf16", 4, 60), ("fp32", 1, 20))
    ),
]
