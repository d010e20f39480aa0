"""IteRand: Chijiwa, Yamaguchi, Ida, Umakoshi, Inoue, "Pruning randomly initialized neural networks
with iterative randomization", NeurIPS 2021, section 3.

Edge-popup with signed scores, in which every ``period`` steps each dropped weight is, with
probability ``redraw``, drawn anew; kept weights stay.

Deviations from the reference code (dchiji-ntt/iterand):

- a weight's value is a function of seed, layer, place and the number of times it was drawn, so that
  a ticket regenerates from the seed and that number of each kept weight, which the file stores
  (the paper would store every seed and mask);
- exact counts, ties to the lowest index; the code compares with kthvalue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseticket import ops
from sparseticket.masks import PackedMask
from sparseticket.nn import Plane, ScoreLayer

from .engine import (
    Strong,
    check_choice,
    check_integer,
    check_number,
    draw_scores,
    fan_in,
    setting,
    uniform_draws,
)

__all__ = ["IteRand"]


@dataclass(frozen=True)
class IteRand(Strong):
    """Config of IteRand, for ``sparsify_`` and ``search``. Weights change here, while dropped."""

    name: ClassVar[str] = "iterand"
    freezes: ClassVar[str] = "kept weights (dropped ones are redrawn), biases, norms"

    scale: Literal["none", "density"] = setting(
        "none", "divide the weights' deviation by sqrt of the density"
    )
    transform: Literal["abs", "identity"] = setting("identity", "rank |score|, or the signed score")
    period: int = setting(300, "steps from one redraw to the next")
    redraw: float = setting(0.1, "probability that a dropped weight is drawn anew, in [0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ("none", "density"))
        check_choice("transform", self.transform, ("abs", "identity"))
        check_integer("period", self.period, 1)
        check_number("redraw", self.redraw, 0, 1)

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Kaiming uniform, wider than edge-popup's."""
        if self.transform == "abs":
            return super().score_start(name, shape)
        return draw_scores(self.seed, name, shape, "uniform", math.sqrt(2 / fan_in(shape)))

    def make(self, name: str, module: nn.Module) -> ScoreLayer:
        layer = super().make(name, module)
        layer.register_buffer("draws", torch.zeros(layer.weight_shape, dtype=torch.int16))
        return layer

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        super().update(layers, step)
        if step and step % self.period == 0:
            for layer in layers:
                chosen = uniform_draws(layer, step) < self.redraw
                _redraw(layer, chosen & ~layer.mask.to_dense())

    def planes(self, layer: ScoreLayer) -> tuple[str, list[Plane]] | None:
        """Plane d: kept weights drawn at least d times again."""
        kept, planes = layer.mask, []
        while True:
            plane = kept & PackedMask.from_dense(layer.draws >= len(planes))
            if not plane.kept and planes:
                break
            planes.append(Plane(plane))
            if not plane.kept:
                break
        return ("draws", planes) if len(planes) > 1 else None


def _redraw(layer: ScoreLayer, chosen: Tensor) -> None:
    layer.draws += chosen.to(torch.int16)
    for draw in layer.draws[chosen].unique().tolist():
        here = chosen & (layer.draws == draw)
        fresh = ops.regenerate(
            *layer.recipe.arguments(layer.weight_shape),
            draw=draw,
            dtype=layer.dtype,
            device=layer.weight.device,
        )
        layer.weight[here] = fresh[here]
