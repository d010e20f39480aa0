"""SNIP: Lee, Ajanthan, Torr, "Single-shot network pruning based on connection sensitivity", ICLR
2019, section 4: keep the largest |dL/dm| = |g * w|, m a mask variable at 1.

Deviations from the paper's code (namhoonlee/snip-public):

- scores are not divided by their sum, which no ranking sees;
- the batches are those handed over; norms use their batch's statistics;
- the initialisation is the model's own; there, variance scaling;
- several rounds (as in Tanaka et al.'s benchmark) score what is left, at the weights of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .pruning import Pruner, gradients, masked_layers, probe

__all__ = ["SNIP"]


@dataclass(frozen=True)
class SNIP(Pruner):
    """Config of SNIP, for :func:`~sparseticket.tickets.prune_`."""

    name: ClassVar[str] = "snip"
    transform: ClassVar[str] = "abs"

    def scores(self, model, batches, loss) -> dict[str, Tensor]:
        layers = masked_layers(model)
        found = gradients(probe(model), batches, loss)
        return {
            name: g * layer.weight.detach()
            for (name, layer), g in zip(layers.items(), found, strict=True)
        }
