"""What popup_step and masked_step share: torch's update rules and the walk over many tensors.

A table has one column a tensor: six addresses or numbers, then size, k, channels, taps and the
tensor's first block. A program finds the tensor that its block of elements, in memory order, lies
in.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from .apply_mask import all_of
from .table import device_table

__all__ = ["BY_NAME", "layout_of", "pointer", "stepped", "update_table", "walk"]

BY_NAME = ("lr", "decay", "beta1", "beta1_rest", "beta2", "beta2_rest", "eps", "root")
_SIZE, _K, _CHANNELS, _TAPS, _FIRST = (tl.constexpr(6 + i) for i in range(5))


@triton.jit
def pointer(p_column, i_row: tl.constexpr, tensors, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in row ``i_row`` of a tensor's column."""
    address = tl.load(p_column + i_row * tensors).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def walk(
    STEP: tl.constexpr,
    p_table,
    tensors,
    rule,
    flags: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``STEP(p_column, tensors, start, o, m, rule, flags)`` on this program's block: its tensor's
    column, the block's first element there, places from it and which of them are elements.
    ``rule``: the numbers of BY_NAME; ``flags``: the kernel's own constants."""
    i_block = tl.program_id(0)
    o = tl.arange(0, LANES)
    first = tl.load(p_table + _FIRST * tensors + o, mask=o < tensors, other=2**62)
    p_column = p_table + tl.sum((first <= i_block).to(tl.int32)) - 1
    start = (i_block - tl.load(p_column + _FIRST * tensors)) * BLOCK
    start = tl.multiple_of(start, BLOCK)
    size = tl.load(p_column + _SIZE * tensors)
    o = tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        STEP(p_column, tensors, start, o, all_of(BLOCK), rule, flags)
    else:
        STEP(p_column, tensors, start, o, start + o < size, rule, flags)


@triton.jit
def layout_of(p_column, tensors):
    """k, channels, taps (1 where memory order is canonical order)."""
    k = tl.load(p_column + _K * tensors).to(tl.int32)
    channels = tl.load(p_column + _CHANNELS * tensors).to(tl.int32)
    return k, channels, tl.load(p_column + _TAPS * tensors).to(tl.int32)


@triton.jit
def stepped(
    value, grad, held, square, rule,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """torch's formulas, operation by operation: (value, first moment, second moment)."""
    lr, decay, beta1, beta1_rest, beta2, beta2_rest, eps, root = rule
    if ADAM:
        held += beta1_rest * (grad - held)
        square = square * beta2 + (beta2_rest * grad) * grad
        size = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + root) + eps
        return value * decay - tl.div_rn(lr * held, size), held, square
    grad += decay * value
    if MOMENTUM:
        held = held * beta1 + grad
        grad = grad + beta1 * held if NESTEROV else held
    return value - lr * grad, held, square


def update_table(
    lists: list[list[torch.Tensor | float | None]],
    layouts: list[tuple[int, int, int]],
    block: int,
) -> tuple[torch.Tensor, int, dict[str, int | bool], list[int]] | None:
    """(table, blocks, its constants, the tensors that have elements) of six lists in the order of
    their rows, empty ones and None for none; None if there is nothing to do."""
    chosen = [i for i, values in enumerate(lists[0]) if values.numel()]
    if not chosen:
        return None
    rows = [[_entry(entries[i]) if entries else 0 for i in chosen] for entries in lists]
    tensors = [t for entries in lists for t in entries if isinstance(t, torch.Tensor)]
    aligned = not any(t.data_ptr() % 16 for t in tensors)
    sizes, firsts, blocks = [lists[0][i].numel() for i in chosen], [], 0
    for size in sizes:
        firsts.append(blocks)
        blocks += triton.cdiv(size, block)
    layout = [layouts[i] for i in chosen]
    rows += [sizes, [c * t for _, c, t in layout], [c for _, c, _ in layout]]
    rows += [[t for _, _, t in layout], firsts]
    table = device_table([value for row in rows for value in row], lists[0][0].device)
    constants = {"ALIGNED": aligned, "LANES": triton.next_power_of_2(len(chosen)), "BLOCK": block}
    return table, blocks, constants, chosen


def _entry(given: torch.Tensor | float | None) -> int:
    """An address, or the bits of a number."""
    if isinstance(given, float):
        return struct.unpack("<i", struct.pack("<f", given))[0]
    return 0 if given is None else given.data_ptr()
