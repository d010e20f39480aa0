"""SGD with momentum or AdamW on the live weights of many tensors, in one launch.

Gradient and state of a dead weight count as 0 and its state is written as 0; its weight stays. The
masked weight goes out in low precision as well, where that is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .apply_mask import all_of, live_bits
from .table import device_table
from .variants import Variant

__all__ = ["VARIANTS", "masked_step"]

_BLOCK = 2048
# Columns of the table of tensors; the first six hold addresses, in the order of the op's lists.
_ADDRESSES = 6
_SIZE, _K, _CHANNELS, _TAPS, _FIRST = (tl.constexpr(_ADDRESSES + i) for i in range(5))
_SHADOW_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(p_column, i_column: tl.constexpr, tensors, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(p_column + i_column * tensors).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _stepped(
    weight, grad, held, square, lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """torch's formulas, operation by operation: (weight, first moment, second moment)."""
    if ADAM:
        held += beta1_rest * (grad - held)
        square = square * beta2 + (beta2_rest * grad) * grad
        size = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + root) + eps
        return weight * decay - tl.div_rn(lr * held, size), held, square
    grad += decay * weight
    if MOMENTUM:
        held = held * beta1 + grad
        grad = grad + beta1 * held if NESTEROV else held
    return weight - lr * grad, held, square


@triton.jit
def _step_block(
    p_column, tensors, start, o, m, lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, SHADOW: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    k = tl.load(p_column + _K * tensors).to(tl.int32)
    channels = tl.load(p_column + _CHANNELS * tensors).to(tl.int32)
    taps = tl.load(p_column + _TAPS * tensors).to(tl.int32)
    p_words = _pointer(p_column, 5, tensors, tl.int32, False)
    i_row = start // k
    p_row = p_words + i_row * ((k + 63) // 64 * 2)
    live = live_bits(p_row, (start - i_row * k).to(tl.int32) + o, k, channels, taps, m)

    p_weight = _pointer(p_column, 0, tensors, tl.float32, ALIGNED) + start + o
    p_grad = _pointer(p_column, 1, tensors, tl.float32, ALIGNED) + start + o
    p_held = _pointer(p_column, 2, tensors, tl.float32, ALIGNED) + start + o
    p_square = _pointer(p_column, 3, tensors, tl.float32, ALIGNED) + start + o
    weight = tl.load(p_weight, mask=m, other=0.0)
    grad = tl.where(live, tl.load(p_grad, mask=m, other=0.0), 0.0)
    held = tl.zeros_like(weight)
    square = tl.zeros_like(weight)
    if MOMENTUM:
        held = tl.where(live, tl.load(p_held, mask=m, other=0.0), 0.0)
    if ADAM:
        square = tl.where(live, tl.load(p_square, mask=m, other=0.0), 0.0)
    made, held, square = _stepped(
        weight, grad, held, square, lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root,
        ADAM, MOMENTUM, NESTEROV,
    )  # fmt: skip
    tl.store(p_weight, tl.where(live, made, weight), mask=m)
    if MOMENTUM:
        tl.store(p_held, tl.where(live, held, 0.0), mask=m)
    if ADAM:
        tl.store(p_square, square, mask=m)
    if SHADOW is not None:
        p_shadow = _pointer(p_column, 4, tensors, SHADOW, ALIGNED) + start + o
        tl.store(p_shadow, tl.where(live, made, 0.0).to(SHADOW), mask=m)


@triton.jit
def _masked_step(
    p_table, tensors, lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, SHADOW: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    o_tensor = tl.arange(0, LANES)
    first = tl.load(p_table + _FIRST * tensors + o_tensor, mask=o_tensor < tensors, other=2**62)
    i_tensor = tl.sum((first <= i_block).to(tl.int32)) - 1
    p_column = p_table + i_tensor
    start = (i_block - tl.load(p_column + _FIRST * tensors)) * BLOCK
    start = tl.multiple_of(start, BLOCK)
    size = tl.load(p_column + _SIZE * tensors)
    o = tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _step_block(
            p_column, tensors, start, o, all_of(BLOCK), lr, decay, beta1, beta1_rest, beta2,
            beta2_rest, eps, root, ADAM, MOMENTUM, NESTEROV, SHADOW, ALIGNED,
        )  # fmt: skip
    else:
        _step_block(
            p_column, tensors, start, o, start + o < size, lr, decay, beta1, beta1_rest, beta2,
            beta2_rest, eps, root, ADAM, MOMENTUM, NESTEROV, SHADOW, ALIGNED,
        )  # fmt: skip


def masked_step(
    flat: list[list[torch.Tensor]],
    layouts: list[tuple[int, int, int]],
    words: list[torch.Tensor],
    adam: bool,
    nesterov: bool,
    rule: list[float],
) -> None:
    """``flat``: weights, gradients, first moments, second moments, shadows, each a list of 1-D
    tensors in memory order, the last three possibly empty. ``layouts``: rows, channels, taps.
    ``rule``: the numbers of ``popup_step.update_rule``."""
    chosen = [i for i, weight in enumerate(flat[0]) if weight.numel()]
    if not chosen:
        return
    columns = [[tensors[i].data_ptr() if tensors else 0 for i in chosen] for tensors in flat]
    aligned = not any(address % 16 for column in columns for address in column)
    sizes, firsts, blocks = [flat[0][i].numel() for i in chosen], [], 0
    for size in sizes:
        firsts.append(blocks)
        blocks += triton.cdiv(size, _BLOCK)
    layout = [layouts[i] for i in chosen]
    columns += [
        [words[i].data_ptr() for i in chosen],
        sizes,
        [channels * taps for _, channels, taps in layout],
        [channels for _, channels, _ in layout],
        [taps for _, _, taps in layout],
        firsts,
    ]
    table = device_table([value for column in columns for value in column], flat[0][0].device)
    _masked_step[(blocks,)](
        table, len(chosen), *rule,
        ADAM=adam, MOMENTUM=bool(flat[2]), NESTEROV=nesterov,
        SHADOW=_SHADOW_TYPES[flat[4][0].dtype] if flat[4] else None,
        ALIGNED=aligned, LANES=triton.next_power_of_2(len(chosen)), BLOCK=_BLOCK,
    )  # fmt: skip


_NUMBERS = ("lr", "decay", "beta1", "beta1_rest", "beta2", "beta2_rest", "eps", "root")
VARIANTS = [
    Variant(
        f"masked_step {name} {shadow or 'alone'}",
        _masked_step,
        {"p_table": "*i64", "tensors": "i32", **dict.fromkeys(_NUMBERS, "fp32")},
        {
            "ADAM": name == "adamw",
            "MOMENTUM": True,
            "NESTEROV": False,
            "SHADOW": shadow,
            "ALIGNED": True,
            "LANES": 64,
            "BLOCK": _BLOCK,
        },
        elements=_BLOCK,
        ceiling=ceiling,
    )
    for name, shadow, ceiling in (
        ("sgd", tl.bfloat16, 160),
        ("sgd", None, 125),
        ("adamw", tl.bfloat16, 290),
    )
]
