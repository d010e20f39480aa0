"""Biprop, multi-prize tickets: Diffenderfer, Kailkhura, "Multi-prize lottery ticket hypothesis:
finding accurate binary neural networks by pruning a randomly weighted network", ICLR 2021,
section 3.

Edge-popup for binary networks: a layer computes with alpha * sign(W) where its mask keeps, alpha
being the mean |W| of its kept weights; the gradient takes W*|s| for that, without alpha. With
``binary_activations`` (MPT-1/1) every ReLU becomes a sign, whose gradient is that of BiReal's
piecewise quadratic (Liu et al., ECCV 2018).

Deviations from the reference code (chrundle/biprop):

- a weight is its layer's random sign times a magnitude from another stream: the ticket is a
  signed-constant one with sigma = alpha, and runs as such;
- alpha is the mean over the weights that are kept (the code divides by int(density * n)), rounded
  to bfloat16 as every sigma; of an empty mask it is 0;
- exact counts, ties to the lowest index; sigma is not divided by the removed fraction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseticket.nn import ScoreLayer
from sparseticket.prng import round_bf16

from .engine import WEIGHTS_HELP, Strong, check_choice, setting

__all__ = ["BinaryActivation", "Biprop"]


class BinaryActivation(nn.Module):
    """sign(x), +1 at 0; gradient 2 - 2|x| where |x| < 1."""

    def forward(self, x: Tensor) -> Tensor:
        near = x.clamp(-1, 1)
        smooth = near * (2 - near.abs())
        hard = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
        return hard + (smooth - smooth.detach())  # exactly +-1: sums of them have exact ties


@dataclass(frozen=True)
class Biprop(Strong):
    """Config of biprop, for ``sparsify_`` and ``search``."""

    name: ClassVar[str] = "biprop"

    weights: Literal["signed_constant", "uniform", "normal", "constant"] = setting(
        "normal", WEIGHTS_HELP
    )
    scale: Literal["none", "density"] = setting(
        "none", "divide the weights' deviation by sqrt of the density"
    )
    binary_activations: bool = setting(False, "replace every ReLU by the sign (MPT-1/1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ("none", "density"))  # alpha is dynamic anyway
        if not isinstance(self.binary_activations, bool):
            raise TypeError(
                f"binary_activations: got {self.binary_activations!r}, need True or False"
            )

    def adapt(self, model: nn.Module) -> None:
        """Replace the ReLUs, if asked to; a model that has none left stays as it is."""
        if not self.binary_activations:
            return
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, name, BinaryActivation())

    def make(self, name: str, module: nn.Module) -> ScoreLayer:
        layer = super().make(name, module)
        signs = dataclasses.replace(layer.recipe, dist="signed_constant", sigma=1.0)
        layer.recipe = signs
        with torch.no_grad():
            drawn = signs.weight(layer.weight_shape, layer.dtype, layer.weight.device)
            layer.weight.copy_(drawn * layer.weight.abs())
        return layer

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        super().update(layers, step)
        for layer in layers:
            kept = layer.mask.kept
            alpha = layer.masked_weight().abs().sum(dtype=torch.float64) / max(kept, 1)
            layer.recipe = dataclasses.replace(layer.recipe, sigma=round_bf16(alpha.item()))

    def value(self, layer: ScoreLayer) -> Tensor:
        return layer.masked_weight().sign() * layer.recipe.sigma
