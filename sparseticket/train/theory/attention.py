"""T8: attention in random attention: error against width, length and depth, for both sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...masks import regenerate
from ...theory.attention import (
    Attention,
    Block,
    attention_bound,
    attention_ticket,
    block_ticket,
    source_attention,
    source_block,
)
from ..loop import option
from .results import write_results

__all__ = ["Config", "angular_velocity", "run"]

_INITS = ("theory", "xavier")


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment; the paper takes n up to 100, 100 sources, T up to 8192."""

    max_width: int = option(32, "largest n_K = n_V of sources, in steps of 4 from 4")
    sources: int = option(30, "random sources for each width")
    max_length: int = option(2048, "longest sequence, in powers of 4 from 8")
    blocks: int = option(4, "deepest stack of blocks")
    block_sources: int = option(8, "random sources for each depth and width, and each length")
    seed: int = option(0, "of every random choice")

    def __post_init__(self) -> None:
        if self.max_width < 20:
            raise ValueError(f"max_width: got {self.max_width}, need at least 20 for the fits")

    @property
    def widths(self) -> list[int]:
        return list(range(4, self.max_width + 1, 4))

    @property
    def lengths(self) -> list[int]:
        return [8 * 4**k for k in range(12) if 8 * 4**k <= self.max_length]


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tables ``width``, ``length``, ``depth`` of errors, and ``fits`` of exponentials to them."""
    target = _trained(config.seed)
    logits, values = target.merged()
    width = [_width_row(config, target, init, n) for init in _INITS for n in config.widths]
    depth = [
        _depth_row(config, init, blocks, n)
        for init in _INITS
        for blocks in range(1, config.blocks + 1)
        for n in config.widths[3:]
    ]
    tables = {
        "width": width,
        "length": [
            _length_row(config, target, n, length) for n in (20, 40) for length in config.lengths
        ],
        "depth": depth,
        "fits": [
            _fit(init, blocks, width + depth)
            for init in _INITS
            for blocks in range(config.blocks + 1)
        ],
    }
    norms = [float(torch.linalg.matrix_norm(m, 2).max()) for m in (logits, values)]
    return write_results("attention", out, config, tables, _draw, target_norms=norms)


def _draw(tables, figure) -> None:
    widths, lengths, depths = figure.subplots(1, 3)
    for init in _INITS:
        rows = [row for row in tables["width"] if row["init"] == init]
        n = [row["n"] for row in rows]
        (line,) = widths.plot(n, [row["mean"] for row in rows], marker="o", label=f"{init}, mean")
        color = line.get_color()
        widths.plot(n, [row["median"] for row in rows], color=color, ls="--", label="median")
        widths.plot(n, [row["bound"] for row in rows], color=color, ls=":", label="bound, median")
    widths.set(yscale="log", xlabel="n", ylabel="error of one head")
    widths.legend(fontsize=7)
    for n in sorted({row["n"] for row in tables["length"]}):
        rows = [row for row in tables["length"] if row["n"] == n]
        t = [row["T"] for row in rows]
        (line,) = lengths.plot(t, [row["error"] for row in rows], marker="o", label=f"n = {n}")
        bounds = [row["bound"] for row in rows]
        lengths.plot(t, bounds, color=line.get_color(), ls=":", label="bound")
    lengths.set(xscale="log", yscale="log", xlabel="T", ylabel="largest error, same masks")
    lengths.legend(fontsize=7)
    for init, style in zip(_INITS, ("-", "--"), strict=True):
        for blocks in sorted({row["blocks"] for row in tables["depth"]}):
            rows = [r for r in tables["depth"] if (r["init"], r["blocks"]) == (init, blocks)]
            label = f"{blocks} blocks" if init == "theory" else None
            n, mean = [r["n"] for r in rows], [r["mean"] for r in rows]
            depths.plot(n, mean, color=f"C{blocks}", ls=style, label=label)
    depths.set(yscale="log", xlabel="n", ylabel="mean error of blocks (dashed: Xavier)")
    depths.legend(fontsize=7)


def angular_velocity(n: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (cos, sin)(w t + a) on the unit circle behind a token of zeros [n, length+1, 2], and w
    [n], in [-pi, pi]; a in [0, pi]. float64."""
    w, a = _draws(seed, n)
    t = torch.arange(length, dtype=torch.float64)
    angle = w[:, None] * t + a[:, None]
    points = torch.stack([angle.cos(), angle.sin()], -1)
    return nn.functional.pad(points, (0, 0, 1, 0)), w


