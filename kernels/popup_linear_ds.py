"""Score gradient of a layer of frozen weights, G*W*sign(s), in the epilogue of the product G."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ticket_linear import dot, signed, ticket_tile
from .tuning import Config, shipped, targets_of, tuned
from .variants import Variant

__all__ = ["VARIANTS", "popup_linear_ds"]


@triton.jit(do_not_specialize=["key", "high"])
def _popup_linear_ds(
    p_grad, p_x, p_scores, p_out, m, outputs, inputs, row_units, key, high, scale,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, ABS: tl.constexpr,
):  # fmt: skip
    """Programs (output tile, input tile); BM batch rows a step. Signs are made once, at the end."""
    i_o, i_r = tl.program_id(0), tl.program_id(1)
    o_m = tl.arange(0, BM)[:, None]
    o_o = i_o * BO + tl.arange(0, BO)
    o_r = (i_r * BR + tl.arange(0, BR))[None, :]
    p_g = p_grad + o_m.to(tl.int64) * outputs + o_o[None, :]
    p_b = p_x + o_m.to(tl.int64) * inputs + o_r
    acc = tl.zeros((BO, BR), tl.float32)
    for start in range(0, m, BM):
        grad = tl.load(p_g, mask=(o_m < m - start) & (o_o[None, :] < outputs), other=0.0)
        x = tl.load(p_b, mask=(o_m < m - start) & (o_r < inputs), other=0.0)
        acc = dot(tl.trans(grad), x, acc)
        p_g += BM * outputs
        p_b += BM * inputs
    o_row = o_o[:, None]
    o_unit = i_r * (BR // 64) + tl.arange(0, BR // 64)[None, :]
    m_unit = (o_row < outputs) & (o_unit < row_units)
    o_unit = o_row.to(tl.int64) * row_units + o_unit
    w = ticket_tile(p_x, p_x, key, high, o_unit, m_unit, False, False, tl.float16)
    value = acc * scale * w.to(tl.float32)
    m_out = (o_row < outputs) & (o_r < inputs)
    o_out = o_row.to(tl.int64) * inputs + o_r
    if ABS:
        score = tl.load(p_scores + o_out, mask=m_out, other=0.0).to(tl.float32)
        zero = score * 0.0  # NaN of a NaN
        value = value * tl.where(score > 0, 1.0, tl.where(score < 0, -1.0, zero))
    tl.store(p_out + o_out, value.to(p_out.dtype.element_ty), mask=m_out)


def popup_linear_ds(
    grad: torch.Tensor,
    x: torch.Tensor,
    scores: torch.Tensor,
    out: torch.Tensor,
    absolute: bool,
    sigma: float,
    key: int,
    high: int,
    config: Config | None = None,
) -> None:
    """``out[O, K] = (grad[m, O]^T @ x[m, K]) * W``, times the sign of the scores if ``absolute``.

    Dense: dropped edges too. All contiguous; grad and x of one dtype (fp16, bf16, fp32), scores and
    out of one. W ``[O, K]`` is +-sigma with the signs of key and high. Sums in fp32, in order.
    """
    if not out.numel():
        return
    config = config or tuned("popup_linear_ds", x.shape[0], x.device)
    outputs, inputs = out.shape
    grid = triton.cdiv(outputs, config.BO), triton.cdiv(inputs, config.BR)
    _popup_linear_ds[grid](
        grad, x, scores, out, x.shape[0], outputs, inputs, triton.cdiv(inputs, 64),
        signed(key), signed(high), sigma / 2,
        BM=config.BM, BO=config.BO, BR=config.BR, ABS=absolute,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


VARIANTS = [
    Variant(
        f"popup_linear_ds {config.name} {architecture}",
        _popup_linear_ds,
        {
            **dict.fromkeys(("p_grad", "p_x"), "*bf16"),
            **dict.fromkeys(("p_scores", "p_out"), "*fp32"),
            **dict.fromkeys(("m", "outputs", "inputs", "row_units"), "i32"),
            **dict.fromkeys(("key", "high"), "i32"),
            "scale": "fp32",
        },
        {"BM": config.BM, "BO": config.BO, "BR": config.BR, "ABS": True},
        warps=config.warps,
        stages=config.stages,
        wgmma=True,
        aligned=("inputs", "outputs"),
        targets=targets_of(architecture),
    )
    for architecture, _, config in shipped("popup_linear_ds")
]
