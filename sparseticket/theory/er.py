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

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket.formats import check_density, kept_count
from sparseticket.masks import PackedMask, random_mask
from sparseticket.prng import check_seed

from .lplus1 import lplus1_ticket
from .pairs import uniform
from .ticket import linear_with

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
            drawn = uniform(seed, layer, shape, "mask") < check_density(density)
            masks.append(PackedMask.from_dense(drawn))
    return masks


def flow_correction(masks: Sequence[PackedMask], *, seed: int = 0) -> list[PackedMask]:
    """``masks`` and, for every output unit without an input, one random link of its row; then, for
    every input unit without an output, one of its column. Units are neurons or channels."""
    corrected = []
    for i, mask in enumerate(masks):
        dense = mask.to_dense()
        draws = uniform(seed, f"flow.{i}", mask.shape, "growth")
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
        layers += [linear_with(weight * chosen, bias), nn.ReLU()]
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

    The L+1 construction (:func:`lplus1_ticket`, which says what ``target`` may hold) in a source
    whose links are there with probability ``density``: rho copies of every neuron, rho such that of
    rho links about ``base`` or more survive. A source neuron with a parameter that cannot be met is
    passed over for another, up to ``redraws`` times. ``missing`` counts parameters that then still
    are off by more.
    """
    found = lplus1_ticket(target, base, eps, density=density, redraws=redraws, seed=seed)
    names = [name for name in found.masks if name.endswith("weight")][1:]
    masks = [found.masks[name] for name in names]
    source = [found.links.get(name, PackedMask.full(found.masks[name].shape)) for name in names]
    report = dataclasses.asdict(found.report) | {
        "copies": found.neurons[0].shape[1],
        "widths": list(found.report.widths),
        "source_links": sum(m.kept for m in source),
        "kept": sum(m.kept for m in masks),
    }
    return ERTicket(found.network, masks, source, found.report.failed, report)


def _first_links(links: Tensor, need: Tensor, children: int, parents: int) -> Tensor:
    """Of every needed (child copy, parent), the first of ``parents`` links that there is."""
    grid = links.view(need.shape[0], children, need.shape[1], parents)
    first = grid & (grid.cumsum(-1) == 1) & need[:, None, :, None]
    return first.view_as(links)


def _both_signs(layer: nn.Linear, copies: int) -> nn.Linear:
    """Copies of the univariate neurons x_i and -x_i."""
    eye = torch.eye(layer.in_features, dtype=layer.weight.dtype)
    return linear_with(torch.stack([eye, -eye], 1).flatten(0, 1).repeat_interleave(copies, 0), None)
