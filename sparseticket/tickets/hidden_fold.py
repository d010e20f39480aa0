"""Hidden-fold networks: Garcia-Arias, Hashimoto, Motomura, Yu, "Hidden-fold networks: random
recurrent residuals using sparse supermasks", BMVC 2021, sections 3 and 4.

The last ``stages`` stages of a residual net are folded: their first block, which changes the shape,
stays; all the others become one block that is run again and again, with its own batch norms each
time. Edge-popup then searches one mask for it. The norms are trained, as in the paper: the ticket
stores them and is not weight-free.

Deviations from the reference code (Lopez-Angel/hidden-fold-networks): those of edge-popup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from .edge_popup import EdgePopup
from .engine import check_integer, setting

__all__ = ["HiddenFold"]


@dataclass(frozen=True)
class HiddenFold(EdgePopup):
    """Config of hidden-fold networks, for ``search`` and, after ``adapt(model)``, ``sparsify_``.

    The fields of :class:`EdgePopup`, with the paper's defaults, and ``stages``.
    """

    name: ClassVar[str] = "hidden-fold"
    freezes: ClassVar[str] = "weights, biases"
    model: ClassVar[str] = "resnet20"  # of the command line, where no other is asked for

    density: float = setting(0.3, "kept fraction of the weights, in [0, 1]")
    scale: Literal["none", "density", "dynamic"] = setting(
        "density", "divide the deviation by sqrt of the density, or of each layer's own (dynamic)"
    )
    affine: bool = setting(True, "train affine norms; the ticket must store them")
    stages: int = setting(2, "how many of the last stages are folded")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("stages", self.stages, 1)

    def adapt(self, model: nn.Module) -> None:
        """Fold ``model`` in place; a folded one stays as it is.

        ValueError unless it has so many stages (Sequentials of blocks) with more than one block.
        """
        stages = [m for m in model.children() if isinstance(m, nn.Sequential) and len(m) > 1]
        stages = [stage for stage in stages if all(len(list(b.children())) for b in stage)]
        if len(stages) < self.stages:
            raise ValueError(
                f"stages: got {self.stages}, the model has {len(stages)} stages of residual blocks "
                "to fold; use a ResNet, such as --model resnet20"
            )
        for stage in stages[-self.stages :]:
            _fold(stage)


def _fold(stage: nn.Sequential) -> None:
    """All blocks from the third on compute with the layers of the second, and their own norms."""
    for block in stage[2:]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                owner, _, child = name.rpartition(".")
                setattr(block.get_submodule(owner), child, stage[1].get_submodule(name))
