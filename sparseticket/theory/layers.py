"""Which targets a construction over convolutions and activations covers, and their geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ticket import linear_with

__all__ = [
    "LAYERS",
    "Line",
    "check_modules",
    "convolution",
    "dense_weight",
    "inputs_of",
    "like",
    "line_of",
    "of_constant",
    "tap_inside",
]

LAYERS = (nn.Linear, nn.Conv2d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_COVERED = (
    "the construction does not cover it; it takes Linear, Conv2d, ReLU, LeakyReLU with a slope "
    ">= 0, Tanh, Sigmoid, Identity, 2-d pooling, Flatten (fold a batch norm into its convolution)"
)


@dataclass(frozen=True)
class Line:
    """phi(z) - phi(0) is about ``above`` z for z > 0 and ``below`` z for z < 0, off by at most
    ``cubic`` |z|^3; ``lipschitz``: a Lipschitz constant of phi."""

    above: float
    below: float
    cubic: float
    lipschitz: float


def line_of(module: nn.Module) -> Line | None:
    """None for what is no activation that the construction knows."""
    match module:
        case nn.ReLU():
            return Line(1, 0, 0, 1)
        case nn.LeakyReLU() if module.negative_slope >= 0:
            return Line(1, module.negative_slope, 0, max(1, module.negative_slope))
        case nn.Tanh():
            return Line(1, 1, 1 / 3, 1)
        case nn.Sigmoid():
            return Line(1 / 4, 1 / 4, 1 / 48, 1 / 4)
    return None


def check_modules(target: nn.Module) -> list[nn.Module]:
    """Its modules; ValueError for what the construction does not cover."""
    modules = list(target) if isinstance(target, nn.Sequential) else []
    if not any(isinstance(m, LAYERS) for m in modules):
        found = ", ".join(type(m).__name__ for m in modules) or type(target).__name__
        raise ValueError(f"target: got {found}, need a Sequential with Linear or Conv2d layers")
    flat = None
    for module in modules:
        problem = _problem(module)
        if isinstance(module, nn.Conv2d) and flat:
            problem = "a convolution cannot follow a flat layer"
        if isinstance(module, nn.Linear) and flat is False:
            problem = "needs a Flatten between it and the convolution before"
        if problem:
            raise ValueError(f"target: got {module}: {problem}")
        if isinstance(module, nn.Flatten | nn.Linear | nn.Conv2d):
            flat = not isinstance(module, nn.Conv2d)
    return modules


def _problem(module: nn.Module) -> str:
    """Why the construction does not cover it, or nothing."""
    kind = type(module)
    if kind in LAYERS:
        return _problem_of_weights(module)
    if kind is nn.AvgPool2d:
        padded = bool(torch.tensor(module.padding).any()) and module.count_include_pad
        if padded or module.divisor_override is not None:
            return "it changes constants; need count_include_pad=False and no divisor_override"
    elif kind is nn.Flatten:
        if (module.start_dim, module.end_dim) != (1, -1):
            return "need start_dim=1, end_dim=-1"
    elif kind is not nn.Identity and kind not in _POOLS and line_of(module) is None:
        return _COVERED
    return ""


def _problem_of_weights(layer: nn.Module) -> str:
    weight = layer.weight
    if weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu":
        return f"got {weight.dtype} on {weight.device}, need float32 or float64 on the CPU"
    if not weight.numel():
        return "it has no weights"
    finite = all(bool(p.isfinite().all()) for p in layer.parameters())
    return "" if finite else "it has weights that are not finite"


def of_constant(modules: Sequence[nn.Module], value: Tensor) -> Tensor:
    """What they make of a constant, which pooling and flattening leave as it is."""
    for module in modules:
        value = value if line_of(module) is None else module(value.clone())  # it may be in place
    return value


def inputs_of(layer: nn.Module) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same" and any(span % 2 for span in spans):
        raise ValueError(f"target: got {layer}: padding='same' is uneven for it; pad in numbers")
    return tuple(span // 2 if layer.padding == "same" else 0 for span in spans)


def tap_inside(layer: nn.Module) -> int:
    """Number of a tap of the kernel that never lies in the zeros around its input: what it sees of
    a constant is the constant. Tap t reaches from t d - p to p - (k - 1 - t) d behind the last."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return 0
    place = 0
    for k, d, p in zip(layer.kernel_size, layer.dilation, _padding(layer), strict=True):
        tap = -(-p // d)
        if tap * d > d * (k - 1) - p:
            raise ValueError(
                f"target: got {layer}: every tap of its kernel sees padding, so "
                "that biases cannot be carried; need padding up to dilation * (kernel_size - 1) / 2"
            )
        place = place * k + tap
    return place


def dense_weight(layer: nn.Module) -> Tensor:
    """Its weight over all inputs, zeros for those of other groups."""
    weight = layer.weight
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return weight
    rows, own = len(weight) // groups, weight.shape[1]
    full = weight.new_zeros(len(weight), own * groups, *weight.shape[2:])
    for g in range(groups):
        block = slice(g * rows, (g + 1) * rows)
        full[block, g * own : (g + 1) * own] = weight[block]
    return full


def like(layer: nn.Module, weight: Tensor, padded: bool = True) -> nn.Module:
    """A layer of ``layer``'s kind and geometry, but for groups, that holds ``weight``."""
    if isinstance(layer, nn.Linear):
        return linear_with(weight)
    return convolution(layer, weight, layer.stride, layer.dilation, padded)


def convolution(layer, weight, stride=1, dilation=1, padded=True, bias=None) -> nn.Conv2d:
    found = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        weight.shape[2:],
        stride,
        _padding(layer) if padded else 0,
        dilation,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    found.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        found.bias = nn.Parameter(bias, requires_grad=False)
    return found