def _draws(seed: int, n: int) -> tuple[Tensor, Tensor]:
    u = regenerate(seed, "angular", (2, n), "uniform", sigma=1 / math.sqrt(3), dtype=torch.float64)
    return math.pi * u[0], math.pi * (u[1] + 1) / 2


def _trained(seed: int) -> Attention:
    """One head, d1 = 2, d2 = 1, as in the paper: 25 epochs of AdamW at 0.1 on batches of 1024."""
    x, w = angular_velocity(10_000, 4, seed)
    target = source_attention(2, 1, 8, init="xavier", seed=seed, name="target")
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(25):
        for part, goal in zip(x.split(1024), w.split(1024), strict=True):
            optimizer.zero_grad()
            (target(part)[:, 0, 0] - goal).square().mean().backward()
            optimizer.step()
    return target.requires_grad_(False)


@torch.no_grad()
def _width_row(config, target, init, n) -> dict[str, Any]:
    x, _ = angular_velocity(512, 4, config.seed + 1)
    wanted = target(x)
    errors, bounds = [], []
    for source in range(config.sources):
        random = source_attention(2, 1, n, init=init, seed=source)
        found = attention_ticket(target, random, 0.0, objective="min_error")
        errors.append(float((found.network(x) - wanted).abs().mean()))
        bounds.append(attention_bound(target, found.error_qk, found.error_vo, 1.0))
    e = torch.tensor(errors)
    return {
        "init": init,
        "blocks": 0,
        "n": n,
        "mean": float(e.mean()),
        "median": float(e.median()),
        "bound": float(torch.tensor(bounds).median()),
    }


@torch.no_grad()
def _length_row(config, target, n, length) -> dict[str, Any]:
    """The same masks at every length."""
    x, _ = angular_velocity(4, length - 1, config.seed + 1)
    wanted, errors, bounds = target(x), [], []
    for source in range(config.block_sources):
        random = source_attention(2, 1, n, seed=source)
        found = attention_ticket(target, random, 0.0, objective="min_error")
        errors.append(float((found.network(x) - wanted).abs().max()))
        bounds.append(attention_bound(target, found.error_qk, found.error_vo, 1.0))
    held = all(e <= b for e, b in zip(errors, bounds, strict=True))
    return {
        "n": n,
        "T": length,
        "error": sum(errors) / len(errors),
        "bound": sum(bounds) / len(bounds),
        "held": held,
    }


@torch.no_grad()
def _depth_row(config, init, blocks, n) -> dict[str, Any]:
    x, _ = angular_velocity(128, 8, config.seed + 1)
    targets = [_random_block(config.seed, b) for b in range(blocks)]
    wanted = _through(targets, x)
    errors = []
    for source in range(config.block_sources):
        found = []
        for b, target in enumerate(targets):
            random = source_block(2, n, 2 * n, seed=source, init=init, name=f"block{b}")
            found.append(block_ticket(target, random, 0.0, objective="min_error")[0])
        errors.append(float((_through(found, x) - wanted).abs().mean()))
    e = torch.tensor(errors)
    return {
        "init": init,
        "blocks": blocks,
        "n": n,
        "mean": float(e.mean()),
        "median": float(e.median()),
    }


def _through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def _random_block(seed: int, number: int) -> Block:
    """A target with query and key of 8 columns; every matrix has spectral norm 1."""
    drawn = source_attention(2, 2, 8, init="xavier", seed=seed, name=f"target{number}")
    parts = [
        p.detach() / torch.linalg.matrix_norm(p.detach(), 2, keepdim=True)
        for p in drawn.parameters()
    ]
    weight = regenerate(
        seed, f"target{number}.fc", (2, 2), "normal", sigma=1.0, dtype=torch.float64
    )
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    layer.weight = nn.Parameter(weight / torch.linalg.matrix_norm(weight, 2))
    return Block(Attention(*parts), nn.Sequential(layer))


def _fit(init: str, blocks: int, rows) -> dict[str, Any]:
    """mean ~ factor * exp(-rate * n), by least squares on the logarithm."""
    rows = [row for row in rows if (row["init"], row["blocks"]) == (init, blocks)]
    n = torch.tensor([float(row["n"]) for row in rows], dtype=torch.float64)
    log = torch.tensor([row["mean"] for row in rows], dtype=torch.float64).log()
    rate = -((n - n.mean()) * (log - log.mean())).sum() / (n - n.mean()).square().sum()
    factor = (log.mean() + rate * n.mean()).exp()
    return {"init": init, "blocks": blocks, "factor": float(factor), "rate": float(rate)}
