"""Products with frozen +-sigma weights, decoded from mask bits and a seed inside the kernel.

``ticket_linear`` is x @ W^T and, ``transposed``, x @ W. Weights are 0 and +-2 in the kernel; the
epilogue multiplies by sigma/2. Many batch rows: ``_gemm``, whose decoded weights are the second
operand. Few: ``_skinny``, whose weights are the first one, for the tensor cores want 64 rows of
that; programs share the sum over the inputs and ``_sum_splits`` adds their parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import decode, interleave, philox_words, tile_sign
from .tuning import Config, shipped, targets_of, tuned
from .variants import Variant

__all__ = [
    "VARIANTS",
    "aligned",
    "dot",
    "signed",
    "split",
    "sum_splits",
    "ticket_config",
    "ticket_linear",
    "ticket_tile",
    "unit_words",
]

_SUM_BLOCK = 1024


@triton.jit
def unit_words(p_words, o_unit, m_unit):
    """Words of 64-weight units ``[R, U]`` as uint32 ``[R, 2*U]``, one 64-bit load a unit."""
    b_unit = tl.load(p_words.to(tl.pointer_type(tl.uint64)) + o_unit, mask=m_unit, other=0)
    pair = tl.join(b_unit.to(tl.uint32), (b_unit >> 32).to(tl.uint32))
    return tl.reshape(pair, (o_unit.shape[0], 2 * o_unit.shape[1]))


@triton.jit
def ticket_tile(
    p_words, p_signs, key, high, o_unit, m_unit,
    MASKED: tl.constexpr, STORED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Weights ``[R, 64*U]`` of units ``o_unit[R, U]``: +-2, and 0 where the mask drops them."""
    if STORED:
        signs = tile_sign(unit_words(p_signs, o_unit, m_unit))
    else:
        first, second = philox_words(key, high, o_unit)
        signs = tl.reshape(tl.join(first, second), (o_unit.shape[0], 2 * o_unit.shape[1]))
    if MASKED:
        mask = interleave(unit_words(p_words, o_unit, m_unit))
    else:
        mask = tl.full(signs.shape, 0xFFFFFFFF, tl.uint32)
    if dtype == tl.float32:
        return decode(mask, signs, tl.float16, False).to(tl.float32)
    else:
        return decode(mask, signs, dtype, False)


@triton.jit
def dot(a, b, acc):
    if a.dtype == tl.float32:  # the tensor cores would round it to 11 bits
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _place(i_tile, n_m, n_o, GROUP: tl.constexpr):
    """Batch and output tile of a program: groups of batch tiles share the weights in L2."""
    width = GROUP * n_o
    first = i_tile // width * GROUP
    size = min(n_m - first, GROUP)
    i_m = first + (i_tile % width) % size
    return i_m, (i_tile % width) // size


