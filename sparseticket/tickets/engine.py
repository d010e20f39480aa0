"""The selection engine of the strong tickets: which scores are kept, exactly how many, where.

``select`` makes the masks of many layers from their scores: the best of each layer or of the whole
net, ``transform`` ranked, within what a frozen pattern leaves free, ``kept`` counted over all
weights. :class:`Strong` is what every method has in common; a method is a subclass that says what
weight a layer computes with, what the gradient reaches, and when masks are selected.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from sparseticket import ops
from sparseticket.formats import canonical_shape, check_density, kept_count
from sparseticket.masks import PackedMask, layer_number
from sparseticket.nn import (
    FrozenPattern,
    Plane,
    ScoreConv1d,
    ScoreConv2d,
    ScoreConvTranspose2d,
    ScoreLayer,
    ScoreLinear,
    WeightRecipe,
    gain_of,
)
from sparseticket.nn.recipe import INITS
from sparseticket.prng import DISTRIBUTIONS, check_seed

__all__ = [
    "INIT_HELP",
    "WEIGHTS_HELP",
    "Strong",
    "check_choice",
    "check_integer",
    "check_number",
    "fan_in",
    "fan_out",
    "draw_scores",
    "freeze_norms",
    "live_layers",
    "select",
    "setting",
    "uniform_draws",
    "warn_of_collapse",
]

_LOG = logging.getLogger("sparseticket")
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


WEIGHTS_HELP = "distribution of the frozen weights; constant: all positive"
INIT_HELP = "their deviation: Kaiming fan-in, Xavier, or that of torch's own layers"


def setting(default: Any, text: str) -> Any:
    """A config field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted: {', '.join(map(str, accepted))}")


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Unless ``value`` is a finite number in [low, high], TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}, need a number")
    if not (low <= value <= high and math.isfinite(value)):
        top = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name}: got {value}, need at least {low:g}{top}")


def check_integer(name: str, value: Any, low: int) -> None:
    """TypeError unless ``value`` is an integer, ValueError unless it is at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, need an integer")
    if value < low:
        raise ValueError(f"{name}: got {value}, need at least {low}")


def select(
    scores: Sequence[Tensor],
    kept: int | Sequence[int],
    *,
    scope: Literal["layer", "global"] = "layer",
    transform: Literal["abs", "identity"] = "abs",
    min_keep_per_layer: int = 0,
    patterns: Sequence[FrozenPattern | None] | None = None,
    within: Sequence[PackedMask] | None = None,
) -> list[PackedMask]:
    """Exact masks of the best scores: ``kept`` of each tensor, or in all (``scope="global"``).

    A tensor with a pattern is 1-D, the scores of its free weights; its mask has the pattern's
    shape, and ``kept`` counts the locked weights in. ``within``: one mask per tensor, of its shape,
    outside which nothing is kept. Ties go to the lower index, over a list to the earlier tensor.
    ValueError for counts that the pattern does not leave room for.
    """
    patterns = [None] * len(scores) if patterns is None else list(patterns)
    locked = [0 if p is None else p.locked for p in patterns]
    if scope == "global":
        free = [_free_part(kept, sum(locked), sum(s.numel() for s in scores), "the net")]
    else:
        free = [
            _free_part(k, lock, s.numel(), f"layer {i}")
            for i, (k, lock, s) in enumerate(zip(kept, locked, scores, strict=True))
        ]
    allowed = None if within is None else [mask.words for mask in within]
    words, _ = ops.select_mask(
        list(scores), free, allowed, None, scope, transform, min_keep_per_layer
    )
    chosen = [PackedMask(w, s.shape) for w, s in zip(words, scores, strict=True)]
    return [m if p is None else p.expand(m) for m, p in zip(chosen, patterns, strict=True)]


def _free_part(kept: int, locked: int, free: int, where: str) -> int:
    if not locked <= kept <= locked + free:
        raise ValueError(
            f"density: {where} cannot keep {kept} weights: {locked} are locked and {free} free; "
            "sparsity must lie between the pruned and 1 - the locked fraction"
        )
    return kept - locked


def draw_scores(
    seed: int, layer: str | int, shape: Sequence[int], dist: str, sigma: float, draw: int = 0
) -> Tensor:
    """First scores from the layer's ``score`` stream, with standard deviation ``sigma``."""
    number = ops.signed64(layer_number(layer))
    return ops.regenerate(seed, number, tuple(shape), dist, sigma, stream="score", draw=draw)


def fan_in(shape: Sequence[int]) -> int:
    """Inputs of a neuron, at least 1."""
    return max(canonical_shape(shape)[1], 1)


def fan_out(shape: Sequence[int]) -> int:
    """Outputs that a weight's input reaches, at least 1."""
    return max(shape[0] * math.prod(shape[2:]), 1)


def uniform_draws(layer: ScoreLayer, round_: int) -> Tensor:
    """Numbers in (0, 1), one for each weight, from the layer's ``sampling`` stream."""
    recipe = layer.recipe
    number, sigma = ops.signed64(recipe.layer), 1 / math.sqrt(3)
    shape = layer.weight_shape
    centred = ops.regenerate(
        recipe.seed, number, shape, "uniform", sigma, stream="sampling", draw=round_
    )
    return (0.5 + 0.5 * centred).to(layer.weight.device)


def live_layers(model: nn.Module) -> list[ScoreLayer]:
    """The layers of a model that a search is run on."""
    return [m for m in model.modules() if isinstance(m, ScoreLayer)]


