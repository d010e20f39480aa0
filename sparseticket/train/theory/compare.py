"""T1, the figure of all constructions: error against overparameterisation, on one target."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...prng import permutation
from ...theory.er import strong_er_ticket
from ...theory.log import log_ticket
from ...theory.malach import malach_ticket, neuron_subnetwork
from ...theory.pairs import drawn
from ...theory.pensia import pensia_ticket
from ...theory.ticket import linear_with
from ..loop import option
from .results import write_results

__all__ = ["CONSTRUCTIONS", "Config", "Found", "run"]

_GROWTH = 4  # of a source, at most, when eps is halved


@dataclass(frozen=True)
class Config:
    """The target, and how far sources may grow."""

    hidden: int = option(4, "neurons of the target's hidden layer")
    smallest: float = option(1e-4, "error of a weight, halved from 0.4 on down to this")
    source: int = option(20_000_000, "most weights of a source")
    seeds: int = option(3, "sources for each point")
    seed: int = option(0, "of every random number")

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 0.1:
            raise ValueError(f"smallest: got {self.smallest}, need a number in (0, 0.1]")

    @property
    def errors(self) -> list[float]:
        return [0.4 / 2**k for k in range(int(math.log2(0.4 / self.smallest)) + 1)]


class Found(NamedTuple):
    """What is compared: ``network`` on the target's inputs, weights of the source and those kept,
    parameters off by more than eps."""

    network: nn.Sequential
    source: int
    kept: int
    failed: int


Construct = Callable[[nn.Sequential, float, int], Found]


def _elements(eps: float) -> int:
    """Numbers for a subset sum, as in Pensia's code."""
    return 3 * math.ceil(math.log2(1 / eps))


def _ticket(found) -> Found:
    report = found.report
    return Found(found.network, report.source_weights, report.kept, report.failed)


def _copies(target: nn.Sequential, eps: float, seed: int, density: float) -> Found:
    found = strong_er_ticket(target, density, base=_elements(eps), eps=eps, seed=seed)
    first = found.network[0].weight  # which is whole, one weight a neuron, and in no mask
    source = found.report["source_links"] + first.numel()
    kept = found.report["kept"] + int((first != 0).sum())
    return Found(found.network, source, kept, found.missing)


CONSTRUCTIONS: dict[str, Construct] = {
    "Malach": lambda t, eps, seed: _ticket(malach_ticket(t, eps, seed=seed)),
    "Malach, products": lambda t, eps, seed: _ticket(
        malach_ticket(t, eps, rule="product", seed=seed)
    ),
    "Orseau, golden ratio": lambda t, eps, seed: _ticket(log_ticket(t, eps, seed=seed)),
    "Pensia": lambda t, eps, seed: _ticket(pensia_ticket(t, _elements(eps), eps, seed=seed)),
    "Burkholz, L+1": lambda t, eps, seed: _copies(t, eps, seed, 1.0),
    "L+1 on half the links": lambda t, eps, seed: _copies(t, eps, seed, 0.5),
}
_NEURONS = "Malach, whole neurons"


def run(config: Config, out: Path) -> dict[str, Any]:
    """Table ``constructions``, a row for each and eps, and ``growth`` at the smallest eps."""
    target, x = _target(config), _grid()
    rows = []
    for name, construct in CONSTRUCTIONS.items():
        for eps in config.errors:
            rows.append(_row(config, target, x, name, construct, eps))
            if _GROWTH * rows[-1]["source"] > config.source:
                break
    rows += [_neurons(config, target, x, 2**k) for k in range(5, 12)]
    growth = [_growth(rows, name) for name in (*CONSTRUCTIONS, _NEURONS)]
    return write_results("compare", out, config, {"constructions": rows, "growth": growth}, _draw)


def _target(config: Config) -> nn.Sequential:
    """Trained to |x| on the square, then both layers scaled to what every theorem assumes: no
    weight above 1 / sqrt(inputs), spectral norm at most 1. No biases, which some do not know."""
    like, hidden = torch.zeros(1), config.hidden
    x = drawn(config.seed, "compare.x", (1024, 2), 1.0, like)
    angles = torch.arange(hidden) + drawn(config.seed, "compare.angles", (hidden,), 0.3, like)
    angles *= 2 * math.pi / hidden
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    target = nn.Sequential(linear_with(directions), nn.ReLU(), linear_with(torch.ones(1, hidden)))
    target.requires_grad_(True)
    optimizer = torch.optim.Adam(target.parameters(), lr=0.02)
    for epoch in range(30):
        order = torch.from_numpy(permutation(config.seed, "compare", len(x), draw=epoch))
        for part in order.split(64):
            optimizer.zero_grad()
            (target(x[part])[:, 0] - x[part].norm(dim=1)).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        for layer in _linears(target):
            w = layer.weight
            largest = float(w.abs().max()) * math.sqrt(layer.in_features)
            w /= max(largest, float(torch.linalg.matrix_norm(w, 2)))
    return target.requires_grad_(False)