@triton.jit
def _units(i_o, first, BO: tl.constexpr, BR: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows ``[R, 1]`` and units of a row ``[1, U]`` of W that a tile from input ``first`` takes."""
    if TRANSPOSED:
        o_row = first + tl.arange(0, BR)
        o_col = i_o * (BO // 64) + tl.arange(0, BO // 64)
    else:
        o_row = i_o * BO + tl.arange(0, BO)
        o_col = first // 64 + tl.arange(0, BR // 64)
    return o_row[:, None], o_col[None, :]


@triton.jit
def _epilogue(p_y, p_bias, acc, o_m, o_o, m, outputs, scale, BIASED: tl.constexpr):
    """``o_m``, ``o_o``: ``[BM, 1]`` and ``[1, BO]``, or transposed as ``acc`` is."""
    m_o = o_o < outputs
    value = acc * scale
    if BIASED:
        value += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)
    tl.store(
        p_y + o_m.to(tl.int64) * outputs + o_o, value.to(p_y.dtype.element_ty), mask=(o_m < m) & m_o
    )


@triton.jit(do_not_specialize=["key", "high"])
def _gemm(
    p_x, p_words, p_signs, p_bias, p_y, m, outputs, inputs, rows, row_units, key, high, scale,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, STORED: tl.constexpr, BIASED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``rows``, ``row_units``: of W. EVEN: ``inputs`` is a multiple of BR."""
    i_m, i_o = _place(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(outputs, BO), GROUP)
    o_m = (i_m * BM + tl.arange(0, BM))[:, None]
    o_o = (i_o * BO + tl.arange(0, BO))[None, :]
    o_r = tl.arange(0, BR)[None, :]
    o_row, o_col = _units(i_o, 0, BO, BR, TRANSPOSED)
    o_unit = o_row.to(tl.int64) * row_units + o_col
    p_a = p_x + o_m.to(tl.int64) * inputs + o_r
    acc = tl.zeros((BM, BO), tl.float32)
    for start in range(0, inputs, BR):
        if EVEN:
            m_x = o_m < m
            m_unit = (o_row < rows) & (o_col < row_units)
        elif TRANSPOSED:
            m_x = (o_m < m) & (o_r < inputs - start)
            m_unit = (o_row < rows - start) & (o_col < row_units)
        else:
            m_x = (o_m < m) & (o_r < inputs - start)
            m_unit = (o_row < rows) & (o_col < row_units - start // 64)
        x = tl.load(p_a, mask=m_x, other=0.0)
        w = ticket_tile(
            p_words, p_signs, key, high, o_unit, m_unit, MASKED, STORED, p_x.dtype.element_ty
        )
        acc = dot(x, w if TRANSPOSED else tl.trans(w), acc)
        p_a += BR
        o_unit += BR * row_units if TRANSPOSED else BR // 64
    _epilogue(p_y, p_bias, acc, o_m, o_o, m, outputs, scale, BIASED)


@triton.jit(do_not_specialize=["key", "high"])
def _skinny(
    p_x, p_words, p_signs, p_bias, p_y, m, outputs, inputs, rows, row_units, steps, key, high,
    scale,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, STORED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Programs (batch tile, output tile, split); a split is ``steps`` tiles of inputs long.

    A tile is decoded one step before its product: the decoder's work can fill the time that the
    tensor cores take, and Triton leaves the operand in shared memory (it moves one made in the same
    step to registers, at an instruction a weight). The first product is one of zeros, and the last
    tile is decoded for nothing: a step of its own behind the loop would cost more in all others.
    """
    first = tl.program_id(2) * steps * BR
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :]
    o_o = (tl.program_id(1) * BO + tl.arange(0, BO))[:, None]
    o_row, o_col = _units(tl.program_id(1), first, BO, BR, TRANSPOSED)
    o_unit = o_row.to(tl.int64) * row_units + o_col
    o_r = (first - BR + tl.arange(0, BR))[:, None]  # of the step before: all masked
    p_a = p_x + o_m.to(tl.int64) * inputs + o_r
    acc = tl.zeros((BO, BM), tl.float32)
    dtype: tl.constexpr = p_x.dtype.element_ty
    w = tl.zeros((BR, BO) if TRANSPOSED else (BO, BR), dtype)
    for _ in range(steps + 1):
        x = tl.load(p_a, mask=(o_m < m) & (o_r >= first) & (o_r < inputs), other=0.0)
        acc = dot(tl.trans(w) if TRANSPOSED else w, x, acc)
        m_unit = (o_row < rows) & (o_col < row_units)
        w = ticket_tile(p_words, p_signs, key, high, o_unit, m_unit, MASKED, STORED, dtype)
        p_a += BR
        o_r += BR
        if TRANSPOSED:
            o_row += BR
            o_unit += BR * row_units
        else:
            o_col += BR // 64
            o_unit += BR // 64
    p_part = p_y + tl.program_id(2).to(tl.int64) * m * outputs
    _epilogue(p_part, p_bias, acc, o_m, o_o, m, outputs, scale, BIASED)


@triton.jit
def _sum_splits(
    p_parts, p_bias, p_y, size, outputs, splits, BIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """y = sum of the splits, in their order whatever program made them first, + bias."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(p_parts + o, mask=m, other=0.0)
        p_parts += size
    if BIASED:
        acc += tl.load(p_bias + o % outputs, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o, acc.to(p_y.dtype.element_ty), mask=m)


def ticket_linear(
    x: torch.Tensor,
    words: torch.Tensor | None,
    signs: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    sigma: float,
    key: int,
    high: int,
    transposed: bool = False,
    config: Config | None = None,
) -> None:
    """``y[m, O] = x[m, K] @ W^T + bias``, or ``y[m, K] = x[m, O] @ W + bias`` if ``transposed``.

    All contiguous, on one device, x, bias and y of one dtype (fp16, bf16, fp32). W ``[O, K]`` has
    the packed mask ``words`` (None: every weight is kept), the signs of key and high or of
    ``signs``, and the value ``sigma``. Sums in fp32; the same bits every time.
    """
    if not y.numel():
        return
    config = config or ticket_config(x.shape[0], x.dtype, x.device, transposed)
    p_words, p_signs = (aligned(t) if t is not None else x for t in (words, signs))
    rows, row_words = (signs if words is None else words).shape
    m, inputs, outputs = *x.shape, y.shape[1]
    sizes = (m, outputs, inputs, rows, row_words // 2)
    blocks = {"BM": config.BM, "BO": config.BO, "BR": config.BR}
    tiles = triton.cdiv(m, config.BM), triton.cdiv(outputs, config.BO)
    flags = {
        "TRANSPOSED": transposed,
        "MASKED": words is not None,
        "STORED": signs is not None,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    p_bias, biased = x if bias is None else bias, bias is not None
    key, high = signed(key), signed(high)
    if config.kernel == "gemm":
        _gemm[(tiles[0] * tiles[1],)](
            x, p_words, p_signs, p_bias, y, *sizes, key, high, sigma / 2,
            **blocks, GROUP=config.group, BIASED=biased, EVEN=inputs % config.BR == 0, **flags,
        )  # fmt: skip
        return
    steps, splits = split(triton.cdiv(inputs, config.BR), tiles[0] * tiles[1], config.programs)
    parts = y if splits == 1 else x.new_empty(splits, m, outputs, dtype=torch.float32)
    _skinny[(*tiles, splits)](
        x, p_words, p_signs, p_bias, parts, *sizes, steps, key, high, sigma / 2,
        **blocks, BIASED=biased and splits == 1, **flags,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, bias, y)


def sum_splits(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """``y[..., O] = parts[0] + parts[1] + ... + bias``, the parts fp32."""
    _sum_splits[(triton.cdiv(y.numel(), _SUM_BLOCK),)](
        parts, y if bias is None else bias, y, y.numel(), y.shape[-1], parts.shape[0],
        BIASED=bias is not None, BLOCK=_SUM_BLOCK,
    )  # fmt: skip


def split(steps: int, tiles: int, programs: int) -> tuple[int, int]:
    """(steps of a split, splits) so that about ``programs`` programs run, none without a step."""
    splits = min(max(programs // tiles, 1), max(steps, 1))
    each = max(triton.cdiv(steps, splits), 1)
    return each, max(triton.cdiv(steps, each), 1)


def ticket_config(rows: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> Config:
    """The configuration shipped for x ``[rows, inputs]`` of this dtype on this device."""
    way = " transposed" if transposed else ""
    kind = " fp32" if dtype == torch.float32 else ""
    return tuned(f"ticket_linear{way}{kind}", rows, device)


def signed(word: int) -> int:
    """A 32-bit word as an int32, so that one compiled kernel serves every layer's key."""
    return word - 2**32 if word >= 2**31 else word


def aligned(words: torch.Tensor) -> torch.Tensor:
    """``words``, copied if they do not start at a multiple of 16 bytes: a unit is one load."""
    return words.clone() if words.data_ptr() % 16 else words


_TYPES = {
    **dict.fromkeys(("p_words", "p_signs"), "*i32"),
    **dict.fromkeys(("m", "outputs", "inputs", "rows", "row_units", "steps"), "i32"),
    **dict.fromkeys(("key", "high"), "i32"),
    **dict.fromkeys(("size", "splits"), "i32"),
    "p_parts": "*fp32",
    "scale": "fp32",
}
_CEILINGS = {("gemm", False): 3.6, ("gemm", True): 4.4}
_SKINNY_CEILING = 4.0


def _variants():
    """Every shipped configuration, and the stored-sign variant of those for few rows."""
    ways = [f"ticket_linear{way}{kind}" for kind in ("", " fp32") for way in ("", " transposed")]
    for architecture, op, config in shipped(*ways):
        for stored in (False, True)[: 1 + (op == "ticket_linear" and config.most <= 64)]:
            yield _variant(architecture, op, config, stored)


def _variant(architecture, op, config, stored):
    transposed, fp32 = "transposed" in op, "fp32" in op
    dtype = "*fp32" if fp32 else "*bf16"
    gemm = config.kernel == "gemm"
    constants = {"BM": config.BM, "BO": config.BO, "BR": config.BR, "TRANSPOSED": transposed}
    constants |= {"MASKED": True, "STORED": stored, "BIASED": gemm}
    constants |= {"GROUP": config.group, "EVEN": True} if gemm else {}
    return Variant(
        f"{op} {config.name}{' stored' if stored else ''} {architecture}",
        _gemm if gemm else _skinny,
        {"p_x": dtype, "p_bias": dtype, "p_y": dtype if gemm else "*fp32", **_TYPES},
        constants,
        warps=config.warps,
        stages=config.stages,
        elements=config.BO * config.BR,
        ceiling=float("inf")
        if fp32
        else _CEILINGS.get((config.kernel, transposed), _SKINNY_CEILING),
        wgmma=not fp32,
        aligned=("inputs", "outputs"),
        targets=targets_of(architecture),
    )


VARIANTS = [
    *_variants(),
    Variant(
        "ticket_linear sum of splits",
        _sum_splits,
        {"p_bias": "*bf16", "p_y": "*bf16", **_TYPES},
        {"BIASED": True, "BLOCK": _SUM_BLOCK},
        unit="output",
    ),
]