def warn_of_collapse(names_and_masks: Sequence[tuple[str, PackedMask]]) -> list[str]:
    """Names of layers that keep nothing, through which no signal passes; logged as a warning."""
    dead = [name for name, mask in names_and_masks if mask.numel and not mask.kept]
    if dead:
        _LOG.warning(
            "layer collapse: nothing is kept in %s; raise min_keep_per_layer", ", ".join(dead)
        )
    return dead


@torch.no_grad()
def freeze_norms(
    model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None = None
) -> list[str]:
    """Set affine norms to 1 and 0 and freeze them; returns their names."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and any(True for _ in module.parameters(recurse=False))
    }
    if wanted is not None:
        norms = {name: norm for name, norm in norms.items() if wanted(norm, name)}
    for norm in norms.values():
        for name, parameter in norm.named_parameters(recurse=False):
            if not is_lazy(parameter):  # torch itself starts those at 1 and 0
                parameter.fill_(1.0 if name == "weight" else 0.0)
            parameter.requires_grad = False
    return list(norms)


@dataclass(frozen=True)
class Strong:
    """Base of the configs whose layers are ScoreLayers; every method is frozen weights and scores.

    Subclasses may override everything below: ``score_start`` (first scores), ``value`` and
    ``surrogate`` (the weight and its straight-through gradient), ``update`` (after each step),
    ``before_epoch``, ``planes`` (tickets of several masks).
    """

    name: ClassVar[str]
    recipe: ClassVar[Mapping[str, Any]] = {}  # training defaults of the paper or of our runs
    freezes: ClassVar[str] = "weights, biases, norms"

    density: float = setting(0.5, "kept fraction of the weights, in [0, 1]")
    weights: Literal["signed_constant", "uniform", "normal", "constant"] = setting(
        "signed_constant", WEIGHTS_HELP
    )
    init: Literal["kaiming", "xavier", "torch"] = setting("kaiming", INIT_HELP)
    scale: Literal["none", "density", "dynamic"] = setting(
        "none", "divide the deviation by sqrt of the density, or of each layer's own (dynamic)"
    )
    seed: int = setting(0, "of weights, scores and every other random choice")
    affine: bool = setting(False, "train affine norms; the ticket must store them")

    transform: ClassVar[str] = "abs"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "density", check_density(self.density))
        check_choice("weights", self.weights, DISTRIBUTIONS)
        check_choice("init", self.init, INITS)
        check_choice("scale", self.scale, ("none", "density", "dynamic"))
        if not isinstance(self.affine, bool):
            raise TypeError(f"affine: got {self.affine!r}, need True or False")

    # Conversion -----------------------------------------------------------------------------

    def plan(self, name: str, module: nn.Module) -> dict[str, Any] | None:
        """Every layer is converted, by :meth:`make`, but embeddings, which stay dense."""
        return None if isinstance(module, nn.Embedding) else {}

    def make(self, name: str, module: nn.Module) -> ScoreLayer:
        """The layer that replaces ``module``; its mask waits for :meth:`select_first`."""
        kinds = (ScoreLinear, ScoreConv1d, ScoreConv2d, ScoreConvTranspose2d)
        cls = next(kind for kind in kinds if isinstance(module, kind._BASE))
        shape, gain = tuple(module.weight.shape), gain_of(module)
        recipe = WeightRecipe.initial(self.seed, name, self.weights, shape, self.init, gain)
        if self.scale == "density":
            recipe = recipe.scaled(self.density)
        scores = self.score_start(name, shape)
        return cls.from_dense(module, rule=self, recipe=recipe, scores=scores, scale=self.scale)

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in +-1/sqrt(fan_in), as in edge-popup."""
        return draw_scores(self.seed, name, shape, "uniform", math.sqrt(1 / 3 / fan_in(shape)))

    def finish(
        self, model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None = None
    ) -> list[str]:
        """First masks; affine norms to 1 and 0 unless ``affine``. Returns the norms' names."""
        self.update(live_layers(model), 0)
        return [] if self.affine else freeze_norms(model, wanted)

    # Search ---------------------------------------------------------------------------------

    def value(self, layer: ScoreLayer) -> Tensor:
        return layer.masked_weight()

    def surrogate(self, layer: ScoreLayer) -> Tensor:
        return layer.scores.abs() if self.transform == "abs" else layer.scores

    def planes(self, layer: ScoreLayer) -> tuple[str, list[Plane]] | None:
        return None

    def before_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Before the batches of ``epoch``, counted from 0."""

    def before_step(self, model: nn.Module) -> None:
        """After the backward pass, before the optimizer's step."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """After the optimizer's step number ``step``, counted from 1."""
        self.update(live_layers(model), step)

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        """Masks anew from the scores: here, the best of every layer."""
        kept = [kept_count(self.density, math.prod(layer.weight_shape)) for layer in layers]
        scores = [layer.scores for layer in layers]
        patterns = [layer.pattern for layer in layers]
        masks = select(scores, kept, transform=self.transform, patterns=patterns)
        for layer, mask in zip(layers, masks, strict=True):
            layer.mask = mask

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: Callable[[], int] | None = None,
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """For a loop of your own: have every ``optimizer.step()`` followed by new masks.

        ``steps`` tells the number of steps done before this one, for a run that is resumed. Call
        ``before_epoch`` and, at the end, ``complete`` yourself. Returns the handles to undo it.
        """
        count = itertools.count(1)

        def after(*_: Any) -> None:
            self.after_step(model, next(count) if steps is None else steps() + 1)

        return [
            optimizer.register_step_pre_hook(lambda *_: self.before_step(model)),
            optimizer.register_step_post_hook(after),
        ]

    def complete(self, model: nn.Module) -> None:
        """After the last epoch, before the layers become tickets."""
