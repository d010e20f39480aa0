"""Convolution of a channels-last image with frozen +-sigma weights, decoded inside the kernel.

An implicit GEMM: pixels of the output times (taps, channels). For few pixels, where writing the
weights first and reading them again costs more than the product. A 1x1 convolution of stride 1 is
:mod:`ticket_linear` on the same memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ticket_linear import aligned, dot, signed, split, sum_splits, ticket_tile
from .tuning import Config, shipped, targets_of, tuned
from .variants import Variant

__all__ = ["VARIANTS", "ticket_conv2d"]


@triton.jit(do_not_specialize=["key", "high"])
def _ticket_conv2d(
    p_x, p_words, p_signs, p_bias, p_y, pixels, outputs, channels, inputs, row_units, height, width,
    out_height, out_width, taps_x, stride_y, stride_x, pad_y, pad_x, dilate_y, dilate_x, steps,
    key, high, scale,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, STORED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """Programs (pixel tile, output tile, split); a split is ``steps`` tiles of inputs long.

    ``channels`` is a multiple of 64, ``inputs`` = taps * channels: eight neighbouring inputs are
    one load of one tap.
    """
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    o_row = tl.program_id(1) * BO + tl.arange(0, BO)
    i_image = o_m // (out_height * out_width)
    i_y = (o_m // out_width) % out_height * stride_y - pad_y
    i_x = o_m % out_width * stride_x - pad_x
    p_image = p_x + ((i_image.to(tl.int64) * height + i_y) * width + i_x) * channels
    first = tl.program_id(2) * steps * BR
    o_col = first // 64 + tl.arange(0, BR // 64)[None, :]
    o_unit = o_row[:, None].to(tl.int64) * row_units + o_col
    acc = tl.zeros((BM, BO), tl.float32)
    for start in range(first, first + steps * BR, BR):
        o_r = (start + tl.arange(0, BR))[None, :]
        i_tap = o_r // channels
        o_y = i_tap // taps_x * dilate_y
        o_x = i_tap % taps_x * dilate_x
        o_in = (o_y * width + o_x) * channels + (o_r - i_tap * channels)
        o_in = tl.max_contiguous(tl.multiple_of(o_in, (1, 8)), (1, 8))
        m_y = (i_y + o_y >= 0) & (i_y + o_y < height)
        m_x = (i_x + o_x >= 0) & (i_x + o_x < width)
        m_in = tl.max_constancy((o_m < pixels) & (o_r < inputs) & m_y & m_x, (1, 8))
        x = tl.load(p_image + o_in, mask=m_in, other=0.0)
        m_unit = (o_row[:, None] < outputs) & (o_col < row_units)
        w = ticket_tile(
            p_words, p_signs, key, high, o_unit, m_unit, True, STORED, p_x.dtype.element_ty
        )
        acc = dot(x, tl.trans(w), acc)
        o_col += BR // 64
        o_unit += BR // 64
    m_o = o_row[None, :] < outputs
    value = acc * scale
    if BIASED:
        value += tl.load(p_bias + o_row[None, :], mask=m_o, other=0.0).to(tl.float32)
    p_out = p_y + tl.program_id(2).to(tl.int64) * pixels * outputs
    p_out += o_m.to(tl.int64) * outputs + o_row[None, :]
    tl.store(p_out, value.to(p_y.dtype.element_ty), mask=(o_m < pixels) & m_o)


def ticket_conv2d(
    x: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    sigma: float,
    key: int,
    high: int,
    config: Config | None = None,
) -> None:
    """``y[N, OH, OW, O]`` = convolution of ``x[N, H, W, C]``, C a multiple of 64, no groups.

    All contiguous, on one device, x, bias and y of one dtype (fp16, bf16, fp32); ``words`` and
    ``signs`` as in ticket_linear, W ``[O, kh*kw*C]``. Sums in fp32; the same bits every time.
    """
    if not y.numel():
        return
    (_, height, width, channels), (*batch, outputs) = x.shape, y.shape
    pixels, inputs = y.numel() // outputs, kernel_size[0] * kernel_size[1] * channels
    config = config or tuned("ticket_conv2d", pixels, x.device)
    tiles = triton.cdiv(pixels, config.BM), triton.cdiv(outputs, config.BO)
    steps, splits = split(triton.cdiv(inputs, config.BR), tiles[0] * tiles[1], config.programs)
    parts = y if splits == 1 else x.new_empty(splits, pixels, outputs, dtype=torch.float32)
    _ticket_conv2d[(*tiles, splits)](
        x, aligned(words), x if signs is None else aligned(signs), x if bias is None else bias,
        parts, pixels, outputs, channels, inputs, inputs // 64, height, width, *batch[1:],
        kernel_size[1], *stride, *padding, *dilation, steps, signed(key), signed(high), sigma / 2,
        BM=config.BM, BO=config.BO, BR=config.BR, STORED=signs is not None,
        BIASED=bias is not None and splits == 1,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, bias, y)


_SIZES = (
    *("pixels", "outputs", "channels", "inputs", "row_units", "height", "width", "out_height"),
    *("out_width", "taps_x", "stride_y", "stride_x", "pad_y", "pad_x", "dilate_y", "dilate_x"),
    "steps",
)
VARIANTS = [
    Variant(
        f"ticket_conv2d {config.name} {architecture}",
        _ticket_conv2d,
        {
            **dict.fromkeys(("p_x", "p_bias"), "*bf16"),
            **dict.fromkeys(("p_words", "p_signs"), "*i32"),
            **dict.fromkeys(_SIZES, "i32"),
            **dict.fromkeys(("key", "high"), "i32"),
            "p_y": "*fp32",
            "scale": "fp32",
        },
        {"BM": config.BM, "BO": config.BO, "BR": config.BR, "STORED": False, "BIASED": False},
        warps=config.warps,
        stages=config.stages,
        elements=config.BO * config.BR,
        ceiling=5.0,
        wgmma=True,
        aligned=("channels", "inputs", "outputs"),
        targets=targets_of(architecture),
    )
    for architecture, _, config in shipped("ticket_conv2d")
]
