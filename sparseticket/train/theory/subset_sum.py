"""T2: random subset sums: errors of the best subset, sizes and failures of the smallest one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...prng import layer_id, words32
from ...theory import OK, subset_sum
from ..loop import option
from .results import write_results

__all__ = ["Config", "run"]

_BASES = {"uniform": 1, "product": 2}  # how many U[-1, 1] numbers are multiplied
_BEST = {"uniform": (8, 10, 12, 15, 18, 21), "product": (10, 12, 15, 18, 21)}
_FEW = (15, 21, 25, 30)
_LEVELS = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Config:
    """How many random instances, and how exactly they are solved."""

    count: int = option(20_000, "instances of a row of the tables")
    eps: float = option(0.01, "error that the fewest elements may have")
    seed: int = option(0, "of every random number")


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``min_error`` (the exact optimum) and ``min_card`` (the fewest elements)."""
    tables = {
        "min_error": [_best(config, base, n) for base in _BASES for n in _BEST[base]],
        "min_card": [_few(config, base, n) for base in _BASES for n in _FEW],
    }
    return write_results("subset-sum", out, config, tables, _draw)


def _uniform(seed: int, name: str, rows: int, columns: int) -> torch.Tensor:
    """U[-1, 1), multiples of 2**-23."""
    words = words32(seed, layer_id(name), rows, columns, "sampling", 0)
    return torch.from_numpy((words >> 8).astype("float32")) * 2.0**-23 - 1


def _instances(config: Config, base: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = [_uniform(config.seed, f"{base}.{n}.{i}", config.count, n) for i in range(_BASES[base])]
    return torch.stack(draws).prod(0), _uniform(config.seed, f"{base}.{n}.target", config.count, 1)


def _best(config: Config, base: str, n: int) -> dict[str, Any]:
    a, t = _instances(config, base, n)
    start = time.perf_counter()
    error = subset_sum(a, t, config.eps, objective="min_error").error
    seconds = time.perf_counter() - start
    row = {"base": base, "n": n, "median": float(error.median()), "mean": float(error.mean())}
    row |= {f"P(>{level})": float((error > level).double().mean()) for level in _LEVELS}
    return row | {"us": 1e6 * seconds / config.count}


def _few(config: Config, base: str, n: int) -> dict[str, Any]:
    a, t = _instances(config, base, n)
    few = subset_sum(a, t, config.eps, fallback="none")
    start = time.perf_counter()
    found = subset_sum(a, t, config.eps)
    seconds = time.perf_counter() - start
    solved = found.status == OK
    sizes = (found.mask[solved][:, None] >> torch.arange(n) & 1).sum(1)
    return {
        "base": base,
        "n": n,
        "mean_size": float(sizes.double().mean()),
        "unsolved_by_four": float((few.status != OK).double().mean()),
        "unsolved": float((~solved).double().mean()),
        "us": 1e6 * seconds / config.count,
    }


def _draw(tables, figure) -> None:
    left, right = figure.subplots(1, 2)
    for base in _BASES:
        rows = [row for row in tables["min_error"] if row["base"] == base]
        n = [row["n"] for row in rows]
        (line,) = left.plot(n, [row["median"] for row in rows], marker="o", label=f"{base}, median")
        mean = [row["mean"] for row in rows]
        left.plot(n, mean, color=line.get_color(), linestyle=":", label=f"{base}, mean")
        rows = [row for row in tables["min_card"] if row["base"] == base]
        right.plot([r["n"] for r in rows], [r["mean_size"] for r in rows], marker="o", label=base)
    left.set(xlabel="elements n", ylabel="least error", yscale="log")
    right.set(xlabel="elements n", ylabel="elements taken at eps")
    left.legend()
    right.legend()
