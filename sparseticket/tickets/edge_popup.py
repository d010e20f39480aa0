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
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from sparseticket.formats import check_density
from sparseticket.nn import Options
from sparseticket.prng import check_seed

__all__ = ["EdgePopup"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _setting(default: Any, text: str) -> Any:
    """A field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class EdgePopup:
    """Config of edge-popup, for ``sparsify_`` and ``search``.

    ``density``, ``scope``, ``weights``, ``scale``, ``transform``, ``min_keep_per_layer`` and
    ``score_init`` as in :class:`sparseticket.nn.Options`; ``score_init=None`` is ``uniform``
    for layer scope and ``normal`` for global. Biases become 0 and norms 1 and 0, all frozen, unless
    ``keep_bias`` or ``affine``, which make the ticket store them.
    """

    name: ClassVar[str] = "edge-popup"

    density: float = _setting(0.5, "kept fraction of the weights, in [0, 1]")
    scope: Literal["layer", "global"] = _setting("layer", "select in each layer, or over the net")
    weights: Literal["signed_constant", "uniform", "normal"] = _setting(
        "signed_constant", "distribution of the frozen weights, Kaiming fan-in deviation"
    )
    scale: Literal["none", "density", "dynamic"] = _setting(
        "none", "divide the deviation by sqrt of the density, or of each layer's own (dynamic)"
    )
    transform: Literal["abs", "identity"] = _setting("abs", "rank |score|, or the signed score")
    seed: int = _setting(0, "of weights and scores")
    score_init: Literal["uniform", "normal"] | None = _setting(
        None, "first scores: uniform in +-1/sqrt(fan_in), or Kaiming normal; by scope"
    )
    keep_bias: bool = _setting(False, "train biases; the ticket must store them")
    affine: bool = _setting(False, "train affine norms; the ticket must store them")
    min_keep_per_layer: int = _setting(0, "with global scope: weights each layer keeps at least")

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "density", check_density(self.density))
        if not isinstance(self.affine, bool):
            raise TypeError(f"affine: got {self.affine!r}, need True or False")
        Options(**self._options())

    def plan(self, name: str, module: nn.Module) -> dict[str, Any]:
        """Arguments of ``from_dense`` for this layer: every layer alike."""
        return {"seed": self.seed, **self._options()}

    @torch.no_grad()
    def finish(
        self, model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None = None
    ) -> list[str]:
        """Set affine norms to 1 and 0 and freeze them, unless ``affine``; returns their names.

        ``wanted(module, name)`` limits them, as ``sparsify_``'s ``filter_fn`` does.
        """
        if self.affine:
            return []
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

    def _options(self) -> dict[str, Any]:
        default = "uniform" if self.scope == "layer" else "normal"
        return {
            "form": "scored",
            "density": self.density,
            "weights": self.weights,
            "scale": self.scale,
            "transform": self.transform,
            "scope": self.scope,
            "min_keep_per_layer": self.min_keep_per_layer,
            "score_init": default if self.score_init is None else self.score_init,
            "keep_bias": self.keep_bias,
        }
