"""Random subset-sum problems by the million: what every existence theorem needs for a weight."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import ops

__all__ = ["NOT_FOUND", "OK", "SubsetSum", "subset_sum"]

OK = 0  # the error is at most eps
NOT_FOUND = 1  # it is more: the mask is the best subset that the search saw


class SubsetSum(NamedTuple):
    """One subset for every target, in the shape of ``target``."""

    mask: torch.Tensor  # int64: bit i is element i of the base; element 63 is the sign bit
    value: torch.Tensor  # float64: the sum of the subset's original elements
    error: torch.Tensor  # float64: |value - target|
    status: torch.Tensor  # int8: OK or NOT_FOUND


def subset_sum(
    base: torch.Tensor,
    target: torch.Tensor,
    eps: float | torch.Tensor,
    *,
    objective: str = "min_card",
    max_card: int = 4,
    fallback: str = "dp",
    lengths: torch.Tensor | None = None,
) -> SubsetSum:
    """Subsets of ``base`` whose sums are ``target`` up to ``eps``.

    ``base``: ``[*rows, n]`` with n <= 64, float32 or float64; ``target``: ``[*rows, *shared]``, all
    of ``shared`` answered from the same base: ``[B, n]`` with ``[B]``, ``[R, n]`` with ``[R, T]``,
    ``[n]`` with ``[T]``. ``lengths``: ``[*rows]``, how many elements of each base count. ``eps``: a
    number or a tensor of ``target``'s shape. Results have ``target``'s shape.

    ``objective="min_card"``: the fewest elements, up to ``max_card`` (1 to 4), that come within
    ``eps``. Where there are none, ``fallback="dp"`` asks a dynamic programme on a coarse grid, then
    (n <= 32) the exact optimum, for a subset of any size; ``"none"`` returns the best subset of up
    to ``max_card`` elements. ``objective="min_error"``: the least error (n <= 40). Ties: fewest
    elements, then the smallest mask as an unsigned number.

    The search is exact in integers, on the grid 2**-23 * 2**ceil(log2(max|a|)) of each base row, so
    the same on every device; where ``base`` or ``target`` lie off that grid, it keeps back what
    rounding can add, so that a hit is within ``eps``. ``error`` and ``status`` are those of the
    original numbers in float64. The empty subset has sum 0 and counts. Raises ValueError for
    non-finite input.

    Source: Pensia et al. 2020 (least error) and Burkholz et al. 2021 (fewest elements), whose codes
    solve one weight at a time.
    """
    rows, n = base.shape[:-1], base.shape[-1] if base.ndim else 0
    if not base.ndim or target.shape[: len(rows)] != rows:
        raise ValueError(
            f"subset_sum: target: got shape {tuple(target.shape)} with base "
            f"{tuple(base.shape)}, need base [*rows, n] and target [*rows, ...]"
        )
    count, shared = math.prod(rows), math.prod(target.shape[len(rows) :])
    dtype = torch.promote_types(base.dtype, target.dtype)
    eps = torch.as_tensor(eps, dtype=torch.float64, device=target.device)
    if eps.ndim:
        eps = eps.expand(target.shape).reshape(count, shared)
    if lengths is not None:
        lengths = lengths.long().expand(rows).reshape(count)
    found = ops.subset_sum(
        base.detach().to(dtype).reshape(count, n),
        target.detach().to(dtype).reshape(count, shared),
        eps,
        lengths,
        objective,
        max_card,
        fallback,
    )
    return SubsetSum(*(part.view(target.shape) for part in found))
