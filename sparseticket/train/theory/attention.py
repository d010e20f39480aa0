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

__all__ = ["AttentionRun", "angular_velocity", "run"]

_INITS = ("theory", "xavier")


@dataclass(frozen=True)
class AttentionRun:
    """Sizes of the experiment; the paper takes n up to 100, 100 sources, T up to 8192."""

    widths: tuple[int, ...] = option((4, 8, 12, 16, 20, 24, 28, 32), "n_K = n_V of the sources")
    sources: int = option(30, "random sources for each width")
    lengths: tuple[int, ...] = option((8, 32, 128, 512, 2048), "sequence lengths")
    length_widths: tuple[int, ...] = option((20, 40), "widths at which lengths are compared")
    blocks: int = option(4, "deepest stack of blocks")
    block_widths: tuple[int, ...] = option((16, 20, 24, 28, 32), "widths of the blocks' sources")
    block_sources: int = option(8, "random sources for each of those")
    seed: int = option(0, "of every random choice")


def run(config: AttentionRun, out: Path) -> dict[str, Any]:
    """Rows of error against width, length and depth, exponential fits, norms of the target."""
    target = _trained(config.seed)
    logits, values = target.merged()
    width = [_width_row(config, target, init, n) for init in _INITS for n in config.widths]
    depth = [
        _depth_row(config, init, blocks, n)
        for init in _INITS
        for blocks in range(1, config.blocks + 1)
        for n in config.block_widths
    ]
    return {
        "target_norms": [float(torch.linalg.matrix_norm(m, 2).max()) for m in (logits, values)],
        "width": width,
        "length": [
            _length_row(config, target, n, t) for n in config.length_widths for t in config.lengths
        ],
        "depth": depth,
        "fits": [
            {"init": init, "blocks": 0, **_fit([r for r in width if r["init"] == init])}
            for init in _INITS
        ]
        + [
            {
                "init": init,
                "blocks": b,
                **_fit([r for r in depth if (r["init"], r["blocks"]) == (init, b)]),
            }
            for init in _INITS
            for b in range(1, config.blocks + 1)
        ],
    }


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
        "mean": sum(errors) / len(errors),
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


def _fit(rows) -> dict[str, float]:
    """mean ~ factor * exp(-rate * n), by least squares on the logarithm."""
    n = torch.tensor([float(r["n"]) for r in rows], dtype=torch.float64)
    log = torch.tensor([r["mean"] for r in rows], dtype=torch.float64).log()
    rate = -((n - n.mean()) * (log - log.mean())).sum() / (n - n.mean()).square().sum()
    return {"factor": float((log.mean() + rate * n.mean()).exp()), "rate": float(rate)}
