"""T1, the logarithm: golden-ratio bins, what a pool must hold, and what sharing it saves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...theory.log import GOLDEN, golden_bins, golden_greedy, log_ticket, pool_size
from ...theory.pairs import drawn
from ...theory.ticket import linear_with
from ..loop import option
from .results import write_results

__all__ = ["Config", "run"]

_GAMMA = 2 / 3
_BINS = 16
_TARGETS = 20_000
_SHARING = (1, 4, 16, 64)
_PARTS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12)
_HALVINGS = 10


@dataclass(frozen=True)
class Config:
    """How often is measured."""

    runs: int = option(50, "random sources for each size of a pool")
    weights: int = option(64, "most weights that share a pool, in powers of 4")
    delta: float = option(0.1, "failure probability that pools are sized for")
    seed: int = option(0, "of every random number")

    @property
    def sharing(self) -> list[int]:
        return [m for m in _SHARING if m <= self.weights]


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``remainder`` (the lemma), ``pools`` (batch sampling), ``growth`` and its ``fit``."""
    growth = [_growth(config, 0.4 / 2**k) for k in range(_HALVINGS)]
    tables = {
        "remainder": [_remainder(config, g) for g in (0.5, 0.55, GOLDEN, _GAMMA, 0.8)],
        "pools": [_pools(config, eps, m) for eps in (0.1, 0.01) for m in config.sharing],
        "growth": growth,
        "fit": [_line(growth)],
    }
    return write_results("log", out, config, tables, _draw)


def _remainder(config: Config, gamma: float) -> dict[str, Any]:
    """What greedy choices leave of random targets, the bins' weights random or at their ends."""
    like = torch.zeros(1, dtype=torch.float64)
    target = drawn(config.seed, "log.targets", (_TARGETS,), 1.0, like).abs()
    within = drawn(config.seed, "log.within", (_TARGETS, _BINS), 1.0, like).abs()
    within[::2] = within[::2].round()
    exponent = torch.arange(_BINS, dtype=like.dtype) + within
    _, rest = golden_greedy(gamma**exponent, target)
    bound = gamma ** (_BINS - 1)
    worst = float(rest.max())
    return {"gamma": gamma, "bins": _BINS, "bound": bound, "worst": worst, "ratio": worst / bound}


def _pools(config: Config, eps: float, m: int) -> dict[str, Any]:
    """Draws for each bin and weight that serve all ``m`` weights of an input in at least nine of
    ten sources, by trial, and by the bound."""
    bins = golden_bins(eps, _GAMMA)
    for part in _PARTS:
        draws = math.ceil(part * bins * m)
        failed = [_ticket(config, eps, m, run, draws).report.failed for run in range(config.runs)]
        served = failed.count(0) / config.runs
        if served >= 0.9:
            break
    return {
        "eps": eps,
        "bins": bins,
        "weights": m,
        "draws": draws,
        "each": draws / (bins * m),
        "served": served,
        "proved": pool_size(bins, m, config.delta / 2) / (bins * m),
    }


def _growth(config: Config, eps: float) -> dict[str, Any]:
    """Sixteen weights of one input in sources that the bound sizes."""
    m = 16
    reports = [_ticket(config, eps, m, run).report for run in range(4)]
    return {
        "eps": eps,
        "bins": golden_bins(eps, _GAMMA),
        "neurons": reports[0].widths[0] / m,
        "kept": sum(r.kept for r in reports) / (len(reports) * m),
        "failed": sum(r.failed for r in reports),
        "max_error": max(r.max_error for r in reports),
    }


def _ticket(config: Config, eps: float, m: int, run: int, draws: int | None = None):
    """``m`` random weights, the largest of them 1, in source ``run``."""
    seed = config.seed * config.runs + run
    weight = drawn(seed, f"log.target.{m}", (m, 1), 1.0, torch.zeros(1, dtype=torch.float64))
    target = nn.Sequential(linear_with(weight / weight.abs().max()))
    return log_ticket(target, eps, delta=config.delta, gamma=_GAMMA, draws=draws, seed=seed)


def _line(rows) -> dict[str, Any]:
    """neurons ~ offset + slope * ln(1/eps), and the part of the variance that this explains."""
    x = -np.log([row["eps"] for row in rows])
    y = np.array([row["neurons"] for row in rows])
    slope, offset = np.polyfit(x, y, 1)
    unexplained = np.var(y - offset - slope * x) / np.var(y)
    return {"slope": float(slope), "offset": float(offset), "r2": float(1 - unexplained)}


def _draw(tables, figure) -> None:
    left, right = figure.subplots(1, 2)
    rows = tables["growth"]
    eps = [row["eps"] for row in rows]
    left.plot(eps, [row["neurons"] for row in rows], marker="o", label="source, by the bound")
    left.plot(eps, [row["kept"] for row in rows], marker="o", label="weights kept")
    left.set(xscale="log", xlabel="eps", ylabel="for each target weight")
    left.legend()
    for eps in sorted({row["eps"] for row in tables["pools"]}):
        rows = [row for row in tables["pools"] if row["eps"] == eps]
        m = [row["weights"] for row in rows]
        (line,) = right.plot(m, [row["each"] for row in rows], marker="o", label=f"eps = {eps}")
        right.plot(m, [row["proved"] for row in rows], color=line.get_color(), ls=":")
    right.set(xscale="log", yscale="log", xlabel="weights that share a pool")
    right.set(ylabel="draws for each bin and weight (dotted: bound)")
    right.legend()
