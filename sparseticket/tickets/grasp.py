"""GraSP: Wang, Zhang, Grosse, "Picking winning tickets before training by preserving gradient
flow", ICLR 2020, section 4: keep the largest w * Hg, signed, g the loss gradient and H its Hessian;
removing w changes the squared norm of g by -2 w * Hg to first order.

Deviations from the paper's code (alecwangcq/GraSP):

- exactly the number asked for is kept; there, one more;
- the model's own initialisation is scored; there, a copy with Linear layers drawn anew;
- a batch is not processed in two halves, and classes are as balanced as the batches are;
- scores are not divided by their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .engine import check_number, setting
from .pruning import Pruner, gradients, masked_layers, probe

__all__ = ["GraSP"]


@dataclass(frozen=True)
class GraSP(Pruner):
    """Config of GraSP, for :func:`~sparseticket.tickets.prune_`."""

    name: ClassVar[str] = "grasp"

    temperature: float = setting(200.0, "divides outputs before the loss; 1 for a regression")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 1e-30)

    def scores(self, model, batches, loss) -> dict[str, Tensor]:
        layers, twin, batches = masked_layers(model), probe(model), list(batches)

        def cooled(output: Tensor, y: Tensor) -> Tensor:
            return loss(output / self.temperature, y)

        g = gradients(twin, batches, cooled)
        hg = gradients(twin, batches, cooled, along=g)
        return {
            name: h * layer.weight.detach()
            for (name, layer), h in zip(layers.items(), hg, strict=True)
        }
