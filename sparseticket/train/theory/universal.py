"""T5: one mask for a family of functions: error against knots and width, readouts before and after
their re-fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...prng import layer_id, words32
from ...theory.universal import (
    REFITS,
    Curve,
    Fourier,
    Polynomials,
    UniversalTicket,
    fit_readout,
    universal_ticket,
)
from ..loop import option
from .results import write_results

__all__ = ["Config", "run"]

_REFITS = REFITS[::-1]  # the better, the later
_SINE = Curve(lambda x: (2 * math.pi * x).sin(), knots=21, curvature=4 * math.pi**2)
_MONOMIALS = Polynomials(((1,), (2,), (3,), (4,)))
# what the published code reaches on one seed: largest error, parameters kept of those drawn
_PUBLISHED = {"sine": (1.12e-2, 436, 68_292), "monomials": (1.11e-3, 1_074, 431_800)}
_FAMILIES = {
    "monomials": _MONOMIALS,
    "Fourier": Fourier.up_to(1, 4),
    "monomials, 2-D": Polynomials.of_degree(2, 3),
    "Fourier, 2-D": Fourier.up_to(2, 1),
}
_FUNCTIONS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "monomials": {
        "x^3 - x": lambda x: x[:, 0] ** 3 - x[:, 0],
        "exp x": lambda x: x[:, 0].exp(),
        "1 / (1 + 4 x)": lambda x: 1 / (1 + 4 * x[:, 0]),
        "|x - 1/2|": lambda x: (x[:, 0] - 0.5).abs(),
    },
    "Fourier": {
        "sin^3 2 pi x": lambda x: (2 * math.pi * x[:, 0]).sin() ** 3,
        "exp sin 2 pi x": lambda x: (2 * math.pi * x[:, 0]).sin().exp(),
        "|x - 1/2|": lambda x: (x[:, 0] - 0.5).abs(),
    },
    "monomials, 2-D": {
        "x y": lambda x: x[:, 0] * x[:, 1],
        "exp(-x y)": lambda x: (-x[:, 0] * x[:, 1]).exp(),
        "1 / (1 + x + y)": lambda x: 1 / (1 + x.sum(1)),
    },
    "Fourier, 2-D": {
        "sin 2 pi x cos 2 pi y": lambda x: (
            (2 * math.pi * x[:, 0]).sin() * (2 * math.pi * x[:, 1]).cos()
        ),
        "exp sin 2 pi (x + y)": lambda x: (2 * math.pi * x.sum(1)).sin().exp(),
    },
}


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment."""

    n: int = option(64, "random numbers for each weight, at most")
    eps: float = option(1e-4, "error of a weight")
    sources: int = option(3, "random sources of a row")
    max_knots: int = option(160, "most knots of a curve, in powers of 2 from 5")
    max_width: int = option(24, "largest n of the sweep, in steps of 2 from 4")
    points: int = option(4000, "random points: half to fit readouts, half to measure them")
    seed: int = option(0, "of the first source; the others' follow")

    def __post_init__(self) -> None:
        for name, least in (("max_knots", 5), ("max_width", 4), ("sources", 1), ("points", 200)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least {least}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.sources)


