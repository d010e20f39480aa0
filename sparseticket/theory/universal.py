"""Tickets for a family of functions: Burkholz, Laha, Mukherjee, Gotovos, "On the existence of
universal lottery tickets", ICLR 2022 (arXiv 2111.11146).

A ticket is strongly universal for a family if every function of it is linear in what the ticket
computes: one mask, one linear readout per function. The tickets here hold a basis. A monomial is
exp(sum_i k_i log u_i), u = (1 + x) / 2, a Fourier mode sin 2 pi (k . x + phase): linear layers and
functions of one number, which all coordinates share. Such a function is a sum of ReLUs, one for
every knot of its interpolation, and every layer is a pair of random layers with a mask.

The re-fit: masks only meet the inner weights approximately, which moves the knots. The outer
weights are fitted to the knots as they are, and only then approximated, so that the second
layer makes up for the errors of the first. Readouts are fitted to the ticket's own features alike.

Deviations from the paper and from its code (RelationalML/UniversalLT, subsetsum.py):

- the code re-fits by interpolation at the moved knots (``refit="interpolate"``); least squares on a
  fine grid, the default, has two thirds of its error;
- fewest elements within ``eps``, where the code takes the best of up to five; one neuron of the
  first layer serves all knots, there each is used once;
- a layer in which a weight cannot be met is drawn again, there the weight stays as it is;
- inner and outer weights of all knots are balanced, sqrt|change of slope|, the first one's too;
- the exponential lives on the range that its input was measured to have, there on a guess.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparseticket.masks import PackedMask
from sparseticket.prng import check_seed

from .pairs import layer_pair
from .ticket import Construction, linear_with, masked

__all__ = [
    "REFITS",
    "Curve",
    "CurveReport",
    "Fourier",
    "Polynomials",
    "UniversalTicket",
    "fit_readout",
    "universal_ticket",
]

REFITS = ("least_squares", "interpolate", "none")
_BOUND = "feature k is off by at most feature_bound[k] on the whole domain"
_LIMIT = 2.0  # source weights are U[-2, 2], as in the paper's code
_FINE = 32  # points of the grid between two knots
_PRICE = 1e-6  # of a squared change of an outer weight, in squared errors


@dataclass(frozen=True)
class CurveReport:
    """A function of one number as it was found.

    Errors are bounds on the whole interval: the largest on a grid with all knots, between which the
    network is straight, plus what ``curvature`` allows between points. ``before``: with the outer
    weights of the unpruned network on the pruned knots; ``refit``: with re-fitted ones; ``error``:
    with theirs approximated, the ticket's. ``rms_before``, ``rms_refit``: on the grid.
    """

    knots: int
    before: float
    refit: float
    error: float
    rms_before: float
    rms_refit: float


@dataclass(frozen=True)
class UniversalTicket:
    """``ticket.network`` computes the features ``[*, K]`` of ``family`` from points ``[*, d]`` with
    the random weights that one set of masks keeps; ``curves``: one report for each of its functions
    of one number; ``feature_bound`` [K]: proved from them and from the measured errors of weights.
    """

    family: Family
    ticket: Construction
    curves: tuple[CurveReport, ...]
    feature_bound: Tensor

    @property
    def network(self) -> nn.Sequential:
        return self.ticket.network

    @torch.no_grad()
    def readout(self, x: Tensor, y: Tensor) -> nn.Linear:
        """The linear layer on the features that is nearest to values ``y`` [N] or [N, m] at points
        ``x`` [N, d], in least squares: a function of the family without another mask."""
        if x.ndim != 2 or x.shape[1] != self.family.inputs:
            raise ValueError(f"x: got {tuple(x.shape)}, need [N, {self.family.inputs}]")
        return fit_readout(self.network(x), y)


@torch.no_grad()
def fit_readout(features: Tensor, y: Tensor) -> nn.Linear:
    """Weights and bias of least squares (of least norm, where several are) from ``features``
    [N, K] to ``y`` [N] or [N, m]."""
    y = y[:, None] if y.ndim == 1 else y
    if features.ndim != 2 or y.ndim != 2 or len(features) != len(y) or not len(y):
        raise ValueError(
            f"features, y: got {tuple(features.shape)}, {tuple(y.shape)}, need [N, K] and [N] or "
            "[N, m], N > 0"
        )
    if not bool(features.isfinite().all() and y.isfinite().all()):
        raise ValueError("features, y: need finite numbers")
    solution = _least_squares(_with_one(features), y.to(features.dtype))
    return linear_with(solution[:-1].T.contiguous(), solution[-1])


@torch.no_grad()
def universal_ticket(
    family: Family,
    n: int = 64,
    eps: float = 1e-4,
    *,
    refit: str = "least_squares",
    redraws: int = 10,
    seed: int = 0,
    **solver: Any,
) -> UniversalTicket:
    """The features of ``family`` in a random network, float64.

    ``n``: random numbers to choose from for each weight, at most 64: the more, the fewer are kept;
    but for an ``eps``, the error of a weight, below 1e-4 at most 32, where the exact optimum is
    sought.
    ``refit``: how the outer weights of a function of one number are fitted to its pruned knots:
    ``least_squares``, ``interpolate`` (exact at the knots) or ``none`` (those of the unpruned one).
    A pair of layers with a weight off by more than ``eps`` is drawn again up to ``redraws`` times;
    if none is free of them the one with the fewest stays and they count as ``failed``. ``solver``:
    further arguments of :func:`subset_sum`.
    """
    check_seed(seed)
    if not 1 <= n <= 64:
        raise ValueError(f"n: got {n}, need 1 to 64")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, need a finite number >= 0")
    if redraws < 0:
        raise ValueError(f"redraws: got {redraws}, need 0 or more")
    if refit not in REFITS:
        raise ValueError(f"refit: got {refit!r}, accepted: {', '.join(REFITS)}")
    source = _Source(n, eps, seed, redraws, refit, solver)
    bound = family.grow(source)
    ticket = Construction.of(
        nn.Sequential(*source.modules),
        source.masks,
        source.targets,
        torch.cat(source.errors),
        eps,
        _BOUND,
        source.redrawn,
    )
    return UniversalTicket(family, ticket, tuple(source.curves), bound)


class Family(Protocol):
    """What :func:`universal_ticket` takes: K functions on points of ``inputs`` numbers."""

    @property
    def inputs(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Exact features ``[*, K]`` of points ``[*, inputs]``."""

    def grow(self, source: _Source) -> Tensor:
        """Add the layers to ``source``; returns bounds on the errors of features [K]."""


