"""Two random layers for a target layer: Pensia, Rajput, Nagle, Vishwakarma, Papailiopoulos,
"Optimal lottery tickets via SubsetSum", NeurIPS 2020 (arXiv 2006.07990), theorem 1.

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

from sparseticket.masks import PackedMask
from sparseticket.prng import check_seed

from .pairs import Pair, bits, drawn, layer_pair
from .solver import subset_sum
from .ticket import Construction, check_target, linear_with

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
    """``target``, Linear and ReLU in turn, inside a random network.

    ``n``: random numbers to choose from for each subset sum, at most 64. ``relu``: the theorem's
    source, weights U[-1, 1], 2n hidden neurons an input, n for each sign, and n constant ones where
    the layer has a bias (Fischer, Gadhikar, Burkholz 2021); its depth is twice the target's.
    ``linear``: n parallel weights for each one, uniform in the layer's own range; no biases.
    ``solver``: further arguments of :func:`subset_sum`. Weights that no subset meets keep the best
    one found and count as ``failed``.
    """
    layers = check_target("pensia_ticket", target, bias=structure == "relu")
    check_seed(seed)
    if structure not in ("relu", "linear"):
        raise ValueError(f"structure: got {structure!r}, accepted: relu, linear")
    if share_base not in ("none", "row") or (share_base == "row" and structure == "relu"):
        raise ValueError(f"share_base: got {share_base!r}, accepted: none, or row with linear")
    if not 1 <= n <= 64:
        raise ValueError(f"n: got {n}, need 1 to 64")
    modules, masks, errors = [], {}, []
    for i, layer in enumerate(layers):
        if structure == "relu":
            pair = layer_pair(layer.weight, layer.bias, n, eps, f"pensia.{i}", seed, solver)
        else:
            pair = _in_parallel(layer.weight, n, eps, share_base, f"pensia.{i}", seed, solver)
        for (k, parameter), mask in pair.masks.items():
            masks[f"{len(modules) + k}.{parameter}"] = PackedMask.from_dense(mask)
        modules += [*pair.modules, nn.ReLU()]
        errors.append(pair.error)
    source = nn.Sequential(*modules[:-1])
    return Construction.of(source, masks, layers, torch.cat(errors), eps, _BOUND)


def _in_parallel(weight, n, eps, share_base, name, seed, solver) -> Pair:
    rows, columns = weight.shape
    low, high = float(weight.min()), float(weight.max())
    shape = (rows, 1 if share_base == "row" else columns, n)
    u = (low + high) / 2 + drawn(seed, f"{name}.u", shape, (high - low) / 2, weight)
    if share_base == "row":
        found = subset_sum(u[:, 0], weight, eps, **solver)
    else:
        found = subset_sum(u.view(-1, n), weight.reshape(-1), eps, **solver)
    u = u.expand(rows, columns, n).reshape(rows, columns * n)
    chosen = bits(found.mask.view(rows, columns), n).view(rows, columns * n)
    return Pair([Repeat(n), linear_with(u)], {(1, "weight"): chosen}, found.error.flatten())
