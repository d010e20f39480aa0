"""Magnitude pruning: keep the largest |w| (Han, Pool, Tran, Dally, NeurIPS 2015, section 3), over
the net or in each layer.

Deviations from the usual code: counts are exact, ties go to the lowest index; there, everything
below a threshold goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .pruning import Pruner, masked_layers

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Config of magnitude pruning, for :func:`~sparseticket.tickets.prune_`."""

    name: ClassVar[str] = "magnitude"
    transform: ClassVar[str] = "abs"

    def scores(self, model, batches, loss) -> dict[str, Tensor]:
        return {name: layer.weight.detach() for name, layer in masked_layers(model).items()}
