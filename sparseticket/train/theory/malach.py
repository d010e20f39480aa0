"""T1, the power laws: single random neurons for a weight, and whole neurons for a function."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...theory.malach import malach_ticket, neuron_subnetwork
from ...theory.pairs import drawn
from ...theory.ticket import linear_with
from ..loop import option
from .results import write_results

__all__ = ["Config", "run"]

_RULES = ("paper", "product")
_ERRORS = (0.4, 0.2, 0.1, 0.05, 0.025)
_INPUTS = (2, 8, 32)
_SAMPLES = 1000


@dataclass(frozen=True)
class Config:
    """How often is measured, and up to what width."""

    runs: int = option(400, "random weights for each error, each in a source of its own")
    delta: float = option(0.1, "failure probability that the paper's rule is sized for")
    neurons: int = option(2048, "most random neurons to keep or drop, in powers of 2 from 32")
    sources: int = option(8, "random layers for each number of neurons")
    seed: int = option(0, "of every random number")

    def __post_init__(self) -> None:
        if self.neurons < 64:
            raise ValueError(f"neurons: got {self.neurons}, need at least 64 for the fits")

    @property
    def widths(self) -> list[int]:
        return [2**k for k in range(5, self.neurons.bit_length())]


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``weights`` (subnetworks by weights), ``neurons`` (by neurons) and ``fits``, the
    exponents of errors in neurons."""
    weights = [_weights(config, rule, eps) for rule in _RULES for eps in _ERRORS]
    neurons = [_neurons(config, d, k) for d in _INPUTS for k in config.widths]
    fits = [
        {"of": rule, "exponent": _exponent(weights, "rule", rule, "median", "eps")}
        for rule in _RULES
    ]
    fits += [
        {"of": f"neurons, d = {d}", "exponent": _exponent(neurons, "d", d, "neurons", "chance")}
        for d in _INPUTS
    ]
    tables = {"weights": weights, "neurons": neurons, "fits": fits}
    return write_results("malach", out, config, tables, _draw)


def _weights(config: Config, rule: str, eps: float) -> dict[str, Any]:
    """One-weight targets, 0.2 to 0.7 and both signs: how many neurons until both are found."""
    u = drawn(config.seed, "malach.target", (config.runs,), 1.0, torch.zeros(1))
    needed, errors = [], []
    for i, alpha in enumerate(u.sign() * (0.2 + 0.5 * u.abs())):
        target = nn.Sequential(linear_with(alpha.view(1, 1)))
        seed = config.seed * config.runs + i
        ticket = malach_ticket(target, eps, delta=config.delta, rule=rule, seed=seed)
        hits = ticket.masks["0.weight"].to_dense().flatten().nonzero()
        needed.append(math.inf if ticket.report.failed else int(hits.max()) + 1)
        errors.append(ticket.report.max_error)
    return {
        "rule": rule,
        "eps": eps,
        "block": ticket.report.widths[0],
        "median": statistics.median(needed),
        "found": sum(map(math.isfinite, needed)) / config.runs,
        "nominal": 1 - config.delta if rule == "paper" else "",
        "median_error": statistics.median(errors),
    }


@torch.no_grad()
def _neurons(config: Config, d: int, k: int) -> dict[str, Any]:
    """One ReLU neuron of ``d`` inputs by ``k`` random ones: errors by root mean square on new
    points, as parts of the target's: of the best combination, of the subnetwork against it
    (``chance``), and of the subnetwork."""
    like = torch.zeros(1, dtype=torch.float64)
    direction = drawn(config.seed, f"malach.direction.{d}", (d,), 1.0, like)
    x = drawn(config.seed, f"malach.x.{d}", (2 * _SAMPLES, d), 1.0, like)
    y = (x @ (direction / direction.norm())).relu()
    squares, kept = torch.zeros(3, dtype=torch.float64), 0
    for source in range(config.sources):
        seed = config.seed * config.sources + source
        found = neuron_subnetwork(x[:_SAMPLES], y[:_SAMPLES], k, seed=seed)
        best, got = (net(x[_SAMPLES:])[:, 0] for net in (found.features, found.network))
        wanted = y[_SAMPLES:]
        squares += torch.stack([_square(best - wanted), _square(got - best), _square(got - wanted)])
        kept += int(found.kept.sum())
    features, chance, total = (squares / config.sources / _square(wanted)).sqrt().tolist()
    return {
        "d": d,
        "neurons": k,
        "kept": kept / config.sources / k,
        "features": features,
        "chance": chance,
        "subnetwork": total,
    }


def _square(x: Tensor) -> Tensor:
    return x.square().mean()


def _exponent(rows, key: str, value: Any, x: str, y: str) -> float:
    """p of y ~ x^p, by least squares on the logarithms of the rows of ``value``."""
    pairs = [(row[x], row[y]) for row in rows if row[key] == value]
    return float(np.polyfit(*np.log(pairs).T, 1)[0])


def _draw(tables, figure) -> None:
    left, right = figure.subplots(1, 2)
    for rule in _RULES:
        rows = [row for row in tables["weights"] if row["rule"] == rule]
        eps = [row["eps"] for row in rows]
        (line,) = left.plot([row["median"] for row in rows], eps, marker="o", label=f"{rule} rule")
        left.plot([row["block"] for row in rows], eps, color=line.get_color(), ls=":")
    left.set(xscale="log", yscale="log", ylabel="error of a weight, eps")
    left.set(xlabel="neurons until both are found, median (dotted: searched)")
    left.legend()
    for d in _INPUTS:
        rows = [row for row in tables["neurons"] if row["d"] == d]
        k = [row["neurons"] for row in rows]
        (line,) = right.plot(k, [r["subnetwork"] for r in rows], marker="o", label=f"{d} inputs")
        right.plot(k, [r["features"] for r in rows], color=line.get_color(), ls=":")
    right.set(xscale="log", yscale="log", xlabel="random neurons, kept or dropped whole")
    right.set(ylabel="error / target (dotted: best combination)")
    right.legend()
