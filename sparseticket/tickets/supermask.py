"""Bernoulli supermasks: Zhou, Lan, Liu, Yosinski, "Deconstructing lottery tickets: zeros, signs,
and the supermask", NeurIPS 2019, section 5.

Every weight is kept with probability sigmoid(v); v is learned: each step draws a mask, and the
gradient takes the probability for the mask, G * W * sigmoid'(v). Dynamic weight rescaling
(``rescale``) divides the weights by the fraction that was drawn.

Deviations from the reference code (uber-research/deconstructing-lottery-tickets):

- the draws come from the seed, one for each step; evaluation uses the last one, where the paper
  averages several. The ticket is that one mask;
- ``density`` has no meaning here: the probabilities decide. It is where v starts,
  sigmoid(v) = density (``sigmoid_bias`` of the code; 0.5 there);
- weights have the Kaiming, not the Glorot deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseticket.masks import PackedMask
from sparseticket.nn import ScoreLayer

from .engine import Strong, setting, uniform_draws

__all__ = ["Supermask"]


@dataclass(frozen=True)
class Supermask(Strong):
    """Config of Bernoulli supermasks, for ``sparsify_`` and ``search``."""

    name: ClassVar[str] = "supermask"
    recipe: ClassVar[dict[str, Any]] = {"lr": 100.0, "weight_decay": 0.0}

    density: float = setting(0.5, "probability that every weight starts with, in (0, 1)")
    rescale: bool = setting(False, "divide the weights by the density that was drawn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density < 1:
            raise ValueError(f"density: got {self.density}, need a probability in (0, 1)")
        if not isinstance(self.rescale, bool):
            raise TypeError(f"rescale: got {self.rescale!r}, need True or False")
        if self.rescale and self.scale != "none":
            raise ValueError(f"rescale=True: needs scale='none', got {self.scale!r}")

    def make(self, name: str, module: nn.Module) -> ScoreLayer:
        layer = super().make(name, module)
        layer.scale = "inverse" if self.rescale else self.scale
        return layer

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, math.log(self.density / (1 - self.density)))

    def surrogate(self, layer: ScoreLayer) -> Tensor:
        return layer.scores.sigmoid()

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        for layer in layers:
            layer.mask = PackedMask.from_dense(uniform_draws(layer, step) < layer.scores.sigmoid())
