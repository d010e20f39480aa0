"""Signed supermasks: Koster, Grothe, Rettinger, "Signing the supermask: keep, hide, invert", ICLR
2022.

A mask value in {-1, 0, +1} keeps, drops or inverts a weight: the sign of the score where |tanh(s)|
is large enough; the gradient takes tanh(s) for it, G * W * (1 - tanh(s)^2).

Deviations from the paper and its code (kosnil/signed_supermasks):

- large enough means among the best ``density`` of a layer, exactly; with ``threshold``, as in the
  paper, |tanh(s)| > threshold, and the density follows from training;
- ReLU networks with Kaiming weights; the paper's ELUS initialisation belongs to ELU networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseticket.masks import PackedMask
from sparseticket.nn import Plane, ScoreLayer

from .engine import Strong, check_number, setting

__all__ = ["SignedSupermask"]


@dataclass(frozen=True)
class SignedSupermask(Strong):
    """Config of signed supermasks, for ``sparsify_`` and ``search``."""

    name: ClassVar[str] = "signed-supermask"

    threshold: float | None = setting(
        None, "keep weights with |tanh(score)| above this, instead of a fixed density"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0, 1)
            if self.scale == "density":
                raise ValueError("scale='density': with a threshold, there is none; use 'dynamic'")

    def value(self, layer: ScoreLayer) -> Tensor:
        weight = layer.masked_weight()
        return torch.where(layer.scores < 0, -weight, weight)

    def surrogate(self, layer: ScoreLayer) -> Tensor:
        return layer.scores.tanh()

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        if self.threshold is None:
            return super().update(layers, step)
        for layer in layers:
            layer.mask = PackedMask.from_dense(layer.scores.tanh().abs() > self.threshold)

    def planes(self, layer: ScoreLayer) -> tuple[str, list[Plane]]:
        """-W where anything is kept, and 2W where that is to be +W."""
        kept = layer.mask
        positive = kept & PackedMask.from_dense(layer.scores.detach() >= 0)
        return "sum", [Plane(kept, -1.0), Plane(positive, 2.0)]
