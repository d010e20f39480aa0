"""T3: a trained network inside random weights: all weights at once, its accuracy after."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...theory.pensia import pensia_ticket
from ..data import load_dataset, loaders
from ..loop import Recipe, evaluate, option, train_dense
from .results import write_results

__all__ = ["Config", "run"]

_SOURCES = (("linear", "none"), ("linear", "row"), ("relu", "none"))


@dataclass(frozen=True)
class Config:
    """The target, and how its weights are approximated."""

    dataset: Literal["digits", "mnist"] = option("digits", "what the target is trained on")
    data: Path | None = field(
        default=None, metadata={"help": "folder of the data files; else SPARSETICKET_DATA"}
    )
    hidden: int = option(500, "neurons of the target's hidden layer")
    epochs: int = option(5, "of training the target")
    n: int = option(21, "random numbers for each weight (and sign of its input, with relu)")
    eps: float = option(0.01, "error of a weight")
    objective: Literal["min_card", "min_error"] = option("min_card", "of the subset sums")
    seed: int = option(0, "of every random choice")


def run(config: Config, out: Path) -> dict[str, Any]:
    """Table ``networks``, a row for every source."""
    dataset = load_dataset(config.dataset, config.data, seed=config.seed)
    train, val, test = loaders(dataset, 128, config.seed)
    target = _target(dataset.in_shape, dataset.num_classes, config)
    recipe = Recipe(epochs=config.epochs, optimizer="adam", lr=1e-3, weight_decay=0.0)
    train_dense(target, train, val, recipe, seed=config.seed)
    accuracy, _ = evaluate(target, test)
    rows = [_row(config, target, test, accuracy, *source) for source in _SOURCES]
    return write_results("pensia", out, config, {"networks": rows}, _draw)


def _target(in_shape, classes, config: Config) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inputs = int(torch.Size(in_shape).numel())
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, config.hidden, bias=False),
            nn.ReLU(),
            nn.Linear(config.hidden, classes, bias=False),
        )


def _row(config: Config, target, test, accuracy, structure, share_base) -> dict[str, Any]:
    start = time.perf_counter()
    ticket = pensia_ticket(
        target[1:],
        config.n,
        config.eps,
        structure=structure,
        share_base=share_base,
        objective=config.objective,
        seed=config.seed,
    )
    seconds = time.perf_counter() - start
    report = ticket.report
    after, _ = evaluate(nn.Sequential(target[0], ticket.network), test)
    return {
        "structure": structure,
        "share_base": share_base,
        "weights": report.target_weights,
        "subset_sums": report.problems,
        "failed": report.failed,
        "source_weights": report.source_weights,
        "kept": report.kept,
        "max_error": report.max_error,
        "mean_error": report.mean_error,
        "target_accuracy": accuracy,
        "accuracy": after,
        "seconds": seconds,
    }


def _draw(tables, figure) -> None:
    rows = tables["networks"]
    names = [f"{r['structure']}, base per {r['share_base']}" for r in rows]
    left, right = figure.subplots(1, 2)
    left.bar(names, [r["kept"] / r["weights"] for r in rows])
    left.set(ylabel="kept weights per target weight")
    right.bar(names, [100 * r["accuracy"] for r in rows])
    right.axhline(100 * rows[0]["target_accuracy"], linestyle="--", color="grey", label="target")
    right.set(ylabel="test accuracy, %")
    right.legend()
