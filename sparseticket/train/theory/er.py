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

__all__ = ["ER", "run"]

_RULES = ("uniform", "erk", "balanced", "igq", "pyramidal")
_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6)
_VGG16 = [*((o, i, 3, 3) for i, o in itertools.pairwise(_WIDTHS)), (10, 512)]


@dataclass(frozen=True)
class ER:
    """What is measured, and how often."""

    links: tuple[float, ...] = option((0.5, 0.1, 0.05, 0.01), "densities of the random sources")
    delta: float = option(0.1, "failure probability that the width factor is for")
    pairs: int = option(500, "(child copy, parent) pairs of a source")
    runs: int = option(400, "sources for each density")
    densities: tuple[float, ...] = option((0.5, 0.1, 0.01, 0.001), "of the rules' table, VGG16")
    eps: float = option(0.01, "error of a weight of the strong ticket")
    seed: int = option(0, "of every random choice")


def run(config: ER, out: Path) -> dict[str, Any]:
    """The tables of rows, the figure's curves."""
    return {
        "coverage": [_coverage(config, p) for p in config.links],
        "rules": [_rule(config, rule, d) for d in config.densities for rule in _RULES],
        "tickets": _tickets(config),
    }


def _coverage(config: ER, p: float) -> dict[str, Any]:
    """Sources, each a mask of ``pairs`` rows of rho links, in which no row is empty."""
    rho = er_width(p, config.pairs, config.delta)
    covered = {}
    for part in (0.8, 0.9, 1.0, 1.1):
        shape = (config.runs * config.pairs, max(round(part * rho), 1))
        (mask,) = er_masks([shape], [p], seed=config.seed, exact=False, name=f"er{p}-{part}")
        whole = mask.to_dense().any(1).view(config.runs, config.pairs).all(1)
        covered[part] = float(whole.float().mean())
    return {"links": p, "rho": rho, "nominal": 1 - config.delta, "covered": covered}


def _rule(config: ER, rule: str, density: float) -> dict[str, Any]:
    """Achieved density, ours and as published, and what of a random mask lies on paths."""
    sizes = [math.prod(shape) for shape in _VGG16]

    def overall(densities):
        return sum(d * n for d, n in zip(densities, sizes, strict=True)) / sum(sizes)

    densities = layer_densities(rule, _VGG16, density)
    masks = er_masks(_VGG16, densities, seed=config.seed)
    repaired = flow_correction(masks, seed=config.seed)
    kept = sum(m.kept for m in repaired) / sum(sizes)
    return {
        "rule": rule,
        "asked": density,
        "achieved": overall(densities),
        "published": overall(layer_densities(rule, _VGG16, density, compat=True)),
        "sparsest": min(densities),
        "effective": effective_density(masks),
        "repaired": kept,
        "repaired_effective": effective_density(repaired),
    }


def _tickets(config: ER) -> list[dict[str, Any]]:
    """A small network trained on the Circle, found again in random sources: its weights on random
    links, and random weights on random links."""
    task = circle(3)
    x, y = task.sample(4000, seed=config.seed)
    net = _trained(x[:3600], y[:3600], config.seed)
    wanted = net(x)
    rows = []
    for p in config.links[:2]:
        weak = er_ticket(net, [p] * 3, config.delta, seed=config.seed)
        strong = strong_er_ticket(net, p, eps=config.eps, seed=config.seed)
        for kind, found in (("weak", weak), ("strong", strong)):
            got = found.network(x)
            rows.append(
                {
                    "ticket": kind,
                    "links": p,
                    "widths": found.report["widths"],
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
