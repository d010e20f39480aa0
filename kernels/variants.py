"""What a kernel file says about each configuration it ships, for the cross-compiled checks."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Variant"]


class Variant(NamedTuple):
    """One configuration of a kernel and what its machine code may cost.

    ``types`` are the arguments as Triton spells them ("*fp32", "i32"), ``constants`` the
    constexprs. ``elements`` (``unit``s: weights, scores) are what one program handles in one pass
    of its main loop, or altogether if it has none; ``ceiling`` the most instructions for each.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    unit: str = "weight"
    elements: int = 0
    ceiling: float = float("inf")
    wgmma: bool = False  # must use the Hopper tensor cores where compiled for sm_90
    unaligned: tuple[str, ...] = ()  # pointers that need not be aligned to 16 bytes
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16
    targets: tuple[str, ...] = ()  # the GPUs it ships for; empty: all