def _grid() -> Tensor:
    """Every point of [-1, 1]^2 at distances of 1/50."""
    line = torch.linspace(-1, 1, 101)
    return torch.cartesian_prod(line, line)


@torch.no_grad()
def _row(config: Config, target, x, name: str, construct: Construct, eps: float) -> dict[str, Any]:
    start = time.perf_counter()
    found = [construct(target, eps, config.seed + i) for i in range(config.seeds)]
    seconds = (time.perf_counter() - start) / config.seeds
    return _measured(target, x, name, found) | {"eps": eps, "seconds": seconds}


@torch.no_grad()
def _neurons(config: Config, target, x, k: int) -> dict[str, Any]:
    found = []
    for seed in range(config.seed, config.seed + config.seeds):
        points = drawn(seed, "compare.fit", (2000, 2), 1.0, x)
        ticket = neuron_subnetwork(points, target(points)[:, 0], k, ridge=1e-3, seed=seed)
        found.append(Found(ticket.network, 3 * k, 3 * int(ticket.kept.sum()), 0))
    return _measured(target, x, _NEURONS, found)


def _measured(target, x, name: str, found: list[Found]) -> dict[str, Any]:
    """Means over the sources; the worst error on the grid, as a part of the target's range."""
    weights = sum(m.weight.numel() for m in _linears(target))
    wanted, n = target(x), len(found)
    worst = []
    for one in found:
        network = _live(one.network)
        got = network(x.to(network[0].weight.dtype))
        worst.append(float((got - wanted).abs().max() / (wanted.max() - wanted.min())))
    hidden = sum(m.out_features for f in found for m in _linears(f.network)[:-1])
    return {
        "construction": name,
        "eps": "",
        "depth": len(_linears(found[0].network)),
        "neurons": hidden / n,
        "source": sum(f.source for f in found) / n,
        "factor": sum(f.source for f in found) / n / weights,
        "kept": sum(f.kept for f in found) / n / weights,
        "failed": sum(f.failed for f in found),
        "error": sum(worst) / n,
    }


def _live(network: nn.Sequential) -> nn.Sequential:
    """``network`` without the hidden neurons that carry nothing; the same function."""
    layers = _linears(network)
    alive, live = slice(None), []
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        used = slice(None)
        if after is not None:
            used = (layer.weight != 0).any(1)
            used = used if layer.bias is None else used | (layer.bias != 0)
            used = used & (after.weight != 0).any(0)
        bias = None if layer.bias is None else layer.bias[used]
        live += [linear_with(layer.weight[used][:, alive], bias), nn.ReLU()]
        alive = used
    return nn.Sequential(*live[:-1])


def _growth(rows, name: str) -> dict[str, Any]:
    """By which power of 1/error neurons grow over the last three halvings of eps, or doublings of
    neurons; towards 0 for a logarithm."""
    own = [row for row in rows if row["construction"] == name][-4:]
    error = [row["eps"] or row["error"] for row in own]
    neurons = [row["neurons"] for row in own]
    last, power = own[-1], ""
    if len(own) > 1:
        power = -float(np.polyfit(np.log(error), np.log(neurons), 1)[0])
    return {
        "construction": name,
        "eps": last["eps"],
        "neurons": last["neurons"],
        "error": last["error"],
        "power": power,
    }


def _linears(network: nn.Sequential) -> list[nn.Linear]:
    return [m for m in network if isinstance(m, nn.Linear)]


def _draw(tables, figure) -> None:
    parts = {
        "neurons": "hidden neurons of the source",
        "factor": "source weights / target weights",
        "kept": "kept weights / target weights",
    }
    panels = figure.subplots(1, 3, sharey=True)
    for name in (*CONSTRUCTIONS, _NEURONS):
        rows = [row for row in tables["constructions"] if row["construction"] == name]
        error = [row["error"] for row in rows]
        for axes, part in zip(panels, parts, strict=True):
            axes.plot([row[part] for row in rows], error, marker="o", ms=3, label=name)
    for axes, label in zip(panels, parts.values(), strict=True):
        axes.set(xscale="log", yscale="log", xlabel=label)
    panels[0].set(ylabel="largest error / range of the target")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=7)
