"""Partially frozen networks: Otsuka, Chijiwa, Garcia-Arias, Okoshi, Kawamura, Van Chu, Fujiki,
Takeuchi, Motomura, "Partially frozen random networks contain compact strong lottery tickets", TMLR
2025 (arXiv 2402.14029), sections 3 and 4.

A random part of every layer is pruned, another is locked; only the free rest is searched, by
edge-popup. Which weights are frozen is regenerated from the seed, so that a ticket stores mask bits
of free weights only. ``rule`` shares the frozen part out over the layers: ``epl`` leaves the same
number of edges to every layer, ``erk`` more to those with few, ``igq`` between them.

Deviations from the reference code (Hikari43/slt_within_frozen_network):

- scores, their gradients and their optimizer state exist for free weights only; there, for all,
  with infinities in frozen places (which float32 alone can rank);
- both weights and pattern come from the seed; there, a checkpoint stores them in float32;
- the number kept is floor(density * n + 0.5), locked weights included; there n - int(n * sparsity);
- sparsity below the pruned or above 1 - the locked fraction raises; there, it keeps all or more;
- the dynamic scale of an empty layer is 1; there, infinity times 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseticket.densities import layer_densities
from sparseticket.formats import kept_count
from sparseticket.nn import FrozenPattern, ScoreLayer

from .engine import (
    WEIGHTS_HELP,
    Strong,
    check_choice,
    check_integer,
    check_number,
    draw_scores,
    fan_in,
    live_layers,
    select,
    setting,
)

__all__ = ["Frozen"]

_RULES = ("epl", "erk", "igq", "uniform")


@dataclass(frozen=True)
class Frozen(Strong):
    """Config of the search in a partially frozen network, for ``sparsify_`` and ``search``.

    ``pruned`` and ``locked`` are fractions of all weights, with ``pruned <= 1 - density`` and
    ``locked <= density``. ``shares``: the locked part of a layer is what ``rule`` freezes
    at density 1 - pruned - locked less what it freezes at 1 - pruned (``sparsity``), or is itself
    shared out by the rule (``density``).
    """

    name: ClassVar[str] = "frozen"
    freezes: ClassVar[str] = "weights, biases, norms, and the mask of a random part of the weights"

    weights: Literal["signed_constant", "uniform", "normal", "constant"] = setting(
        "uniform", WEIGHTS_HELP
    )
    pruned: float = setting(0.25, "fraction of the weights that is never used")
    locked: float = setting(0.25, "fraction of the weights that is always used")
    rule: Literal["epl", "erk", "igq", "uniform"] = setting(
        "epl", "how layers share the frozen part"
    )
    shares: Literal["sparsity", "density"] = setting(
        "sparsity", "rule for pruned and frozen part, or for pruned and locked part"
    )
    scope: Literal["layer", "global"] = setting("global", "select in each layer, or over the net")
    min_keep_per_layer: int = setting(
        0, "with global scope: free weights that each layer keeps at least"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("pruned", self.pruned, 0, 1)
        check_number("locked", self.locked, 0, 1)
        check_choice("rule", self.rule, _RULES)
        check_choice("shares", self.shares, ("sparsity", "density"))
        check_choice("scope", self.scope, ("layer", "global"))
        check_integer("min_keep_per_layer", self.min_keep_per_layer, 0)
        slack = 1e-9
        if self.locked > self.density + slack or self.pruned > 1 - self.density + slack:
            raise ValueError(
                f"density: got {self.density} with pruned={self.pruned}, locked={self.locked}; "
                "need locked <= density <= 1 - pruned"
            )

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Kaiming normal."""
        return draw_scores(self.seed, name, shape, "normal", math.sqrt(2 / fan_in(shape)))

    def counts(self, shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """(pruned, locked) weights of each layer."""
        used = layer_densities(self.rule, shapes, 1 - self.pruned)
        if self.shares == "sparsity":
            free = layer_densities(self.rule, shapes, max(1 - self.pruned - self.locked, 0.0))
            locked = [max(u - f, 0.0) for u, f in zip(used, free, strict=True)]
        else:
            locked = layer_densities(self.rule, shapes, self.locked)
        out = []
        for shape, u, lock in zip(shapes, used, locked, strict=True):
            n = math.prod(shape)
            pruned = n - kept_count(min(u, 1.0), n)
            out.append((pruned, kept_count(min(lock, 1.0), n)))
            if sum(out[-1]) > n + 1:
                raise ValueError(
                    f"shares: {self.rule} prunes {u:.3g} less than all and locks {lock:.3g} of a "
                    f"layer of shape {tuple(shape)}; take shares='sparsity' or freeze less"
                )
        return [(p, min(k, math.prod(s) - p)) for (p, k), s in zip(out, shapes, strict=True)]

    def finish(
        self, model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None = None
    ) -> list[str]:
        layers = live_layers(model)
        counts = self.counts([layer.weight_shape for layer in layers])
        for layer, (pruned, locked) in zip(layers, counts, strict=True):
            recipe = layer.recipe
            pattern = FrozenPattern(recipe.seed, recipe.layer, layer.weight_shape, pruned, locked)
            layer.freeze(pattern)
        return super().finish(model, wanted)

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        groups = [layers] if self.scope == "global" else [[layer] for layer in layers]
        kept = [self._kept(group) for group in groups]
        masks = select(
            [layer.scores for layer in layers],
            kept[0] if self.scope == "global" else kept,
            scope=self.scope,
            min_keep_per_layer=self.min_keep_per_layer,
            patterns=[layer.pattern for layer in layers],
        )
        for layer, mask in zip(layers, masks, strict=True):
            layer.mask = mask

    def _kept(self, layers: Sequence[ScoreLayer]) -> int:
        """Number kept in ``layers``, locked ones included. The rounding of frozen counts, at most
        one a layer, must not make a feasible density infeasible."""
        kept = kept_count(self.density, sum(math.prod(layer.weight_shape) for layer in layers))
        locked = sum(layer.pattern.locked for layer in layers)
        free = sum(layer.pattern.free_count for layer in layers)
        near = min(max(kept, locked), locked + free)
        return near if abs(near - kept) <= len(layers) else kept
