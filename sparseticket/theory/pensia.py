"""Two random layers for a target layer: Pensia, Rajput, Nagle, Vishwakarma, Papailiopoulos, "Optimal
lottery tickets via SubsetSum", NeurIPS 2020 (arXiv 2006.07990), theorem 1.

In front of every target layer stands a layer with a block of hidden neurons for each input. A
neuron of the block sees that input only, x_i with a random weight v; its outputs have random
weights u. Where v > 0 it passes relu(v x_i) = v relu(x_i), where v < 0 |v| relu(-x_i), so that
u v relu(x_i) and u v (-relu(-x_i)) add up to w x_i if a subset of the products u v of *each* half
adds up to w: two subset sums for a target weight, O(log(1/eps)) neurons for an input.

Deviations from the paper and from its code (acnagle/optimal-lottery-tickets):

- fewest elements within ``eps`` by default, where the code takes the least error (``objective``);
- the code's first experiment has no hidden layer: a weight becomes a sum of n random ones,
  uniform in the range of the layer's weights (``structure="linear"``);
- the code draws one base for a whole output row, though the text says one for each weight;
  ``share_base`` is ``"none"`` or ``"row"`` (``"linear"`` only).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket.masks import PackedMask, regenerate
from sparseticket.prng import check_seed

from .solver import subset_sum
from .ticket import Construction, ConstructionReport, check_target, linear_with, masked

__all__ = ["Repeat", "pensia_ticket", "pensia_width"]

_BOUND = "an entry of a target layer is off by at most eps wherever its subset sums were solved"


def pensia_width(inputs: int, outputs: int, layers: int, eps: float, constant: float = 1.0) -> int:
    """Neurons that theorem 1 asks for in front of a layer, C d_l log(4 L d_l d_{l+1} / eps); the
    paper leaves ``constant`` open."""
    return math.ceil(inputs * constant * math.log(4 * layers * inputs * outputs / eps))


class Repeat(nn.Module):
    """``[..., d] -> [..., d*n]``: every input n times in a row."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.times, -1)


@torch.no_grad()
def pensia_ticket(
    target: nn.Sequential,
    n: int,
    eps: float,
    *,
    structure: str = "relu",
    share_base: str = "none",
    seed: int = 0,
    **solver: Any,
) -> Construction:
    """``target``, Linear and ReLU in turn and without biases, inside a random network.

    ``n``: random numbers to choose from for each subset sum, at most 64. ``relu``: the theorem's
    source, weights U[-1, 1], 2n hidden neurons an input, n for each sign; its depth is twice the
    target's. ``linear``: n parallel weights for each one, uniform in the layer's own range.
    ``solver``: further arguments of :func:`subset_sum`. Weights that no subset meets keep the best
    one found and count as ``failed``.
    """
    layers = check_target("pensia_ticket", target)
    check_seed(seed)
    if structure not in ("relu", "linear"):
        raise ValueError(f"structure: got {structure!r}, accepted: relu, linear")
    if share_base not in ("none", "row") or (share_base == "row" and structure == "relu"):
        raise ValueError(f"share_base: got {share_base!r}, accepted: none, or row with linear")
    if not 1 <= n <= 64:
        raise ValueError(f"n: got {n}, need 1 to 64")
    source, masks, errors = [], {}, []
    for l, layer in enumerate(layers):
        build = _by_halves if structure == "relu" else _in_parallel
        modules, chosen, error = build(layer.weight, n, eps, share_base, f"pensia.{l}", seed, solver)
        for i, mask in chosen.items():
            masks[f"{len(source) + i}.weight"] = PackedMask.from_dense(mask)
        source += [*modules, nn.ReLU()]
        errors.append(error)
    source = nn.Sequential(*source[:-1])
    error = torch.cat(errors)
    linear = [m for m in source if isinstance(m, nn.Linear)]
    report = ConstructionReport(
        widths=tuple(m.out_features for m in linear),
        source_weights=sum(m.weight.numel() for m in linear),
        kept=sum(mask.kept for mask in masks.values()),
        target_weights=sum(int((m.weight != 0).sum()) for m in layers),
        problems=error.numel(),
        failed=int((error > eps).sum()),
        redraws=0,
        eps=eps,
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        bound=_BOUND,
    )
    return Construction(masked(source, masks), source, masks, report)


def _by_halves(weight, n, eps, share_base, name, seed, solver):
    """First the layer of univariate neurons, n with v > 0 and n with v < 0 for each input."""
    rows, columns = weight.shape
    u = _drawn(seed, f"{name}.u", (rows, columns, 2, n), 1.0, weight)
    v = _drawn(seed, f"{name}.v", (columns, 2, n), 1.0, weight).abs()
    v[:, 1] *= -1
    found = subset_sum(
        (u * v).reshape(-1, n), weight[:, :, None].expand(-1, -1, 2).reshape(-1), eps, **solver
    )
    univariate = weight.new_zeros(columns, 2 * n, columns)
    univariate[torch.arange(columns), :, torch.arange(columns)] = v.reshape(columns, 2 * n)
    univariate = univariate.view(columns * 2 * n, columns)
    modules = [linear_with(univariate), nn.ReLU(), linear_with(u.view(rows, -1))]
    chosen = _bits(found.mask, n).view(rows, columns * 2 * n)
    used = chosen.any(0)[:, None] & (univariate != 0)
    return modules, {0: used, 2: chosen}, found.error


def _in_parallel(weight, n, eps, share_base, name, seed, solver):
    rows, columns = weight.shape
    low, high = float(weight.min()), float(weight.max())
    shape = (rows, 1 if share_base == "row" else columns, n)
    centred = _drawn(seed, f"{name}.u", shape, 1.0, weight)
    u = (low + high) / 2 + (high - low) / 2 * centred
    if share_base == "row":
        found = subset_sum(u[:, 0], weight, eps, **solver)
    else:
        found = subset_sum(u.view(-1, n), weight.reshape(-1), eps, **solver)
    u = u.expand(rows, columns, n).reshape(rows, columns * n)
    chosen = _bits(found.mask.view(rows, columns), n).view(rows, columns * n)
    return [Repeat(n), linear_with(u)], {1: chosen}, found.error.flatten()


def _drawn(seed: int, name: str, shape: tuple[int, ...], limit: float, like: Tensor) -> Tensor:
    """U[-limit, limit] from the layer's magnitude stream, in float32's numbers."""
    drawn = regenerate(seed, name, shape, "uniform", sigma=limit / math.sqrt(3))
    return drawn.to(like.dtype)


def _bits(masks: Tensor, n: int) -> Tensor:
    return (masks[..., None] >> torch.arange(n)) & 1 == 1
