"""What the constructions on whole networks return, and the tests of their targets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparseticket.masks import PackedMask

__all__ = ["Construction", "ConstructionReport", "check_target", "linear_with", "masked"]


@dataclass(frozen=True)
class ConstructionReport:
    """Sizes and measured errors of a construction.

    ``widths``: outputs of every layer of the source; ``source_weights``, ``kept``: its weights, and
    those that the masks keep; ``target_weights``: nonzero ones of the target; ``problems``: entries
    that had to be approximated, ``failed``: those off by more than ``eps``; ``redraws``: source
    neurons passed over for another; ``max_error``, ``mean_error``: of a target weight, measured;
    ``bound``: what is proved, in words.
    """

    widths: tuple[int, ...]
    source_weights: int
    kept: int
    target_weights: int
    problems: int
    failed: int
    redraws: int
    eps: float
    max_error: float
    mean_error: float
    bound: str


@dataclass(frozen=True)
class Construction:
    """``network`` is ``source`` under ``masks``, one per parameter of ``source`` that is pruned, by
    its name. Both are plain torch modules, float64 where the target is."""

    network: nn.Sequential
    source: nn.Sequential
    masks: dict[str, PackedMask]
    report: ConstructionReport

    @classmethod
    def of(
        cls,
        source: nn.Sequential,
        masks: dict[str, PackedMask],
        target: Sequence[nn.Module],
        error: Tensor,
        eps: float,
        bound: str,
        redraws: int = 0,
    ) -> Construction:
        """``target``: its layers; ``error``: of every entry that had to be approximated."""
        layers = [m for m in source if hasattr(m, "weight")]
        report = ConstructionReport(
            widths=tuple(len(m.weight) for m in layers),
            source_weights=sum(p.numel() for m in layers for p in m.parameters()),
            kept=sum(mask.kept for mask in masks.values()),
            target_weights=sum(int((p != 0).sum()) for m in target for p in m.parameters()),
            problems=error.numel(),
            failed=int((error > eps).sum()),
            redraws=redraws,
            eps=eps,
            max_error=float(error.max()) if error.numel() else 0.0,
            mean_error=float(error.mean()) if error.numel() else 0.0,
            bound=bound,
        )
        return cls(masked(source, masks), source, masks, report)


def check_target(where: str, target: nn.Module, bias: bool = False) -> list[nn.Linear]:
    """The Linear layers of a Sequential of Linear and ReLU in turn; ValueError for another one."""
    layers = list(target) if isinstance(target, nn.Sequential) else []
    kinds = [nn.ReLU if i % 2 else nn.Linear for i in range(len(layers))]
    fits = len(layers) % 2 and all(map(isinstance, layers, kinds))
    if not fits:
        found = ", ".join(type(m).__name__ for m in layers) or type(target).__name__
        raise ValueError(
            f"{where}: target: got {found}, need a Sequential of Linear, ReLU, ..., Linear"
        )
    linear = layers[::2]
    if not bias and any(m.bias is not None and bool((m.bias != 0).any()) for m in linear):
        raise ValueError(f"{where}: target: it has biases; the construction knows none")
    if not all(bool(m.weight.isfinite().all()) for m in linear):
        raise ValueError(f"{where}: target: it has weights that are not finite")
    return linear


def linear_with(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A Linear layer that holds these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def masked(source: nn.Sequential, masks: dict[str, PackedMask]) -> nn.Sequential:
    """A copy of ``source`` with zeros where the masks drop."""
    network = copy.deepcopy(source)
    for name, mask in masks.items():
        network.get_parameter(name).data.mul_(mask.to_dense())
    return network
