"""Random pruning, the first control of every comparison.

Deviations from the usual code: one draw per weight for all rounds, so that several rounds choose
what one does; with ``scope="layer"`` the masks are those of ``st.random_mask``. There, every round
draws anew, which gives the same law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseticket import ops
from sparseticket.masks import layer_number

from .pruning import Pruner, masked_layers

__all__ = ["RandomPruning"]


@dataclass(frozen=True)
class RandomPruning(Pruner):
    """Config of random pruning, for :func:`~sparseticket.tickets.prune_`."""

    name: ClassVar[str] = "random"

    def scores(self, model, batches, loss) -> dict[str, Tensor]:
        return {
            name: ops.regenerate(
                self.seed,
                ops.signed64(layer_number(name)),
                layer.weight_shape,
                "uniform",
                1.0,
                stream="mask",
            ).to(layer.weight.device)
            for name, layer in masked_layers(model).items()
        }
