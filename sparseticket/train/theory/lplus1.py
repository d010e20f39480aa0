"""T4: trained networks in random ones of one layer more: error, size, activations; L+1 and 2L."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...masks import regenerate
from ...theory.lplus1 import lplus1_bound, lplus1_budgets, lplus1_ticket
from ..data import Dataset, load_dataset, loaders
from ..extractors import build_extractor
from ..loop import Recipe, option, train_dense
from .results import write_results

__all__ = ["Config", "run"]

_ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
_NETS = ("mlp", "conv")
_SMALL_BASES = (8, 10, 12, 14)
_LENET_BASES, _LENET_EPS = (28, 24, 28, 20, 20), 0.03  # its first layers need errors near 1e-6


@dataclass(frozen=True)
class Config:
    """The targets, and what they are found in."""

    dataset: Literal["digits", "mnist"] = option("digits", "what the targets are trained on")
    data: Path | None = field(
        default=None, metadata={"help": "folder of the data files; else SPARSETICKET_DATA"}
    )
    nets: Literal["small", "lenet"] = option(
        "small", "an MLP and a convolutional network trained here, or a pretrained LeNet-5 (mnist)"
    )
    hidden: int = option(32, "neurons of the MLP's first hidden layer, twice those of its second")
    channels: int = option(6, "of the first convolution, half of those of the second")
    epochs: int = option(20, "of training a target")
    base: int = option(20, "random numbers for each weight")
    eps: float = option(0.01, "error of a weight")
    redraws: int = option(20, "source neurons that a neuron may pass over")
    images: int = option(500, "test images for errors and accuracies, at most")
    sources: int = option(10, "random networks for the table of redraws")
    seed: int = option(0, "of every random choice")

    def __post_init__(self) -> None:
        if self.nets == "lenet" and self.dataset != "mnist":
            raise ValueError(f"nets: got lenet with dataset={self.dataset!r}, need mnist")

    @property
    def sweep(self) -> list[tuple[int, float]]:
        """Bases and errors of the first table, around those of the others."""
        bases = [max(self.base - 5, 1), self.base, min(self.base + 10, 64)]
        return [(n, self.eps * factor) for n in bases for factor in (10, 3, 1, 0.3)]


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``depth``: L+1 beside 2L; and for the small nets ``sweep`` over base and eps,
    ``activations``, ``redraws`` on a random network."""
    dataset = load_dataset(config.dataset, config.data, seed=config.seed)
    tables = _lenet(dataset, config) if config.nets == "lenet" else _small(dataset, config)
    return write_results("lplus1", out, config, tables, _draw)


def _small(dataset: Dataset, config: Config) -> dict[str, list[dict[str, Any]]]:
    images = dataset.test.x[: config.images], dataset.test.y[: config.images]
    radius = float(dataset.train.x.abs().max())
    found = _Found(*images, config.base, config.eps, config.redraws, config.seed, radius)
    targets = {(n, a): _trained(n, a, dataset, config) for n in _NETS for a in _ACTIVATIONS}
    both = {key: found.both(target) for key, target in targets.items()}
    return {
        "sweep": [
            {"net": n, "base": base, "eps": eps} | found.one_more(targets[n, "relu"], base, eps)
            for n in _NETS
            for base, eps in config.sweep
        ],
        "activations": [
            {"net": n, "activation": a} | row for (n, a), rows in both.items() for row in rows
        ],
        "depth": [
            {"net": n} | row
            for n in _NETS
            for row in (*both[n, "relu"], found.twice(targets[n, "relu"]))
        ],
        "redraws": [_redraws(config, n, most) for n in _SMALL_BASES for most in (0, 1000)],
    }


def _lenet(dataset: Dataset, config: Config) -> dict[str, list[dict[str, Any]]]:
    """LeNet-5, which somebody else has trained, on images in [0, 1] of 32 x 32."""
    target = build_extractor("lenet", dataset.in_shape, data=config.data).net
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (dataset.mean, dataset.std))
    x = dataset.test.x[: config.images] * std + mean
    x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    found = _Found(
        x,
        dataset.test.y[: config.images],
        _LENET_BASES,
        _LENET_EPS,
        config.redraws,
        config.seed,
        radius=1.0,
        nonnegative=True,
    )
    rows = (*found.both(target), found.twice(target))
    return {"depth": [{"net": "lenet"} | row for row in rows]}


