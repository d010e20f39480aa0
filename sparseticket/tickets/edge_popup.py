"""Edge-popup: Ramanujan, Wortsman, Kembhavi, Farhadi, Rastegari, "What's hidden in a randomly
weighted neural network?", CVPR 2020, section 3; and its global variant (Sreenivasan et al.,
"Rare gems", NeurIPS 2022).

Weights stay at their random values. Every weight has a score; the forward pass uses the weights
with the largest |score| of their layer (``scope="layer"``) or of the network (``"global"``); the
backward pass takes the mask's derivative as 1, so that dropped edges get gradients and can return.

Deviations from the reference code (allenai/hidden-networks):

- kept counts are floor(density * n + 0.5), ties go to the lowest index, masks are exact;
- ``scale="density"`` divides sigma by sqrt(density); there, by the square root of the *removed*
  fraction;
- masks are selected after an optimizer step, not in every forward pass;
- random bits come from the library's generator; signs are bits, never ``sign(normal)``;
- ``transform="identity"`` ranks signed scores (the paper's text; the code ranks magnitudes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from sparseticket.formats import check_density
from sparseticket.nn import Options, SparseModule, update_masks
from sparseticket.prng import check_seed

from .anneal import SCHEDULES, density_at
from .engine import INIT_HELP, WEIGHTS_HELP, check_choice, check_integer, freeze_norms, setting

__all__ = ["EdgePopup"]

_ENDS = ("searched", "full", "dense")


@dataclass(frozen=True)
class EdgePopup:
    """Config of edge-popup, for ``sparsify_`` and ``search``.

    ``density``, ``scope``, ``weights``, ``init``, ``scale``, ``transform``, ``score_init`` and
    ``min_keep_per_layer`` as in :class:`sparseticket.nn.Options`; ``score_init=None`` is
    ``uniform`` for layer scope and ``normal`` for global. Biases become 0 and norms 1 and 0, all
    frozen, unless ``keep_bias`` or ``affine``, which make the ticket store them. ``first_layer``
    and ``last_layer`` (in the order of definition) may keep all their random weights (``full``) or
    be trained as usual and stored (``dense``). ``anneal``: see :mod:`sparseticket.tickets.anneal`.
    """

    name: ClassVar[str] = "edge-popup"
    freezes: ClassVar[str] = "weights, biases, norms"
    recipe: ClassVar[dict[str, Any]] = {}  # training defaults, where they differ

    density: float = setting(0.5, "kept fraction of the weights, in [0, 1]")
    scope: Literal["layer", "global"] = setting("layer", "select in each layer, or over the net")
    weights: Literal["signed_constant", "uniform", "normal", "constant"] = setting(
        "signed_constant", WEIGHTS_HELP
    )
    scale: Literal["none", "density", "dynamic"] = setting(
        "none", "divide the deviation by sqrt of the density, or of each layer's own (dynamic)"
    )
    transform: Literal["abs", "identity"] = setting("abs", "rank |score|, or the signed score")
    seed: int = setting(0, "of weights and scores")
    score_init: Literal["uniform", "normal"] | None = setting(
        None, "first scores: uniform in +-1/sqrt(fan_in), or Kaiming normal; by scope"
    )
    keep_bias: bool = setting(False, "train biases; the ticket must store them")
    affine: bool = setting(False, "train affine norms; the ticket must store them")
    min_keep_per_layer: int = setting(0, "with global scope: weights each layer keeps at least")
    init: Literal["kaiming", "xavier", "torch"] = setting("kaiming", INIT_HELP)
    first_layer: Literal["searched", "full", "dense"] = setting(
        "searched", "the first layer: searched, all its random weights, or trained and stored"
    )
    last_layer: Literal["searched", "full", "dense"] = setting("searched", "the last layer, alike")
    anneal: Literal["none", "power", "levels", "iterated", "cubic"] = setting(
        "none", "lower the density epoch by epoch, by one of the published schedules"
    )
    anneal_period: int = setting(5, "epochs of a level, for levels and iterated")
    qk_scale: bool = setting(
        True, "multiply random query and key weights of attention by head_dim^(1/4)"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "density", check_density(self.density))
        for name in ("affine", "qk_scale"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: got {value!r}, need True or False")
        check_choice("first_layer", self.first_layer, _ENDS)
        check_choice("last_layer", self.last_layer, _ENDS)
        check_choice("anneal", self.anneal, SCHEDULES)
        check_integer("anneal_period", self.anneal_period, 1)
        Options(**self._options())

    def bind(self, model: nn.Module) -> EdgePopup | _Bound:
        """The config that knows the first and last layer of ``model``."""
        if self.first_layer == self.last_layer == "searched":
            return self
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding
        names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
        ends = dict.fromkeys(names[-1:], self.last_layer)
        ends |= dict.fromkeys(names[:1], self.first_layer)
        return _Bound(self, ends)

    def plan(self, name: str, module: nn.Module) -> dict[str, Any]:
        """Arguments of ``from_dense`` for this layer: every layer alike."""
        return {"seed": self.seed, **self._options()}

    def finish(
        self, model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None = None
    ) -> list[str]:
        """Set affine norms to 1 and 0 and freeze them, unless ``affine``; returns their names.

        ``wanted(module, name)`` limits them, as ``sparsify_``'s ``filter_fn`` does.
        """
        return [] if self.affine else freeze_norms(model, wanted)

    def before_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Annealing: this epoch's density, and the masks of it."""
        if self.anneal == "none":
            return
        density = density_at(self.anneal, self.density, epoch, epochs, self.anneal_period)
        for module in model.modules():
            if isinstance(module, SparseModule) and module.options.density < 1:
                module.options = replace(module.options, density=density)
        update_masks(model)

    def settled(self, epoch: int, epochs: int) -> bool:
        """Is the density of ``epoch`` the final one?"""
        now = density_at(self.anneal, self.density, epoch, epochs, self.anneal_period)
        return now == self.density

    def _options(self) -> dict[str, Any]:
        default = "uniform" if self.scope == "layer" else "normal"
        return {
            "form": "scored",
            "density": self.density,
            "weights": self.weights,
            "init": self.init,
            "scale": self.scale,
            "transform": self.transform,
            "scope": self.scope,
            "min_keep_per_layer": self.min_keep_per_layer,
            "score_init": default if self.score_init is None else self.score_init,
            "keep_bias": self.keep_bias,
        }


@dataclass(frozen=True)
class _Bound:
    """``config`` whose plan treats the layers in ``ends`` as they say."""

    config: EdgePopup
    ends: dict[str, str]

    def plan(self, name: str, module: nn.Module) -> dict[str, Any] | None:
        plan, how = self.config.plan(name, module), self.ends.get(name, "searched")
        if how == "dense":
            return None
        whole = {"density": 1.0, "scope": "layer", "min_keep_per_layer": 0}
        return plan | whole if how == "full" else plan

    def finish(self, model: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> list[str]:
        return self.config.finish(model, wanted)
