"""Pruning by scores of the weights: what the methods share, in one shot or in several.

A method says what a weight is worth (``scores``); :func:`prune_` keeps the best of each layer or of
the whole net, exactly. In ``rounds`` rounds the density falls as density^(r/rounds), each round
choosing among what the one before kept, on scores computed anew. The layers are in form ``masked``,
so that the masks can be trained under at any time; ``before_round`` is where iterative pruning
trains and rewinds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sparseticket.formats import check_density, kept_count
from sparseticket.masks import PackedMask, select_mask
from sparseticket.nn import SparseModule, sparsify_
from sparseticket.prng import check_seed

from .anneal import density_at
from .engine import check_choice, check_integer, setting, warn_of_collapse

__all__ = ["Loss", "Pruner", "gradients", "masked_layers", "probe", "prune_"]

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pruner:
    """Base of the configs; a method overrides ``scores``."""

    name: ClassVar[str]
    transform: ClassVar[str] = "identity"

    density: float = setting(0.1, "kept fraction of the weights, in [0, 1]")
    scope: Literal["layer", "global"] = setting("global", "select in each layer, or over the net")
    rounds: int = setting(1, "rounds in which the density falls, exponentially")
    min_keep_per_layer: int = setting(0, "with global scope: weights each layer keeps at least")
    seed: int = setting(0, "of random scores")

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "density", check_density(self.density))
        check_choice("scope", self.scope, ("layer", "global"))
        check_integer("rounds", self.rounds, 1)
        check_integer("min_keep_per_layer", self.min_keep_per_layer, 0)
        if self.min_keep_per_layer and self.scope != "global":
            raise ValueError(
                f"min_keep_per_layer: got {self.min_keep_per_layer} with scope='layer', need 0"
            )

    def plan(self, name: str, module: nn.Module) -> dict[str, Any]:
        """Every layer in form ``masked``, at first under a mask that keeps everything."""
        return {"form": "masked", "mask": PackedMask.full(module.weight.shape)}

    def scores(self, model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
        """What every weight of every masked layer is worth, by the layer's name; of pruned weights,
        anything."""
        raise NotImplementedError


def prune_(
    model: nn.Module,
    config: Pruner,
    batches: Batches = (),
    loss: Loss = F.cross_entropy,
    *,
    before_round: Callable[[nn.Module, int], None] | None = None,
) -> dict[str, PackedMask]:
    """Prune ``model`` in place to ``config.density``; returns the masks by layer name.

    A dense model is first converted (:func:`sparsify_`). ``batches``: (x, y) pairs for the methods
    that look at data, all of which are used, so hand over few; SynFlow takes the shape of an input
    from them. ``before_round(model, round)`` runs before the scores of every round, counted from 0.
    A layer that keeps nothing is logged as a warning. ValueError for NaN scores.
    """
    layers = masked_layers(model)
    if not layers:
        sparsify_(model, config)
        layers = masked_layers(model)
    for round_ in range(config.rounds):
        if before_round:
            before_round(model, round_)
        density = density_at("power", config.density, round_, config.rounds)
        scores = config.scores(model, batches, loss)
        _select(config, layers, [scores[name] for name in layers], density)
    masks = {name: layer.mask for name, layer in layers.items()}
    warn_of_collapse(list(masks.items()))
    return masks


@torch.no_grad()
def _select(config, layers, scores, density) -> None:
    sizes = [s.numel() for s in scores]
    within = [layer.mask for layer in layers.values()]
    if config.scope == "global":
        kept = min(kept_count(density, sum(sizes)), sum(mask.kept for mask in within))
    else:
        kept = [
            min(kept_count(density, n), mask.kept) for n, mask in zip(sizes, within, strict=True)
        ]
    masks = select_mask(
        scores,
        kept=kept,
        scope=config.scope,
        transform=config.transform,
        min_keep_per_layer=config.min_keep_per_layer,
        within=within,
    )
    for layer, mask in zip(layers.values(), masks, strict=True):
        layer.mask = mask


def masked_layers(model: nn.Module) -> dict[str, SparseModule]:
    """The layers of a model in form ``masked``, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, SparseModule) and m.form == "masked"
    }


def probe(model: nn.Module) -> nn.Module:
    """A copy to compute scores on: norms use the batch's own statistics, which at initialisation
    are the only ones there are, dropout is off, and what the copy's buffers see is lost with it."""
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    return twin


def gradients(
    twin: nn.Module, batches: Batches, loss: Loss, *, along: list[Tensor] | None = None
) -> list[Tensor]:
    """Sum over the batches of the loss gradient by the masked weights of ``twin``; ``along`` a
    vector v, that of the Hessian times v instead."""
    weights = [layer.weight for layer in masked_layers(twin).values()]
    total = [torch.zeros_like(w) for w in weights]
    seen = False
    for x, y in batches:
        seen = True
        value = loss(twin(x), y)
        found = torch.autograd.grad(value, weights, create_graph=along is not None)
        if along is not None:
            product = sum((a * b).sum() for a, b in zip(found, along, strict=True))
            found = torch.autograd.grad(product, weights)
        for t, g in zip(total, found, strict=True):
            t += g
    if not seen:
        raise ValueError("batches: got none, need at least one (x, y) pair to score on")
    return total
