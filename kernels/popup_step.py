"""SGD with momentum or AdamW on the scores of many tensors, in one launch; masks follow apart.

Where a tensor has the signs of its weights, the gradient is that of the masked weight, and the
score's is G * W * sign(score).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .apply_mask import live_bits
from .tuning import shipped, targets_of, tuned
from .updates import BY_NAME, layout_of, pointer, stepped, update_table, walk
from .variants import Variant

__all__ = ["VARIANTS", "popup_step"]


@triton.jit
def _score_grad(
    grad, score, p_column, tensors, start, o, m, ABS: tl.constexpr
):  # fmt: skip
    """G * W * sign(score) where the weight's signs are given."""
    p_signs = pointer(p_column, 5, tensors, tl.int32, False)
    if tl.load(p_column + 5 * tensors) != 0:
        k, channels, taps = layout_of(p_column, tensors)
        i_row = start // k
        p_row = p_signs + i_row * ((k + 63) // 64 * 2)
        negative = live_bits(p_row, (start - i_row * k).to(tl.int32) + o, k, channels, taps, m)
        sigma = tl.load(p_column + 4 * tensors).to(tl.int32).to(tl.float32, bitcast=True)
        grad = grad * tl.where(negative, -sigma, sigma)
        if ABS:
            grad = tl.where(score < 0, -grad, tl.where(score == 0, 0.0, grad))
    return grad


@triton.jit
def _step_block(p_column, tensors, start, o, m, rule, flags: tl.constexpr):
    ABS: tl.constexpr = flags[0]
    ADAM: tl.constexpr = flags[1]
    MOMENTUM: tl.constexpr = flags[2]
    NESTEROV: tl.constexpr = flags[3]
    ALIGNED: tl.constexpr = flags[4]
    p_score = pointer(p_column, 0, tensors, tl.float32, ALIGNED) + start + o
    p_grad = pointer(p_column, 1, tensors, tl.float32, ALIGNED) + start + o
    p_held = pointer(p_column, 2, tensors, tl.float32, ALIGNED) + start + o
    p_square = pointer(p_column, 3, tensors, tl.float32, ALIGNED) + start + o
    score = tl.load(p_score, mask=m, other=0.0)
    grad = tl.load(p_grad, mask=m, other=0.0)
    grad = _score_grad(grad, score, p_column, tensors, start, o, m, ABS)
    held = tl.zeros_like(score)
    square = tl.zeros_like(score)
    if MOMENTUM:
        held = tl.load(p_held, mask=m, other=0.0)
    if ADAM:
        square = tl.load(p_square, mask=m, other=0.0)
    score, held, square = stepped(score, grad, held, square, rule, ADAM, MOMENTUM, NESTEROV)
    tl.store(p_score, score, mask=m)
    if MOMENTUM:
        tl.store(p_held, held, mask=m)
    if ADAM:
        tl.store(p_square, square, mask=m)


@triton.jit
def _popup_step(
    p_table, tensors, lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root,
    ABS: tl.constexpr, ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rule = (lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root)
    flags: tl.constexpr = (ABS, ADAM, MOMENTUM, NESTEROV, ALIGNED)
    walk(_step_block, p_table, tensors, rule, flags, LANES, BLOCK)


def popup_step(
    flat: list[list[torch.Tensor]],
    layouts: list[tuple[int, int, int]],
    signs: list[torch.Tensor | None],
    sigmas: list[float],
    absolute: bool,
    nesterov: bool,
    rule: list[float],
) -> None:
    """``flat``: scores, gradients, first moments, second moments, each a list of 1-D tensors in
    memory order, the last two possibly empty. ``layouts``: rows, channels, taps. ``rule``: the
    numbers of ``popup_step.update_rule``."""
    if not flat[0]:
        return
    sizes = tuned("popup_step", sum(t.numel() for t in flat[0]), flat[0][0].device)
    made = update_table([*flat, sigmas, signs], layouts, sizes.blocks["BLOCK"])
    if made is None:
        return
    table, blocks, constants, chosen = made
    _popup_step[(blocks,)](
        table, len(chosen), *rule, ABS=absolute,
        ADAM=bool(flat[3]), MOMENTUM=bool(flat[2]), NESTEROV=nesterov,
        num_warps=sizes.warps, **constants,
    )  # fmt: skip


VARIANTS = [
    Variant(
        f"popup_step {name} {architecture}",
        _popup_step,
        {"p_table": "*i64", "tensors": "i32", **dict.fromkeys(BY_NAME, "fp32")},
        {
            "ABS": True,
            "ADAM": name == "adamw",
            "MOMENTUM": True,
            "NESTEROV": False,
            "ALIGNED": True,
            "LANES": 64,
            **sizes.blocks,
        },
        warps=sizes.warps,
        elements=sizes.blocks["BLOCK"],
        targets=targets_of(architecture),
        ceiling=ceiling,  # counts all the ways, of which a block takes one of eight
    )
    for architecture, _, sizes in shipped("popup_step")
    for name, ceiling in (("sgd", 160), ("adamw", 300))
]