@dataclass(frozen=True)
class Curve:
    """One function of one number on [``low``, ``high``], which must not cross 0, by ``knots`` ReLUs
    at equal distances. ``curvature``: a bound on \\|f''\\| there; interpolation is off by at most
    curvature (high - low)^2 / (8 knots^2)."""

    function: Callable[[Tensor], Tensor]
    knots: int
    curvature: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_knots("knots", self.knots)
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"low, high: got {self.low}, {self.high}, need low < high, finite")
        if self.low < 0 < self.high:
            raise ValueError(f"low, high: got {self.low}, {self.high}, need one side of 0")
        if not 0 <= self.curvature < math.inf:
            raise ValueError(f"curvature: got {self.curvature}, need a finite number >= 0")
        if not bool(self.function(self.grid()).isfinite().all()):
            raise ValueError("function: it is not finite on the whole interval")

    inputs = 1

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def grow(self, source: _Source) -> Tensor:
        _, report = source.curve(self)
        return torch.tensor([report.error], dtype=torch.float64)

    def grid(self, cells: int | None = None) -> Tensor:
        cells = cells or _FINE * self.knots
        return torch.linspace(self.low, self.high, cells + 1, dtype=torch.float64)

    def layers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias of the ReLUs [knots], and what they are summed with [knots + 1], the
        constant last, so that the sum is the function at equally distant knots."""
        t = self.grid(self.knots)
        y = self.function(t)
        slope = y.diff() / t.diff()
        change = torch.cat([slope[:1], slope.diff()])
        weight = change.abs().sqrt()
        return weight, -t[:-1] * weight, torch.cat([change.sign() * weight, y[:1]])


@dataclass(frozen=True)
class Polynomials:
    """Monomials prod_i ((1 + x_i) / 2)^k_i on [0, 1]^d, one for each row k of ``exponents`` [K][d],
    any numbers >= 0: with the readout's constant, all polynomials in x with those of their degrees.
    """

    exponents: tuple[tuple[float, ...], ...]
    log_knots: int = 10
    exp_knots: int = 40

    def __post_init__(self) -> None:
        powers = _matrix("exponents", self.exponents)
        if not (bool((powers >= 0).all()) and bool(powers.any())):
            raise ValueError("exponents: need numbers >= 0, not all of them 0")
        _check_knots("log_knots", self.log_knots)
        _check_knots("exp_knots", self.exp_knots)

    @classmethod
    def of_degree(cls, inputs: int, degree: int, **knots: int) -> Polynomials:
        """All monomials of total degree 1 to ``degree`` in ``inputs`` variables."""
        powers = itertools.product(range(degree + 1), repeat=inputs)
        chosen = sorted((k for k in powers if 0 < sum(k) <= degree), key=lambda k: (sum(k), k))
        return cls(tuple(chosen), **knots)

    @property
    def inputs(self) -> int:
        return len(self.exponents[0])

    def __call__(self, x: Tensor) -> Tensor:
        powers = torch.tensor(self.exponents, dtype=x.dtype)
        return ((1 + x[..., None, :]) / 2).pow(powers).prod(-1)

    def grow(self, source: _Source) -> Tensor:
        log = Curve(lambda x: ((1 + x) / 2).log(), self.log_knots, curvature=1.0)
        powers = torch.tensor(self.exponents, dtype=torch.float64)
        values, inner = source.shared(log, self.inputs)
        least = min(values[0], -math.log(2))  # what is above 0 does not pass the next layer
        found, _ = source.affine(powers, None, sign=-1)
        low = float(torch.maximum(found, powers).sum(1).max()) * least
        exp = Curve(torch.exp, self.exp_knots, curvature=1.0, low=low, high=0.0)
        _, outer = source.shared(exp, len(powers))
        moved = powers.sum(1) * inner.error - (found - powers).abs().sum(1) * least
        return outer.error + moved  # |exp a - exp b| <= |a - b| below 0


@dataclass(frozen=True)
class Fourier:
    """sin and cos of 2 pi k . x on [0, 1]^d for each row k of ``frequencies`` [K/2][d], integers:
    with the readout's constant, all trigonometric polynomials of these. ``knots``: of a period."""

    frequencies: tuple[tuple[int, ...], ...]
    knots: int = 21

    def __post_init__(self) -> None:
        waves = _matrix("frequencies", self.frequencies)
        if not bool((waves == waves.round()).all()):
            raise ValueError("frequencies: need integers")
        _check_knots("knots", self.knots)

    @classmethod
    def up_to(cls, inputs: int, frequency: int, knots: int = 21) -> Fourier:
        """All frequencies with entries of at most ``frequency``, one of k and -k, without 0."""
        waves = itertools.product(range(-frequency, frequency + 1), repeat=inputs)
        return cls(tuple(k for k in waves if k > (0,) * inputs), knots)

    @property
    def inputs(self) -> int:
        return len(self.frequencies[0])

    def __call__(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * (x @ torch.tensor(self.frequencies, dtype=x.dtype).T)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)

    def grow(self, source: _Source) -> Tensor:
        """The sine of k . x + phase, with as many whole periods added as make it positive."""
        waves = torch.tensor(self.frequencies, dtype=torch.float64).repeat_interleave(2, 0)
        phase = torch.tensor([0.0, 0.25], dtype=torch.float64).repeat(len(self.frequencies))
        phase = phase - waves.clamp(max=0).sum(1)
        found, at = source.affine(waves, phase, sign=1)
        last = float((torch.maximum(found, waves).clamp(min=0).sum(1) + at.maximum(phase)).max())
        knots = math.ceil(self.knots * last)
        sine = Curve(lambda t: (2 * math.pi * t).sin(), knots, 4 * math.pi**2, high=last)
        _, outer = source.shared(sine, len(waves))
        moved = (found - waves).abs().sum(1) + (at - phase).abs()
        return outer.error + 2 * math.pi * moved


