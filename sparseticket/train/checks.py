"""What a reader asks of any ticket: is it the mask, is it the weights, is it the scores?

Each control changes one thing and keeps the rest, layer by layer (Frankle, Dziugaite, Roy, Carbin,
"Pruning neural networks at initialization: why are we missing the mark?", ICLR 2021, section 5;
Sreenivasan et al., "Rare gems", NeurIPS 2022, the ``redraw`` of their code):

- ``shuffled mask``: the mask's bits in a random order. As many weights are kept in each layer.
- ``redrawn weights``: the same mask over weights of other seeds, of the same distribution.
- ``inverted mask``: as many weights, of those that the ticket dropped. With the scores at hand it
  would be the lowest in place of the highest; a ticket file has none, so which of the dropped ones
  is random. Where more than half is kept, all dropped weights are, and random others with them.

A layer of several masks (coats, signs, draws) has the planes moved together, so that each weight's
multiplier moves with it; the masks of several tasks are moved each by itself. Random orders and
seeds derive from the layer's own seed: number i has ``seed + 1 + i``.

Batch norms are estimated anew on the training data for every control: the ticket's statistics are
those of its own activations, and a net that fails by them says nothing of masks or weights.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..masks import PackedMask
from ..nn import SparseModule, Superposed
from ..prng import permutation
from .loop import Batches

__all__ = ["CONTROLS", "check_layers", "estimate_norms"]

Layer = SparseModule | Superposed


def check_layers(
    build: Callable[[], nn.Module],
    score: Callable[[nn.Module], float],
    seeds: int,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> list[dict[str, Any]]:
    """A row for the ticket and for each control: ``control``, ``scores``, ``mean``, ``std``.

    ``build`` makes the model with the ticket in it anew, ``score`` is what is compared (of a
    classifier, its accuracy); ``prepare`` is called with each control before. ``std`` is that of a
    sample, None for less than two ``seeds``, and for the ticket, which is scored once. ValueError
    for no seeds and for a model without ticket layers.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, need at least 1")
    rows = [_row("ticket", [score(build())])]
    for name, change in CONTROLS.items():
        scores = []
        for i in range(seeds):
            model = build()
            for layer_name, layer in _layers(model):
                change(layer, layer_name, (layer.recipe.seed + 1 + i) % 2**63)
            prepare(model)
            scores.append(score(model))
        rows.append(_row(name, scores))
    return rows


def _row(control: str, scores: list[float]) -> dict[str, Any]:
    std = statistics.stdev(scores) if len(scores) > 1 else None
    return {"control": control, "scores": scores, "mean": statistics.fmean(scores), "std": std}


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, Layer)]
    if not found:
        raise ValueError("check: model: it has no ticket layers")
    yield from found


# Controls -------------------------------------------------------------------------------------


def _shuffle(layer: Layer, name: str, seed: int) -> None:
    def order(kept: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(kept.numel()), _random_order(name, seed, kept.numel())

    _move(layer, order)


def _invert(layer: Layer, name: str, seed: int) -> None:
    def order(kept: Tensor) -> tuple[Tensor, Tensor]:
        """Kept weights first to dropped places first."""
        source, target = (_random_order(name, seed, kept.numel(), draw) for draw in (0, 1))
        first_kept = (~kept[source]).int().argsort(stable=True)
        first_dropped = kept[target].int().argsort(stable=True)
        return source[first_kept], target[first_dropped]

    _move(layer, order)


def _redraw(layer: Layer, name: str, seed: int) -> None:
    layer.recipe = dataclasses.replace(layer.recipe, seed=seed)


CONTROLS: dict[str, Callable[[Layer, str, int], None]] = {
    "shuffled mask": _shuffle,
    "redrawn weights": _redraw,
    "inverted mask": _invert,
}


def _random_order(name: str, seed: int, n: int, draw: int = 0) -> Tensor:
    return torch.from_numpy(permutation(seed, name, n, "mask", draw))


def _move(layer: Layer, order: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Give each mask the bit at ``source[i]`` to ``target[i]``, ``order(kept)`` being these two."""
    if not isinstance(layer, Superposed):
        layer.mask_words.copy_(_moved(layer.mask, *order(_bits(layer.mask))).words)
        return
    masks = layer.masks
    groups = [[mask] for mask in masks] if layer.kind == "tasks" else [masks]
    moved = []
    for group in groups:
        kept = torch.stack([_bits(mask) for mask in group]).any(0)
        source, target = order(kept)
        moved += [_moved(mask, source, target).words for mask in group]
    layer.plane_words.copy_(torch.stack(moved))


def _moved(mask: PackedMask, source: Tensor, target: Tensor) -> PackedMask:
    old = _bits(mask)
    new = torch.empty_like(old)
    new[target] = old[source]
    return PackedMask.from_dense(new.view(mask.shape))


def _bits(mask: PackedMask) -> Tensor:
    return mask.to_dense().flatten().cpu()


# Norms ----------------------------------------------------------------------------------------


@torch.no_grad()
def estimate_norms(model: nn.Module, batches: Batches, device: str | torch.device) -> None:
    """Running statistics of all batch norms anew: the mean over ``batches``, in place."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not norms:
        return
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    for x, _ in batches:
        model(x.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
