"""Erdos-Renyi source networks: Gadhikar, Mukherjee, Burkholz, "Why random pruning is all we need to
start sparse", ICML 2023 (arXiv 2210.02412).

A random mask drops every link of a wide network. What a target layer needs is still there if every
target neuron is present in rho copies: each copy of a child then finds a surviving link to some
copy of each parent unless all rho of them are gone, probability (1-p)^rho at density p. Hence the
width factor :func:`er_width`, 1 / log(1 / (1-p)) up to a logarithm. :func:`er_ticket` builds the
ticket: a source one layer deeper than its target, whose first layer holds univariate neurons.

Deviations from the paper and from its code (RelationalML/sparse_to_sparse):

- the constant of the width factor is that of the union bound over q = (child copies) x (parents),
  rho >= ln(q/delta) / ln(1/(1-p)), proved here; the paper's theorem has an unspecified one;
- layer densities are exact (:mod:`sparseticket.densities`), there they fall short;
- :func:`flow_correction` also repairs convolutions with several dead input channels; there, the
  entries go into a temporary copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket import ops
from sparseticket.formats import check_density, kept_count
from sparseticket.masks import PackedMask, layer_number, random_mask
from sparseticket.prng import check_seed

from .solver import OK, subset_sum

__all__ = [
    "ERTicket",
    "effective_density",
    "er_masks",
    "er_ticket",
    "er_width",
    "flow_correction",
    "prune_dead",
    "strong_er_ticket",
]


def er_width(density: float, pairs: int, delta: float) -> int:
    """Copies of every parent by which all ``pairs`` of (child copy, parent) find a surviving link
    of an Erdos-Renyi mask of ``density`` with probability at least 1 - ``delta``."""
    density = check_density(density)
    if density == 0:
        raise ValueError("density: got 0, need a source with links")
    if not 0 < delta < 1:
        raise ValueError(f"delta: got {delta}, need a failure probability in (0, 1)")
    if pairs < 1 or density == 1:
        return 1
    return max(math.ceil(math.log(pairs / delta) / -math.log1p(-density)), 1)


def er_masks(
    shapes: Sequence[Sequence[int]],
    densities: Sequence[float],
    *,
    seed: int = 0,
    exact: bool = True,
    name: str = "er",
) -> list[PackedMask]:
    """One random mask per layer, from the ``mask`` stream of layer ``name.0``, ``name.1``, ...

    ``exact``: exactly kept_count(density, n) links; else every link on its own with that
    probability, which is what the theory's bounds are about.
    """
    masks = []
    for i, (shape, density) in enumerate(zip(shapes, densities, strict=True)):
        layer = f"{name}.{i}"
        if exact:
            kept = kept_count(density, math.prod(shape))
            masks.append(random_mask(seed, layer, shape, kept))
        else:
            drawn = _uniform(seed, layer, shape, "mask") < check_density(density)
            masks.append(PackedMask.from_dense(drawn))
    return masks


def flow_correction(masks: Sequence[PackedMask], *, seed: int = 0) -> list[PackedMask]:
    """``masks`` and, for every output unit without an input, one random link of its row; then, for
    every input unit without an output, one of its column. Units are neurons or channels."""
    corrected = []
    for i, mask in enumerate(masks):
        dense = mask.to_dense()
        draws = _uniform(seed, f"flow.{i}", mask.shape, "growth")
        for axis in (0, 1):
            dense |= _one_per_dead_unit(dense, draws, axis)
        corrected.append(PackedMask.from_dense(dense))
    return corrected


def _one_per_dead_unit(dense: Tensor, draws: Tensor, axis: int) -> Tensor:
    """The link with the largest draw of every unit along ``axis`` that has none."""
    rows, numbers = dense.transpose(0, axis).flatten(1), draws.transpose(0, axis).flatten(1)
    added = torch.zeros_like(rows)
    dead = ~rows.any(1)
    if rows.numel() and bool(dead.any()):
        added[dead, numbers[dead].argmax(1)] = True
    return added.view_as(dense.transpose(0, axis)).transpose(0, axis)


def prune_dead(masks: Sequence[PackedMask]) -> list[PackedMask]:
    """``masks`` of a chain of layers without the links that no path from input to output uses.

    A layer may be wider than the one before it puts out by a whole factor: a flattened convolution,
    whose channels are blocks of inputs.
    """
    dense = [mask.to_dense() for mask in masks]
    alive = None
    for i, mask in enumerate(dense):
        if alive is not None:
            dense[i] = mask & _spread(alive, mask.shape[1]).view(1, -1, *[1] * (mask.ndim - 2))
        alive = dense[i].flatten(1).any(1)
    for i in reversed(range(len(dense) - 1)):
        used = dense[i + 1].transpose(0, 1).flatten(1).any(1)
        used = used.view(dense[i].shape[0], -1).any(1)
        dense[i] = dense[i] & used.view(-1, *[1] * (dense[i].ndim - 1))
    return [PackedMask.from_dense(mask) for mask in dense]


def _spread(alive: Tensor, inputs: int) -> Tensor:
    if inputs % len(alive):
        raise ValueError(f"masks: a layer of {inputs} inputs cannot follow {len(alive)} outputs")
    return alive.repeat_interleave(inputs // len(alive))


def effective_density(masks: Sequence[PackedMask]) -> float:
    """Fraction of the links of a chain that lie on a path from input to output."""
    return sum(m.kept for m in prune_dead(masks)) / max(sum(m.numel for m in masks), 1)


@dataclass(frozen=True)
class ERTicket:
    """A target inside an Erdos-Renyi source: ``network`` computes it with the links of ``masks``,
    a subset of ``source``, the random masks; ``missing`` counts (child copy, parent) pairs without
    a surviving link, at whose places the network has none."""

    network: nn.Sequential
    masks: list[PackedMask]
    source: list[PackedMask]
    missing: int
    report: dict[str, Any]


@torch.no_grad()
def er_ticket(
    target: nn.Sequential, densities: Sequence[float], delta: float, *, seed: int = 0
) -> ERTicket:
    """The weak ticket: ``target``'s own weights on one surviving link per child copy and parent.

    ``target``: Linear layers with ReLU between them; ``densities``: one per Linear, of the random
    masks. The source has a first layer of neurons relu(x_i) and relu(-x_i), then ``rho_l`` copies
    of every neuron of layer l, ``rho`` from :func:`er_width` at failure probability ``delta`` / L
    each, and one copy of the outputs. With nothing missing the network computes the target, up to
    the rounding of sums.
    """
    check_seed(seed)
    linear = [m for m in target if isinstance(m, nn.Linear)]
    if not linear or len(linear) != len(densities):
        raise ValueError(
            f"densities: got {len(densities)} for {len(linear)} Linear layers, need one for each"
        )
    needs = [layer.weight != 0 for layer in linear]
    needs[0] = needs[0].repeat_interleave(2, 1)  # of relu(x) and relu(-x)
    copies = [1]
    for need, p in zip(reversed(needs), reversed(densities), strict=True):
        copies.insert(0, er_width(p, copies[0] * int(need.sum()), delta / len(linear)))
    shapes = [
        (need.shape[0] * copies[i + 1], need.shape[1] * copies[i]) for i, need in enumerate(needs)
    ]
    source = er_masks(shapes, densities, seed=seed, exact=False)
    layers, masks, missing = [_both_signs(linear[0], copies[0]), nn.ReLU()], [], 0
    for i, (layer, mask) in enumerate(zip(linear, source, strict=True)):
        chosen = _first_links(mask.to_dense(), needs[i], copies[i + 1], copies[i])
        missing += copies[i + 1] * int(needs[i].sum()) - int(chosen.sum())
        signed = (
            torch.stack([layer.weight, -layer.weight], 2).flatten(1) if i == 0 else layer.weight
        )
        weight = signed.repeat_interleave(copies[i + 1], 0).repeat_interleave(copies[i], 1)
        bias = None if layer.bias is None else layer.bias.repeat_interleave(copies[i + 1])
        layers += [_linear(weight * chosen, bias), nn.ReLU()]
        masks.append(PackedMask.from_dense(chosen))
    kept, links = sum(m.kept for m in masks), sum(m.numel for m in masks)
    report = {
        "copies": copies,
        "widths": [shape[0] for shape in shapes],
        "source_links": sum(m.kept for m in source),
        "kept": kept,
        "density": kept / links,
        "target_weights": sum(int((layer.weight != 0).sum()) for layer in linear),
        "pairs": sum(c * int(n.sum()) for c, n in zip(copies[1:], needs, strict=True)),
        "missing": missing,
        "bound": delta,
    }
    return ERTicket(nn.Sequential(*layers[:-1]), masks, source, missing, report)


@torch.no_grad()
def strong_er_ticket(
    target: nn.Sequential,
    density: float,
    *,
    base: int = 15,
    eps: float = 0.01,
    redraws: int = 50,
    seed: int = 0,
) -> ERTicket:
    """The strong ticket: random weights on random links, every parameter within ``eps``.

    The L+1 construction (Burkholz, ICML 2022): univariate neurons for each sign of each input and
    constant ones in the first layer, then rho copies of every neuron of ``target`` (Linear and ReLU
    in turn), which are what the subset sums of the next layer choose from; rho is such that of rho
    links about ``base`` or more survive at ``density``. A source neuron with a parameter that
    cannot be met is passed over for another, up to ``redraws`` times. ``missing`` counts parameters
    that then still are off by more. The source has weights U[+-1], in its first layer U[+-2].
    """
    check_seed(seed)
    if check_density(density) == 0:
        raise ValueError("density: got 0, need a source with links")
    linear = [m for m in target if isinstance(m, nn.Linear)]
    rho = math.ceil((base + 2 * math.sqrt(base * (1 - density))) / density)
    first, carried, groups = _univariate(linear[0].in_features, rho, seed)
    layers, masks, source = [first, nn.ReLU()], [], []
    missing = redrawn = 0
    for i, layer in enumerate(linear):
        last = layer is linear[-1]
        goal = _goal(layer, both_signs=i == 0, constant=not last)
        copies = 1 if last else rho
        goal = goal.repeat_interleave(copies, 0)
        found = _choose_links(goal, groups, carried, density, eps, redraws, seed, f"strong.{i}")
        layers += [_linear(found.weight * found.chosen, None), nn.ReLU()]
        masks.append(PackedMask.from_dense(found.chosen))
        source.append(PackedMask.from_dense(found.links))
        missing, redrawn = missing + found.failed, redrawn + found.redrawn
        groups = torch.arange(len(goal)).view(-1, copies)
        carried = torch.ones(len(goal), dtype=goal.dtype)
    dtype = linear[0].weight.dtype
    report = {
        "copies": rho,
        "widths": [m.out_features for m in layers if isinstance(m, nn.Linear)],
        "source_links": sum(m.kept for m in source),
        "kept": sum(m.kept for m in masks),
        "target_weights": sum(int((p != 0).sum()) for m in linear for p in m.parameters()),
        "redrawn": redrawn,
        "missing": missing,
        "eps": eps,
    }
    network = nn.Sequential(*layers[:-1]).to(dtype)
    return ERTicket(network, masks, source, missing, report)


def _univariate(inputs: int, rho: int, seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """First layer: 2 rho neurons w x_i for each input, rho constants. With what each carries, and
    which neurons are those of x_i > 0, of x_i < 0, of every i, and of 1 (padded by the last one,
    which carries 0)."""
    slopes = 4 * _uniform(seed, "strong.slopes", (inputs, 2 * rho), "magnitude").double() - 2
    constants = 2 * _uniform(seed, "strong.constants", (rho,), "magnitude").double()
    neurons = 2 * rho * inputs
    weight = torch.zeros(neurons + rho + 1, inputs, dtype=torch.float64)
    weight[torch.arange(neurons), torch.arange(inputs).repeat_interleave(2 * rho)] = (
        slopes.flatten()
    )
    bias = torch.cat([slopes.new_zeros(neurons), constants, slopes.new_zeros(1)])
    carried = torch.cat([slopes.flatten(), constants, slopes.new_zeros(1)])
    groups = torch.full((2 * inputs + 1, 2 * rho), neurons + rho)
    for i in range(inputs):
        own = torch.arange(2 * rho) + 2 * rho * i
        for half, sign in enumerate((slopes[i] > 0, slopes[i] < 0)):
            groups[2 * i + half, : int(sign.sum())] = own[sign]
    groups[-1, :rho] = torch.arange(rho) + neurons
    return _linear(weight, bias), carried, groups


def _goal(layer: nn.Linear, both_signs: bool, constant: bool) -> Tensor:
    """What every neuron needs of every group: the weights, for both signs alike, and the bias; and
    for ``constant`` a neuron more that needs a 1 of the constants."""
    weight = layer.weight.double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    goal = torch.cat([weight.repeat_interleave(1 + both_signs, 1), bias[:, None]], 1)
    one = torch.zeros(1, goal.shape[1], dtype=goal.dtype)
    one[0, -1] = 1
    return torch.cat([goal, one]) if constant else goal


@dataclass
class _Links:
    weight: Tensor
    links: Tensor
    chosen: Tensor
    failed: int = 0
    redrawn: int = 0


def _choose_links(goal, groups, carried, density, eps, redraws, seed, name) -> _Links:
    """Random weights and links [children, parents], and of those the subsets that sum to ``goal``
    [children, groups] over the parents in ``groups`` [groups, m]."""
    shape = (len(goal), len(carried))
    found = _Links(*(torch.zeros(shape, dtype=d) for d in (torch.float64, torch.bool, torch.bool)))
    open_ = torch.arange(len(goal))
    for draw in range(redraws + 1):
        weight = 2 * _uniform(seed, name, shape, "magnitude", draw).double() - 1
        links = _uniform(seed, name, shape, "mask", draw) < density
        weight, links = weight[open_], links[open_]
        chosen, failed = _subsets(
            weight * carried, links & (carried != 0), goal[open_], groups, eps
        )
        found.weight[open_], found.links[open_], found.chosen[open_] = weight, links, chosen
        found.failed = int(failed.sum())
        open_ = open_[failed.any(1)]
        if not len(open_) or draw == redraws:
            return found
        found.redrawn += len(open_)
    return found


def _subsets(values, links, goal, groups, eps) -> tuple[Tensor, Tensor]:
    """Chosen links [children, parents], and which of ``goal`` are not within ``eps``. A subset sum
    sees the links that there are, of those the first 64."""
    there = links[:, groups]  # [children, groups, m]
    order = there.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :64]
    parents = groups.expand(there.shape).gather(-1, order)
    base = values[:, None].expand(-1, len(groups), -1).gather(-1, parents)
    lengths = there.sum(-1).clamp(max=64)
    solved = subset_sum(base.flatten(0, 1), goal.flatten(), eps, lengths=lengths.flatten())
    bits = (solved.mask.view(*goal.shape, 1) >> torch.arange(order.shape[-1])) & 1
    chosen = torch.zeros(values.shape, dtype=torch.int64)
    chosen.scatter_add_(1, parents.flatten(1), bits.flatten(1))
    return chosen > 0, (solved.status != OK).view(goal.shape)


def _first_links(links: Tensor, need: Tensor, children: int, parents: int) -> Tensor:
    """Of every needed (child copy, parent), the first of ``parents`` links that there is."""
    grid = links.view(need.shape[0], children, need.shape[1], parents)
    first = grid & (grid.cumsum(-1) == 1) & need[:, None, :, None]
    return first.view_as(links)


def _both_signs(layer: nn.Linear, copies: int) -> nn.Linear:
    """Copies of the univariate neurons x_i and -x_i."""
    eye = torch.eye(layer.in_features, dtype=layer.weight.dtype)
    return _linear(torch.stack([eye, -eye], 1).flatten(0, 1).repeat_interleave(copies, 0), None)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _uniform(seed: int, layer: str, shape: Sequence[int], stream: str, draw: int = 0) -> Tensor:
    """Numbers in (0, 1) from a stream of the layer."""
    number, sigma = ops.signed64(layer_number(layer)), 1 / math.sqrt(3)
    centred = ops.regenerate(seed, number, tuple(shape), "uniform", sigma, stream=stream, draw=draw)
    return 0.5 + 0.5 * centred
