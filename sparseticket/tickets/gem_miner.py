"""Gem-Miner: Sreenivasan, Sohn, Yang, Grinde, Nagle, Wang, Xing, Lee, Papailiopoulos, "Rare gems:
finding lottery tickets at initialization", NeurIPS 2022, section 3 (``hc_iter`` in the code).

Every weight has a score p in [0, 1], from U(0, 1), and a flag q, at first 1. The net computes with
W where p > 1/2 and q = 1; the gradient takes p for that mask; lambda * sum p^2 pulls scores down.
Every ``period`` epochs the smallest scores of those with q = 1, over the whole net, lose their
flag, the same fraction each time, so that the last time leaves the target density.

Deviations from the reference code (ksreenivasan/pruning_is_enough):

- scores are clipped to [0, 1] after each step, not before each forward pass: the same numbers;
- exact counts with ties to the lowest index, where the code compares with a threshold;
- the score of a weight without flag is left alone by the loss and by lambda alike: it is never
  read again (the code still decays it);
- fine-tuning is ``sparseticket search --finetune-epochs``, for every method; the ticket file holds
  the strong ticket itself;
- ``density`` is a fraction; ``target_sparsity`` of the code is per cent kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseticket import ops
from sparseticket.masks import PackedMask
from sparseticket.nn import ScoreLayer

from .engine import (
    Strong,
    check_choice,
    check_integer,
    check_number,
    draw_scores,
    live_layers,
    select,
    setting,
)

__all__ = ["GemMiner", "pruned_fraction"]


def pruned_fraction(density: float, epochs: int, period: int) -> float:
    """What part of the flagged weights each pruning takes; 0 if the run is too short for one."""
    rounds = (epochs - 1) // period
    return 1 - density ** (1 / rounds) if rounds > 0 else 0.0


@dataclass(frozen=True)
class GemMiner(Strong):
    """Config of Gem-Miner, for ``sparsify_`` and ``search``.

    ``final``: the ticket keeps every flagged weight (``unflag``: the density is the target), or
    those whose score also rounds to 1 (``rounded``: never more).
    """

    name: ClassVar[str] = "gem-miner"
    recipe: ClassVar[dict[str, Any]] = {"weight_decay": 0.0}
    transform: ClassVar[str] = "identity"

    density: float = setting(0.05, "fraction of the weights that keep their flag, in (0, 1]")
    period: int = setting(2, "epochs from one pruning to the next")
    penalty: float = setting(1e-5, "lambda, the weight of the squared scores in the loss")
    final: Literal["unflag", "rounded"] = setting(
        "unflag", "the ticket keeps all flagged weights, or those with score > 1/2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density == 0:
            raise ValueError("density: got 0, need more: every pruning keeps a part of the weights")
        check_integer("period", self.period, 1)
        check_number("penalty", self.penalty, 0)
        check_choice("final", self.final, ("unflag", "rounded"))

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in (0, 1)."""
        return 0.5 + 0.5 * draw_scores(self.seed, name, shape, "uniform", math.sqrt(1 / 3))

    def make(self, name: str, module: nn.Module) -> ScoreLayer:
        layer = super().make(name, module)
        words = PackedMask.full(layer.weight_shape, layer.weight.device).words
        layer.register_buffer("flag_words", words)
        return layer

    def surrogate(self, layer: ScoreLayer) -> Tensor:
        return layer.scores * _flagged(layer)

    def before_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        if epoch == 0 or epoch % self.period:
            return
        layers = live_layers(model)
        prune(layers, pruned_fraction(self.density, epochs, self.period))
        self.update(layers, 0)

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """The gradient of lambda * sum p^2 over flagged scores."""
        for layer in live_layers(model):
            if layer.scores.grad is not None:
                decay = layer.scores * _flagged(layer)
                layer.scores.grad.add_(decay, alpha=2 * self.penalty)

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        for layer in layers:
            layer.scores.clamp_(0, 1)
            layer.mask = PackedMask.from_dense(layer.scores > 0.5) & flags(layer)

    def settled(self, epoch: int, epochs: int) -> bool:
        """Has the last pruning been?"""
        return epoch >= (epochs - 1) // self.period * self.period

    def complete(self, model: nn.Module) -> None:
        for layer in live_layers(model) if self.final == "unflag" else ():
            layer.mask = flags(layer)


def flags(layer: ScoreLayer) -> PackedMask:
    """Where q = 1."""
    return PackedMask(layer.flag_words.clone(), layer.weight_shape)


def _flagged(layer: ScoreLayer) -> Tensor:
    """The same as a bool tensor, without the checks of a mask: it is made in every forward."""
    return ops.unpack_mask(layer.flag_words, layer.weight_shape)


@torch.no_grad()
def prune(layers: list[ScoreLayer], fraction: float) -> None:
    """Take the flags of the ``fraction`` (rounded up) of flagged weights with the lowest scores."""
    old = [flags(layer) for layer in layers]
    active = sum(mask.kept for mask in old)
    kept = active - math.ceil(fraction * active)
    new = select(
        [layer.scores for layer in layers], kept, scope="global", transform="abs", within=old
    )
    for layer, mask in zip(layers, new, strict=True):
        layer.flag_words.copy_(mask.words)
