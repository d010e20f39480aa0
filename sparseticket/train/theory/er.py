"""T6: Erdos-Renyi sources: coverage of the width factor, density rules, flow, a trained target."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...densities import layer_densities
from ...prng import permutation
from ...theory.er import (
    effective_density,
    er_masks,
    er_ticket,
    er_width,
    flow_correction,
    strong_er_ticket,
)
from ...theory.plant import circle
from ..loop import option
from .results import write_results

__all__ = ["Config", "run"]

_RULES = ("uniform", "erk", "balanced", "igq", "pyramidal")
_WIDTHS = (1, 1, 2, 2, 4, 4, 4, *[8] * 6)  # of VGG16's convolutions, in units of the first
_LINKS = (0.5, 0.1, 0.05, 0.01)
_DENSITIES = (0.5, 0.1, 0.01, 0.001)
_PARTS = (0.7, 0.8, 0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Config:
    """How often is measured, and how exactly."""

    delta: float = option(0.1, "failure probability that the width factor is for")
    pairs: int = option(500, "(child copy, parent) pairs of a source")
    runs: int = option(400, "sources for each density")
    eps: float = option(0.01, "error of a parameter of the strong ticket")
    base: int = option(15, "links that its subset sums choose from, about")
    vgg: int = option(64, "channels of the first layer of the VGG16 in the rules' table")
    seed: int = option(0, "of every random choice")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Layers of that VGG16, with a head of ten classes."""
        widths = [3, *(self.vgg * w for w in _WIDTHS)]
        return [*((o, i, 3, 3) for i, o in itertools.pairwise(widths)), (10, widths[-1])]


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``coverage``, ``rules`` (on VGG16's layers) and ``tickets``."""
    tables = {
        "coverage": [row for p in _LINKS for row in _coverage(config, p)],
        "rules": [_rule(config, rule, d) for d in _DENSITIES for rule in _RULES],
        "tickets": _tickets(config),
    }
    return write_results("er", out, config, tables, _draw)


def _draw(tables, figure) -> None:
    left, right = figure.subplots(1, 2)
    for p in _LINKS:
        rows = [row for row in tables["coverage"] if row["links"] == p]
        x, y = [row["part"] for row in rows], [row["covered"] for row in rows]
        left.plot(x, y, marker="o", label=f"p = {p}")
    left.axhline(tables["coverage"][0]["nominal"], linestyle="--", color="grey", label="nominal")
    left.set(xlabel="copies / width factor", ylabel="sources that cover the target")
    left.legend()
    for rule in _RULES:
        rows = [row for row in tables["rules"] if row["rule"] == rule]
        asked = [row["asked"] for row in rows]
        (line,) = right.plot(asked, [r["effective"] / r["asked"] for r in rows], label=rule)
        repaired = [r["repaired_effective"] / r["repaired"] for r in rows]
        right.plot(asked, repaired, color=line.get_color(), linestyle=":")
    right.set(xscale="log", xlabel="density asked for", ylabel="on a path (dotted: corrected)")
    right.legend()


def _coverage(config: Config, p: float) -> list[dict[str, Any]]:
    """Sources, each a mask of ``pairs`` rows of rho links, in which no row is empty."""
    rho, rows = er_width(p, config.pairs, config.delta), []
    for part in _PARTS:
        copies = max(round(part * rho), 1)
        shape = (config.runs * config.pairs, copies)
        (mask,) = er_masks([shape], [p], seed=config.seed, exact=False, name=f"er{p}-{part}")
        whole = mask.to_dense().any(1).view(config.runs, config.pairs).all(1)
        row = {"links": p, "part": part, "copies": copies, "nominal": 1 - config.delta}
        rows.append(row | {"covered": float(whole.float().mean())})
    return rows


def _rule(config: Config, rule: str, density: float) -> dict[str, Any]:
    """Achieved density, ours and as published, and what of a random mask lies on paths."""
    shapes = config.shapes
    sizes = [math.prod(shape) for shape in shapes]

    def overall(densities):
        return sum(d * n for d, n in zip(densities, sizes, strict=True)) / sum(sizes)

    densities = layer_densities(rule, shapes, density)
    masks = er_masks(shapes, densities, seed=config.seed)
    repaired = flow_correction(masks, seed=config.seed)
    kept = sum(m.kept for m in repaired) / sum(sizes)
    return {
        "rule": rule,
        "asked": density,
        "achieved": overall(densities),
        "published": overall(layer_densities(rule, shapes, density, compat=True)),
        "sparsest": min(densities),
        "effective": effective_density(masks),
        "repaired": kept,
        "repaired_effective": effective_density(repaired),
    }


def _tickets(config: Config) -> list[dict[str, Any]]:
    """A small network trained on the Circle, found again in random sources: its weights on random
    links, and random weights on random links."""
    task = circle(3)
    x, y = task.sample(4000, seed=config.seed)
    net = _trained(x[:3600], y[:3600], config.seed)
    wanted = net(x)
    rows = []
    for p in _LINKS[:2]:
        weak = er_ticket(net, [p] * 3, config.delta, seed=config.seed)
        strong = strong_er_ticket(net, p, base=config.base, eps=config.eps, seed=config.seed)
        for kind, found in (("weak", weak), ("strong", strong)):
            got = found.network(x).detach()
            rows.append(
                {
                    "ticket": kind,
                    "links": p,
                    "widths": "-".join(map(str, found.report["widths"])),
                    "kept": found.report["kept"],
                    "target_weights": found.report["target_weights"],
                    "missing": found.missing,
                    "sup_error": float((got - wanted).abs().max()),
                    "accuracy": _accuracy(got[3600:], y[3600:]),
                    "target_accuracy": _accuracy(wanted[3600:], y[3600:]),
                }
            )
    return rows


def _trained(x, y, seed) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(*[nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()])
        net.append(nn.Linear(4, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for epoch in range(12):
        for part in torch.from_numpy(permutation(seed, "er", len(x), draw=epoch)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.requires_grad_(False)


def _accuracy(logits, y) -> float:
    return float((logits.argmax(1) == y).float().mean())