@torch.no_grad()
def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``published`` (its two tickets, by every re-fit), ``knots``, ``width``, ``families``
    and ``readouts``."""
    tickets = {
        name: universal_ticket(family, config.n, config.eps, seed=config.seed)
        for name, family in _FAMILIES.items()
    }
    tables = {
        "published": [
            _published(config, name, family, refit)
            for name, family in (("sine", _SINE), ("monomials", _MONOMIALS))
            for refit in _REFITS
        ],
        "knots": [
            _against(config, name, knots, _with_knots(name, knots), refit=refit)
            for name in ("sine", "monomials")
            for refit in _REFITS[1:]
            for knots in (5 * 2**k for k in range(16))
            if knots <= config.max_knots
        ],
        "width": [
            _against(config, name, n, family, n=n, refit=refit)
            for name, family in (("sine", _SINE), ("monomials", _MONOMIALS))
            for refit in _REFITS
            for n in range(4, config.max_width + 1, 2)
        ],
        "families": [_family(config, name, ticket) for name, ticket in tickets.items()],
        "readouts": [
            row for name, ticket in tickets.items() for row in _readouts(config, name, ticket)
        ],
    }
    return write_results("universal", out, config, tables, _draw)


def _draw(tables, figure) -> None:
    knots, width, readouts = figure.subplots(1, 3)
    for axes, table in ((knots, "knots"), (width, "width")):
        for i, name in enumerate(("sine", "monomials")):
            for refit, style in zip(_REFITS, (":", "--", "-"), strict=True):
                rows = [r for r in tables[table] if (r["family"], r["refit"]) == (name, refit)]
                x, y = [row[table] for row in rows], [row["error"] for row in rows]
                label = f"{name}, {refit.replace('_', ' ')}"
                axes.plot(x, y, color=f"C{i}", ls=style, marker=".", label=label if x else None)
    knots.set(xscale="log", yscale="log", xlabel="knots", ylabel="largest error of a feature")
    width.set(yscale="log", xlabel="n, numbers for a weight", ylabel="largest error, median")
    width.legend(fontsize=6)
    rows = tables["readouts"]
    place = range(len(rows))
    for key, marker in (("basis", "_"), ("before", "o"), ("after", "x")):
        readouts.plot([row[key] for row in rows], place, marker, label=key)
    readouts.set(xscale="log", xlim=(1e-5, 1), xlabel="rms error of functions, one mask a family")
    readouts.set_yticks(place, [f"{r['function']} ({r['family']})" for r in rows], fontsize=5)
    readouts.legend(fontsize=7)


def _published(config: Config, name: str, family, refit: str) -> dict[str, Any]:
    """Medians over the sources."""
    found = [
        universal_ticket(family, config.n, config.eps, refit=refit, seed=s) for s in config.seeds
    ]
    error, kept, drawn = _PUBLISHED[name]
    return {
        "family": name,
        "refit": refit,
        "knots": "-".join(str(curve.knots) for curve in found[0].curves),
        "error": _median(_error(t) for t in found),
        "bound": _median(float(t.feature_bound.max()) for t in found),
        "kept": _median(t.ticket.report.kept for t in found),
        "of": found[0].ticket.report.source_weights,
        "redraws": _median(t.ticket.report.redraws for t in found),
        "published_error": error,
        "published_kept": kept,
        "published_of": drawn,
    }


def _with_knots(name: str, knots: int):
    if name == "sine":
        return Curve(_SINE.function, knots, _SINE.curvature)
    return Polynomials(_MONOMIALS.exponents, log_knots=knots, exp_knots=knots)


def _against(config: Config, name: str, x: int, family, n: int = 0, refit: str = "none"):
    """Medians over the sources. Against width, every weight as near as n numbers come, without
    redraws; against knots, within eps / 10, which takes exact optima and so up to 32 numbers."""
    if n:
        options = {"n": n, "eps": 0.0, "redraws": 0, "objective": "min_error"}
    else:
        options = {"n": min(config.n, 32), "eps": config.eps / 10}
    found = [universal_ticket(family, refit=refit, seed=s, **options) for s in config.seeds]
    return {
        "family": name,
        "refit": refit,
        "width" if n else "knots": x,
        "error": _median(_error(t) for t in found),
        "bound": _median(float(t.feature_bound.max()) for t in found),
        "kept": _median(t.ticket.report.kept for t in found),
    }


def _error(found: UniversalTicket) -> float:
    """The largest of all features, on a grid of [0, 1]."""
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    return float((_features(found, x) - found.family(x)).abs().max())


def _features(found: UniversalTicket, x: Tensor) -> Tensor:
    """In parts: the source is wide."""
    return torch.cat([found.network(part) for part in x.split(256)])


def _median(values) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).median())


def _family(config: Config, name: str, found: UniversalTicket) -> dict[str, Any]:
    report, (x, _) = found.ticket.report, _points(config, found)
    return {
        "family": name,
        "features": len(found.feature_bound),
        "knots": "-".join(str(curve.knots) for curve in found.curves),
        "before": max(curve.before for curve in found.curves),
        "refit": max(curve.refit for curve in found.curves),
        "ticket": max(curve.error for curve in found.curves),
        "error": float((_features(found, x) - found.family(x)).abs().max()),
        "bound": float(found.feature_bound.max()),
        "weights": report.target_weights,
        "failed": report.failed,
        "redraws": report.redraws,
        "kept": report.kept,
        "of": report.source_weights,
    }


def _points(config: Config, found: UniversalTicket) -> tuple[Tensor, Tensor]:
    """Points of [0, 1]^d to fit on and others to measure on."""
    shape = config.points, found.family.inputs
    words = words32(config.seed, layer_id("universal.points"), *shape, "sampling", 0)
    x = torch.from_numpy((words >> 8).astype("float64")) * 2.0**-24
    return x[: len(x) // 2], x[len(x) // 2 :]


def _readouts(config: Config, name: str, found: UniversalTicket) -> list[dict[str, Any]]:
    """Errors of functions where readouts were not fitted: of the exact basis, of the ticket with
    that readout, and of the ticket with its own."""
    fit, other = _points(config, found)
    basis, rows = found.family, []
    features, seen = _features(found, fit), _features(found, other)
    for function, f in _FUNCTIONS[name].items():
        exact, own = fit_readout(basis(fit), f(fit)), fit_readout(features, f(fit))
        off = {
            "basis": exact(basis(other))[:, 0] - f(other),
            "before": exact(seen)[:, 0] - f(other),
            "after": own(seen)[:, 0] - f(other),
        }
        row = {"family": name, "function": function}
        row |= {key: float(error.square().mean().sqrt()) for key, error in off.items()}
        row |= {f"max_{key}": float(off[key].abs().max()) for key in ("before", "after")}
        rows.append(row | {"largest_coefficient": float(exact.weight.abs().max())})
    return rows
