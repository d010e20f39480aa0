"""SGD with momentum or AdamW on the live weights of many tensors, in one launch.

Gradient and state of a dead weight count as 0 and its state is written as 0; its weight stays. The
masked weight goes out in low precision as well, where that is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .apply_mask import live_bits
from .tuning import shipped, targets_of, tuned
from .updates import BY_NAME, layout_of, pointer, stepped, update_table, walk
from .variants import Variant

__all__ = ["VARIANTS", "masked_step"]

_SHADOW_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _step_block(p_column, tensors, start, o, m, rule, flags: tl.constexpr):
    ADAM: tl.constexpr = flags[0]
    MOMENTUM: tl.constexpr = flags[1]
    NESTEROV: tl.constexpr = flags[2]
    SHADOW: tl.constexpr = flags[3]
    ALIGNED: tl.constexpr = flags[4]
    k, channels, taps = layout_of(p_column, tensors)
    i_row = start // k
    p_row = pointer(p_column, 5, tensors, tl.int32, False) + i_row * ((k + 63) // 64 * 2)
    live = live_bits(p_row, (start - i_row * k).to(tl.int32) + o, k, channels, taps, m)

    p_weight = pointer(p_column, 0, tensors, tl.float32, ALIGNED) + start + o
    p_grad = pointer(p_column, 1, tensors, tl.float32, ALIGNED) + start + o
    p_held = pointer(p_column, 2, tensors, tl.float32, ALIGNED) + start + o
    p_square = pointer(p_column, 3, tensors, tl.float32, ALIGNED) + start + o
    weight = tl.load(p_weight, mask=m, other=0.0)
    grad = tl.where(live, tl.load(p_grad, mask=m, other=0.0), 0.0)
    held = tl.zeros_like(weight)
    square = tl.zeros_like(weight)
    if MOMENTUM:
        held = tl.where(live, tl.load(p_held, mask=m, other=0.0), 0.0)
    if ADAM:
        square = tl.where(live, tl.load(p_square, mask=m, other=0.0), 0.0)
    made, held, square = stepped(weight, grad, held, square, rule, ADAM, MOMENTUM, NESTEROV)
    tl.store(p_weight, tl.where(live, made, weight), mask=m)
    if MOMENTUM:
        tl.store(p_held, tl.where(live, held, 0.0), mask=m)
    if ADAM:
        tl.store(p_square, square, mask=m)
    if SHADOW is not None:
        p_shadow = pointer(p_column, 4, tensors, SHADOW, ALIGNED) + start + o
        tl.store(p_shadow, tl.where(live, made, 0.0).to(SHADOW), mask=m)


@triton.jit
def _masked_step(
    p_table, tensors, lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, SHADOW: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rule = (lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root)
    flags: tl.constexpr = (ADAM, MOMENTUM, NESTEROV, SHADOW, ALIGNED)
    walk(_step_block, p_table, tensors, rule, flags, LANES, BLOCK)


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
    if not flat[0]:
        return
    sizes = tuned("masked_step", sum(t.numel() for t in flat[0]), flat[0][0].device)
    made = update_table([*flat, words], layouts, sizes.blocks["BLOCK"])
    if made is None:
        return
    table, blocks, constants, chosen = made
    _masked_step[(blocks,)](
        table, len(chosen), *rule,
        ADAM=adam, MOMENTUM=bool(flat[2]), NESTEROV=nesterov,
        SHADOW=_SHADOW_TYPES[flat[4][0].dtype] if flat[4] else None,
        num_warps=sizes.warps, **constants,
    )  # fmt: skip


VARIANTS = [
    Variant(
        f"masked_step {name} {shadow or 'alone'} {architecture}",
        _masked_step,
        {"p_table": "*i64", "tensors": "i32", **dict.fromkeys(BY_NAME, "fp32")},
        {
            "ADAM": name == "adamw",
            "MOMENTUM": True,
            "NESTEROV": False,
            "SHADOW": shadow,
            "ALIGNED": True,
            "LANES": 64,
            **sizes.blocks,
        },
        warps=sizes.warps,
        elements=sizes.blocks["BLOCK"],
        targets=targets_of(architecture),
        ceiling=ceiling,  # counts all the ways, of which a block takes one of eight
    )
    for architecture, _, sizes in shipped("masked_step")
    for name, shadow, ceiling in (
        ("sgd", tl.bfloat16, 160),
        ("sgd", None, 125),
        ("adamw", tl.bfloat16, 290),
    )
]
