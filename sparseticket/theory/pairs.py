"""Two random layers that stand for one: what the two-layer constructions share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket.masks import regenerate

from .solver import subset_sum
from .ticket import linear_with

__all__ = ["Pair", "bits", "drawn", "layer_pair"]


@dataclass(frozen=True)
class Pair:
    """``modules``: Linear, ReLU, Linear with all random weights; ``masks``: bool, by the number of
    the module and the parameter; ``error``: of every subset sum, float64."""

    modules: list[nn.Module]
    masks: dict[tuple[int, str], Tensor]
    error: Tensor


def layer_pair(
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    eps: float,
    name: str,
    seed: int,
    solver: dict[str, Any],
    signs: Sequence[int] = (1, -1),
) -> Pair:
    """A pair for ``weight @ x + bias``, ``weight`` [m, d].

    For each input and each of ``signs`` the first layer has n neurons that see this input alone
    with random weights of that sign (inputs that are never negative need only 1), and for a bias n
    constant ones, relu(b) with b in U(0, 1). The second layer's weights are U[-1, 1]; a subset of
    its products with the first's sums to every entry: both signs alike, since v relu(x) and
    v (-relu(-x)) add up to v x.
    """
    rows, columns = weight.shape
    halves = columns * len(signs)
    v = drawn(seed, f"{name}.v", (columns, len(signs), n), 1.0, weight).abs()
    v = (v * torch.tensor(signs, dtype=v.dtype)[:, None]).view(halves, n)
    goal = weight.repeat_interleave(len(signs), 1)
    if bias is not None:
        constants = drawn(seed, f"{name}.b", (1, n), 1.0, weight).abs()
        v, goal = torch.cat([v, constants]), torch.cat([goal, bias[:, None]], 1)
    u = drawn(seed, f"{name}.u", (rows, len(v), n), 1.0, weight)
    found = subset_sum((u * v).view(-1, n), goal.reshape(-1), eps, **solver)
    chosen = bits(found.mask, n).view(rows, -1)
    first = weight.new_zeros(len(v) * n, columns)
    owner = torch.arange(halves * n) // (n * len(signs))
    first[torch.arange(halves * n), owner] = v[:halves].flatten()
    offset = None
    used = chosen.any(0)
    masks = {(0, "weight"): used[:, None] & (first != 0), (2, "weight"): chosen}
    if bias is not None:
        offset = torch.cat([v.new_zeros(halves * n), v[-1]])
        masks[0, "bias"] = used & (offset != 0)
    modules = [linear_with(first, offset), nn.ReLU(), linear_with(u.view(rows, -1))]
    return Pair(modules, masks, found.error)


def drawn(seed: int, name: str, shape: Sequence[int], limit: float, like: Tensor) -> Tensor:
    """U[-limit, limit] from the layer's magnitude stream, float32's numbers in ``like``'s dtype."""
    numbers = regenerate(seed, name, shape, "uniform", sigma=limit / math.sqrt(3))
    return numbers.to(like.dtype)


def bits(masks: Tensor, n: int) -> Tensor:
    """bool [..., n] of bit masks [...]."""
    return (masks[..., None] >> torch.arange(n)) & 1 == 1
