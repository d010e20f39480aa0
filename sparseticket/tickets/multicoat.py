"""Multicoated supermasks: Okoshi, Garcia-Arias, Hirose, Ando, Kawamura, Van Chu, Motomura, Yu,
"Multicoated supermasks enhance hidden networks", ICML 2022, section 3.

One score a weight, several thresholds: nested masks, the coats. A weight counts as often as coats
keep it: W_eff = W * (M_1 + ... + M_N); each coat is edge-popup, so the gradient is N * G * W *
sign(s).

Deviations from the reference code (yasu0001/multicoated-supermasks):

- exact counts, floor(density * n + 0.5) for every coat, ties to the lowest index;
- ``density`` and ``coats`` are kept fractions; the code's are removed ones. How the paper's
  "linear" rule makes the further ones is not published; the default is its shipped example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseticket import ops
from sparseticket.formats import check_density, kept_count
from sparseticket.masks import PackedMask
from sparseticket.nn import Plane, ScoreLayer

from .engine import Strong, check_choice, draw_scores, fan_out, select, setting

__all__ = ["Multicoat"]


@dataclass(frozen=True)
class Multicoat(Strong):
    """Config of multicoated supermasks, for ``sparsify_`` and ``search``."""

    name: ClassVar[str] = "multicoat"

    density: float = setting(0.3, "fraction kept by the first coat, which holds the others")
    scale: Literal["none", "density"] = setting(
        "density", "divide the weights' deviation by sqrt of the density"
    )
    coats: str = setting("0.0788,0.0315", "kept fractions of the further coats, falling")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ("none", "density"))
        if list(self.densities) != sorted(self.densities, reverse=True):
            raise ValueError(
                f"coats: got {self.coats!r}, need fractions that fall from the density"
            )

    @property
    def densities(self) -> tuple[float, ...]:
        """Of all coats, the first one's first."""
        try:
            more = [float(part) for part in self.coats.split(",") if part.strip()]
        except (AttributeError, ValueError) as error:
            raise ValueError(f"coats: got {self.coats!r}, need numbers like '0.1,0.05'") from error
        return (self.density, *(check_density(d, "coats") for d in more))

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Kaiming normal by fan-out."""
        return draw_scores(self.seed, name, shape, "normal", math.sqrt(2 / fan_out(shape)))

    def make(self, name: str, module: nn.Module) -> ScoreLayer:
        layer = super().make(name, module)
        words = layer.mask_words.expand(len(self.densities), *layer.mask_words.shape)
        layer.register_buffer("coat_words", words.clone())
        return layer

    def value(self, layer: ScoreLayer) -> Tensor:
        coats = (ops.unpack_mask(words, layer.weight_shape) for words in layer.coat_words)
        return layer.weight * sum(coat.to(layer.dtype) for coat in coats)

    def surrogate(self, layer: ScoreLayer) -> Tensor:
        return len(self.densities) * layer.scores.abs()

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        for i, density in enumerate(self.densities):
            kept = [kept_count(density, layer.scores.numel()) for layer in layers]
            masks = select([layer.scores for layer in layers], kept)
            for layer, mask in zip(layers, masks, strict=True):
                layer.coat_words[i].copy_(mask.words)
        for layer in layers:
            layer.mask = _coats(layer)[0]

    def planes(self, layer: ScoreLayer) -> tuple[str, list[Plane]]:
        return "sum", [Plane(mask) for mask in _coats(layer)]


def _coats(layer: ScoreLayer) -> list[PackedMask]:
    return [PackedMask(words.clone(), layer.weight_shape) for words in layer.coat_words]