class _Source:
    """A random network and its masks, as they grow pair by pair."""

    def __init__(self, n, eps, seed, redraws, refit, solver) -> None:
        self.n, self.eps, self.seed, self.redraws = n, eps, seed, redraws
        self.refit, self.solver = refit, solver
        self.modules: list[nn.Module] = []
        self.masks: dict[str, PackedMask] = {}
        self.targets: list[nn.Linear] = []
        self.errors: list[Tensor] = []
        self.curves: list[CurveReport] = []
        self.redrawn = 0

    def pair(self, weight: Tensor, bias: Tensor | None, sign: int) -> nn.Sequential:
        """A pair for ``weight @ x + bias`` with x of ``sign``; returns it as pruned."""
        best, fewest = None, math.inf
        for draw in range(self.redraws + 1):
            name = f"universal.{len(self.targets)}.{draw}"
            found = layer_pair(
                weight, bias, self.n, self.eps, name, self.seed, self.solver, (sign,), _LIMIT
            )
            failed = int((found.error > self.eps).sum())
            if failed < fewest:
                best, fewest = found, failed
            if not failed:
                break
        self.redrawn += draw * len(found.modules[0].weight)
        masks = {key: PackedMask.from_dense(mask) for key, mask in best.masks.items()}
        start = len(self.modules)
        self.masks |= {f"{start + i}.{name}": mask for (i, name), mask in masks.items()}
        self.modules += best.modules
        self.targets.append(linear_with(weight, bias))
        self.errors.append(best.error)
        pruned = {f"{i}.{name}": mask for (i, name), mask in masks.items()}
        return masked(nn.Sequential(*best.modules), pruned)

    def affine(self, weight: Tensor, bias: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
        """The same; returns the weight and the bias that it has."""
        pruned = self.pair(weight, bias, sign)
        return _affine(pruned, weight.shape[1], sign)

    def shared(self, curve: Curve, times: int) -> tuple[tuple[float, float], CurveReport]:
        """:meth:`curve` of each of ``times`` numbers."""
        self.modules.append(nn.Unflatten(-1, (times, 1)))
        found = self.curve(curve)
        self.modules.append(nn.Flatten(-2))
        return found

    def curve(self, curve: Curve) -> tuple[tuple[float, float], CurveReport]:
        """The layers of a function of one number; returns the range of its values."""
        sign = 1 if curve.high > 0 else -1
        weight, bias, ideal = curve.layers()
        inner = self.pair(weight[:, None], bias, sign)
        self.modules.append(nn.ReLU())
        knots = _knots(*_affine(inner, 1, sign))
        points = _merged(curve, knots)

        def hidden(x: Tensor) -> Tensor:
            return inner(x[:, None]).relu()

        fitted = ideal + self._correction(curve, knots, hidden, ideal)
        outer = self.pair(fitted[None, :-1], fitted[-1:], sign=1)
        values = outer(hidden(points))[:, 0]

        def off(combination: Tensor, x: Tensor) -> Tensor:
            return _with_one(hidden(x)) @ combination - curve.function(x)

        gap = curve.curvature * float(points.diff().max()) ** 2 / 8
        before, refit = (float(off(c, points).abs().max()) + gap for c in (ideal, fitted))
        rms = [float(off(c, curve.grid()).square().mean().sqrt()) for c in (ideal, fitted)]
        error = float((values - curve.function(points)).abs().max()) + gap
        report = CurveReport(curve.knots, before, refit, error, *rms)
        self.curves.append(report)
        return (float(values.min()), float(values.max())), report

    def _correction(self, curve: Curve, knots: Tensor, hidden, ideal: Tensor) -> Tensor:
        """What the re-fit adds to the outer weights. Least squares pays a little for its size, so
        that it makes no huge weights out of knots that have met, and is never worse than none."""
        if self.refit == "none":
            return torch.zeros_like(ideal)
        nodes = curve.grid() if self.refit == "least_squares" else _nodes(curve, knots)
        features = _with_one(hidden(nodes))
        rest = curve.function(nodes) - features @ ideal
        if self.refit == "least_squares":
            price = math.sqrt(_PRICE * len(nodes)) * torch.eye(len(ideal), dtype=ideal.dtype)
            features, rest = torch.cat([features, price]), torch.cat([rest, 0 * ideal])
        return _least_squares(features, rest)


def _affine(pair: nn.Sequential, columns: int, sign: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a pair on inputs of ``sign``, where it is linear."""
    like = pair[0].weight
    bias = pair(like.new_zeros(columns))
    return (pair(sign * torch.eye(columns, dtype=like.dtype)) - bias).T * sign, bias


def _knots(weight: Tensor, bias: Tensor) -> Tensor:
    """Where the ReLUs of weight [N, 1] and bias [N] bend, in order; those of weight 0 do not."""
    bends = weight[:, 0] != 0
    return (-bias[bends] / weight[bends, 0]).sort().values


def _merged(curve: Curve, knots: Tensor) -> Tensor:
    """The grid and the knots inside it."""
    inside = knots[(knots > curve.low) & (knots < curve.high)]
    return torch.cat([curve.grid(), inside]).sort().values


def _nodes(curve: Curve, knots: Tensor) -> Tensor:
    """Where the re-fit is exact: knots, and the ends of the interval."""
    inside = knots[(knots > curve.low) & (knots < curve.high)]
    return torch.cat([inside.new_tensor([curve.low]), inside, inside.new_tensor([curve.high])])


def _with_one(features: Tensor) -> Tensor:
    """A constant behind the features."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def _least_squares(matrix: Tensor, y: Tensor) -> Tensor:
    """Of least norm where there are several."""
    if y.ndim == 1:
        return _least_squares(matrix, y[:, None])[:, 0]
    return torch.linalg.lstsq(matrix, y, driver="gelsd").solution


def _check_knots(name: str, knots: int) -> None:
    if isinstance(knots, bool) or not isinstance(knots, int) or knots < 1:
        raise ValueError(f"{name}: got {knots!r}, need an integer >= 1")


def _matrix(name: str, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    widths = {len(row) if isinstance(row, tuple | list) else 0 for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"{name}: got rows of {sorted(widths)} numbers, need one length > 0")
    matrix = torch.tensor(rows, dtype=torch.float64)
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name}: need finite numbers")
    return matrix