def _redraws(config: Config, base: int, most: int) -> dict[str, Any]:
    """A random 4-5-5-3 MLP in several sources, with up to ``most`` redraws of a neuron."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)]
        target = nn.Sequential(*layers).double().requires_grad_(False)
    x = regenerate(config.seed, "lplus1.x", (1000, 4), "uniform", sigma=1 / math.sqrt(3)).double()
    tickets = [
        lplus1_ticket(target, base, config.eps, redraws=most, seed=config.seed + source)
        for source in range(config.sources)
    ]
    reports = [ticket.report for ticket in tickets]
    errors = [float((ticket.network(x) - target(x)).abs().max()) for ticket in tickets]
    return {
        "base": base,
        "most": most,
        "widths": "-".join(map(str, reports[0].widths)),
        "redraws": sum(report.redraws for report in reports) / config.sources,
        "failed": sum(report.failed for report in reports) / config.sources,
        "max_error": max(report.max_error for report in reports),
        "median_sup_error": statistics.median(errors),
    }


def _trained(net: str, activation: str, dataset: Dataset, config: Config) -> nn.Sequential:
    """An MLP (of halved MNIST images), or three layers of which two are convolutions."""
    channels, side, _ = dataset.in_shape
    phi, c, h = _ACTIVATIONS[activation], config.channels, config.hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if net == "mlp":
            halve = 1 if side <= 14 else 2
            layers = [nn.AvgPool2d(halve), nn.Flatten()]
            layers += [nn.Linear(channels * (side // halve) ** 2, h), phi()]
            layers += [nn.Linear(h, h // 2), phi(), nn.Linear(h // 2, dataset.num_classes)]
        else:
            layers = [nn.Conv2d(channels, c, 3, padding=1), phi(), nn.MaxPool2d(2)]
            layers += [nn.Conv2d(c, 2 * c, 3, padding=1), phi(), nn.MaxPool2d(2), nn.Flatten()]
            layers += [nn.Linear(2 * c * (side // 4) ** 2, dataset.num_classes)]
        target = nn.Sequential(*layers)
    train, val, _ = loaders(dataset, 64, config.seed)
    recipe = Recipe(epochs=config.epochs, optimizer="adam", lr=3e-3, weight_decay=0.0)
    train_dense(target, train, val, recipe, seed=config.seed, progress=False)
    return target.requires_grad_(False)


@dataclass(frozen=True)
class _Found:
    """Tickets, measured on images ``x`` with labels ``y``."""

    x: Tensor
    y: Tensor
    base: int | Sequence[int]
    eps: float
    redraws: int
    seed: int
    radius: float
    nonnegative: bool = False

    def both(self, target: nn.Sequential) -> list[dict[str, Any]]:
        """L+1 layers with one eps for all weights, and with one for every layer."""
        by_layer = lplus1_budgets(target, self.eps)
        return [
            {"construction": "L+1, one eps"} | self.one_more(target, self.base, self.eps),
            {"construction": "L+1, eps by layer"} | self.one_more(target, self.base, by_layer),
        ]

    def one_more(self, target, base, eps) -> dict[str, Any]:
        """L+1 layers."""
        start = time.perf_counter()
        found = lplus1_ticket(
            target,
            base,
            eps,
            redraws=self.redraws,
            radius=self.radius,
            nonnegative=self.nonnegative,
            seed=self.seed,
        )
        seconds = time.perf_counter() - start
        row = self._row(target, found.network, [found.report])
        bound = float(lplus1_bound(target, found, self.x).max())
        return row | {"bound": bound, "seconds": seconds}

    def twice(self, target: nn.Sequential) -> dict[str, Any]:
        """Two layers for each one of a ReLU network: L+1 for every layer alone."""
        start = time.perf_counter()
        modules, reports = [], []
        for module in target:
            if not isinstance(module, nn.Linear | nn.Conv2d):
                modules.append(module)
                continue
            found = lplus1_ticket(
                nn.Sequential(module),
                self.base if isinstance(self.base, int) else self.base[len(reports)],
                self.eps,
                redraws=self.redraws,
                nonnegative=self.nonnegative or bool(reports),
                seed=self.seed + len(reports),
            )
            modules += found.network
            reports.append(found.report)
        seconds = time.perf_counter() - start
        row = self._row(target, nn.Sequential(*modules), reports)
        return {"construction": "2L"} | row | {"seconds": seconds}

    @torch.no_grad()
    def _row(self, target, network, reports) -> dict[str, Any]:
        wanted, got = target(self.x), network(self.x)
        names = ("source_weights", "kept", "target_weights", "problems", "failed", "redraws")
        widths = [width for report in reports for width in report.widths]
        return {
            "layers": len(widths),
            "widths": "-".join(map(str, widths)),
            **{name: sum(getattr(report, name) for report in reports) for name in names},
            "max_error": max(report.max_error for report in reports),
            "sup_error": float((got - wanted).abs().max()),
            "mean_error": float((got - wanted).abs().mean()),
            "target_accuracy": self._accuracy(wanted),
            "accuracy": self._accuracy(got),
        }

    def _accuracy(self, logits: Tensor) -> float:
        return float((logits.argmax(1) == self.y).float().mean())


def _draw(tables, figure) -> None:
    errors, kept, depth = figure.subplots(1, 3)
    sweep = tables.get("sweep", [])
    for color, base in enumerate(sorted({row["base"] for row in sweep})):
        for net, style in zip(_NETS, ("-", "--"), strict=True):
            rows = [r for r in sweep if (r["net"], r["base"]) == (net, base)]
            eps = [row["eps"] for row in rows]
            options = {"color": f"C{color}", "ls": style, "marker": "o"}
            label = f"base {base}" if net == "mlp" else None
            errors.plot(eps, [row["mean_error"] for row in rows], label=label, **options)
            per_weight = [row["kept"] / row["target_weights"] for row in rows]
            kept.plot(eps, per_weight, **options)
    errors.set(xscale="log", yscale="log", xlabel="eps", ylabel="mean error of a logit")
    kept.set(xscale="log", xlabel="eps (dashed: conv)", ylabel="kept per target weight")
    if sweep:
        errors.legend(fontsize=7)
    rows = tables["depth"]
    names = [f"{row['net']} {row['construction']}".replace(" ", "\n") for row in rows]
    for shift, column in enumerate(("source_weights", "problems", "kept")):
        places = [i + 0.25 * shift for i in range(len(rows))]
        depth.bar(places, [row[column] for row in rows], 0.25, label=column.replace("_", " "))
    depth.set_xticks([i + 0.25 for i in range(len(rows))], names, fontsize=7)
    depth.set(yscale="log")
    depth.legend(fontsize=7)
