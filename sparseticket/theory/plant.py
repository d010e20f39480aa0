"""Planted tickets: Fischer, Burkholz, "Plant 'n' Seek: can you find the winning ticket?", ICLR 2022
(arXiv 2111.11153), section 3, algorithm 1, appendix A.4.

Tasks whose solution is known as a sparse network (:data:`TARGETS`), hidden in a random network of
the same depth (:func:`plant`), so that what a pruning method finds can be held against it. Every
target neuron takes the place of the source neuron whose random parameters are nearest to its own
but for a positive factor, which the next layer undoes; the parameters of the ticket are written
there, everything else stays as it was drawn.

Deviations from the paper's code (RelationalML/PlantNSeek):

- matching as in the paper, the smallest |theta - s*m|; the code minimises an L1 distance and wants
  equal signs;
- the output layer has one factor for all outputs, which keeps the order of logits, and is not
  matched: outputs stay where they are;
- slope changes that are rounding errors are 0. The code counts about 25 weights of 1e-16 in the
  Helix' linear coordinate, hence 115 and 120 weights at depths 3 and 5; ours have 91 and 95;
- ``depth`` counts the input layer, as there: a network of depth d has d-1 weight layers.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket import ops
from sparseticket.masks import PackedMask, layer_number, regenerate
from sparseticket.prng import check_seed

__all__ = [
    "TARGETS",
    "Planted",
    "Target",
    "circle",
    "existence_probability",
    "helix",
    "he_scaled",
    "mask_iou",
    "plant",
    "relu",
]

_CIRCLE_BOUNDS = (0.2, 0.5, 0.7)


@dataclass(frozen=True)
class Target:
    """A task and the sparse network that solves it.

    ``truth`` maps inputs [N, d] in [-1, 1]^d to class numbers [N] or values [N, outputs].
    """

    name: str
    network: nn.Sequential
    truth: Callable[[Tensor], Tensor]
    classes: int | None

    @property
    def weights(self) -> int:
        """Non-zero weights of the network."""
        return sum(int((m.weight != 0).sum()) for m in _linears(self.network))

    @property
    def biases(self) -> int:
        """Non-zero biases of the network."""
        return sum(int((m.bias != 0).sum()) for m in _linears(self.network))

    def sample(self, n: int, *, noise: float = 0.01, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``n`` inputs, uniform, and labels; ``noise``: the part of the classes that is moved to
        the next one, or the deviation of what is added to values. float32."""
        inputs = _linears(self.network)[0].in_features
        x = 2 * _uniform(seed, f"{self.name}.x", (n, inputs)) - 1
        y = self.truth(x)
        if self.classes:
            moved = _uniform(seed, f"{self.name}.noise", (n,)) < noise
            return x, (y + moved) % self.classes
        shape = tuple(y.shape)
        drawn = regenerate(seed, f"{self.name}.noise", shape, "normal", sigma=noise)
        return x, y + drawn


def relu(depth: int) -> Target:
    """y = max(0, x): a chain of ones; 1 -> 1."""
    _check_depth(depth)
    one = torch.ones(1, 1, dtype=torch.float64)
    layers = [(one, torch.zeros(1, dtype=torch.float64))] * (depth - 1)
    return Target("relu", _network(layers), lambda x: x.clamp(min=0), None)


def circle(depth: int, knots: int = 10) -> Target:
    """Four classes by the ranges of x1^2 + x2^2 between .2, .5 and .7; 2 -> 4 logits.

    Folds the plane by reflections about lines through 0 as often as the depth allows, approximates
    the squares of both coordinates, piecewise linear in ``knots`` pieces, and puts lines of slopes
    5, 10, 20, 40 through their sum that cross at the bounds.
    """
    _check_depth(depth)
    blank = torch.zeros(0, dtype=torch.float64)
    if depth == 3:
        layers, folded = [], torch.eye(2, dtype=torch.float64)
        pieces = [_piecewise(torch.square, -1, 1, knots)] * 2
    else:
        eye = torch.eye(2, dtype=torch.float64)
        layers = [(torch.stack([eye, -eye], 1).flatten(0, 1), blank)]
        folded = eye.repeat_interleave(2, 1)  # |x1|, |x2| of the four
        pieces = [_piecewise(torch.square, 0, 1, knots)] * 2
    if depth > 4:
        layers.append((folded, blank))
        folded = torch.eye(2, dtype=torch.float64)
    angle = math.pi / 2
    for _ in range(depth - 5):
        angle /= 2
        along = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        across = torch.tensor([math.sin(angle), -math.cos(angle)], dtype=torch.float64)
        layers.append((torch.stack([along, across, -across]) @ folded, blank))
        folded = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.float64)
    if depth > 5:  # knots in proportion to the ranges
        far, near = math.sqrt(2), math.sin(angle) * math.sqrt(_CIRCLE_BOUNDS[-1]) + 0.01
        first = min(math.ceil(2 * knots * far / (far + near)), 2 * knots - 3)
        pieces = [
            _piecewise(torch.square, 0, far, first),
            _piecewise(torch.square, 0, near, 2 * knots - first),
        ]
    rows = [piece[0][:, None] * folded[i] for i, piece in enumerate(pieces)]
    layers.append((torch.cat(rows), torch.cat([piece[1] for piece in pieces])))
    square = torch.cat([piece[2] for piece in pieces])
    constant = sum(piece[3] for piece in pieces)
    slopes = torch.tensor([5.0, 10.0, 20.0, 40.0], dtype=torch.float64)
    steps = (slopes[:-1] - slopes[1:]) * torch.tensor(_CIRCLE_BOUNDS, dtype=torch.float64)
    crossing = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    layers.append((slopes[:, None] * square, crossing + slopes * constant))

    def truth(x: Tensor) -> Tensor:
        return torch.bucketize(x.square().sum(1), x.new_tensor(_CIRCLE_BOUNDS))

    return Target("circle", _network(layers), truth, 4)


def helix(depth: int, knots: int = 30) -> Target:
    """y = (t cos t, t sin t, t) / (8 pi), t = 5 pi + 3 pi x; 1 -> 3."""
    _check_depth(depth)

    def truth(x: Tensor) -> Tensor:
        t = math.pi * (5 + 3 * x)
        return torch.cat([t * t.cos(), t * t.sin(), t], -1) / (8 * math.pi)

    shift = 0.0 if depth == 3 else 1.0  # to inputs that ReLU lets pass
    coordinates = [
        _piecewise(lambda x, i=i: truth(x[:, None] - shift)[:, i], shift - 1, shift + 1, knots)
        for i in range(3)
    ]
    one = torch.ones(1, dtype=torch.float64)
    layers = [(one[:, None], one)] if shift else []
    layers.append((coordinates[0][0][:, None], coordinates[0][1]))
    constant = torch.stack([c[3] for c in coordinates])
    outer = torch.stack([c[2] for c in coordinates])
    if depth < 5:
        layers.append((outer, constant))
    else:
        eye = torch.eye(3, dtype=torch.float64)
        layers.append((outer, constant + 1))  # what identity layers must not cut off
        layers += [(eye, torch.zeros(3, dtype=torch.float64))] * (depth - 5)
        layers.append((eye, -torch.ones(3, dtype=torch.float64)))
    return Target("helix", _network(layers), truth, None)


TARGETS: dict[str, Callable[[int], Target]] = {"relu": relu, "circle": circle, "helix": helix}


@dataclass(frozen=True)
class Planted:
    """A ticket in its source, both float32.

    ``network * scale`` computes the target where only the entries of ``masks`` and ``bias_masks``
    (by layer name, as in ``network``) are kept: ``ticket()``.
    """

    network: nn.Sequential
    source: nn.Sequential
    masks: dict[str, PackedMask]
    bias_masks: dict[str, Tensor]
    scale: float
    report: dict[str, Any]

    def ticket(self) -> nn.Sequential:
        """The planted network without everything else, outputs times the scale."""
        layers = []
        for name, module in self.network.named_children():
            if isinstance(module, nn.Linear):
                weight = ops.apply_mask(module.weight.detach(), self.masks[name].words)
                module = _linear(weight, module.bias.detach() * self.bias_masks[name])
            layers.append(module)
        last = layers[-1]
        layers[-1] = _linear(last.weight.detach() * self.scale, last.bias.detach() * self.scale)
        return nn.Sequential(*layers)


def he_scaled(widths: Sequence[int], *, seed: int = 0) -> nn.Sequential:
    """Linear layers and ReLUs: weights N(0, 2/n_in), biases N(0, prod of 2/n over the inputs of
    all layers up to theirs), the scale of the signal when biases start as if they were weights."""
    layers, deviation = [], 1.0
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        sigma = math.sqrt(2 / n)
        deviation *= sigma
        name = str(2 * i)
        weight = regenerate(seed, f"{name}.weight", (m, n), "normal", sigma=sigma)
        bias = regenerate(seed, f"{name}.bias", (m,), "normal", sigma=deviation)
        layers += [_linear(weight, bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def plant(target: nn.Sequential, width: int, *, seed: int = 0) -> Planted:
    """Hide ``target`` (Linear and ReLU in turn) in a random network whose hidden layers are
    ``width`` wide. ValueError if the target is wider."""
    check_seed(seed)
    layers = _linears(target)
    hidden = [layer.out_features for layer in layers[:-1]]
    if max(hidden, default=0) > width:
        raise ValueError(f"width: got {width}, the target's hidden layers are {hidden} wide")
    source = he_scaled(
        [layers[0].in_features, *[width] * len(hidden), layers[-1].out_features], seed=seed
    )
    network = copy.deepcopy(source)
    places = torch.arange(layers[0].in_features)
    factors = torch.ones(len(places), dtype=torch.float64)
    masks, bias_masks, hiding = {}, {}, {}
    for i, layer in enumerate(layers):
        name = str(2 * i)
        drawn = source[2 * i]
        theta = torch.cat([layer.weight.double() * factors, layer.bias.double()[:, None]], 1)
        random = torch.cat([drawn.weight[:, places], drawn.bias[:, None]], 1).double()
        if layer is layers[-1]:
            own = torch.arange(len(theta))
            norm = random[theta != 0].norm()
            factors = (theta.norm() / norm).expand(len(theta))
        else:
            own, factors = _match(theta, random)
        weight, weight_mask = _put(drawn.weight, theta[:, :-1], factors, own, places)
        bias, bias_mask = _put(
            drawn.bias[:, None], theta[:, -1:], factors, own, torch.zeros(1).long()
        )
        network[2 * i].weight.copy_(weight)
        network[2 * i].bias.copy_(bias[:, 0])
        masks[name], bias_masks[name] = PackedMask.from_dense(weight_mask), bias_mask[:, 0]
        hiding[name] = _kolmogorov_smirnov(weight[weight_mask].abs(), drawn.weight.abs().flatten())
        places = own
    kept, total = sum(m.kept for m in masks.values()), sum(m.numel for m in masks.values())
    report = {
        "widths": [m.out_features for m in _linears(source)],
        "weights": kept,
        "biases": sum(int(m.sum()) for m in bias_masks.values()),
        "density": kept / total,
        "hiding_p": hiding,
    }
    return Planted(network, source, masks, bias_masks, float(factors[0]), report)


def _put(drawn, theta, factors, rows, columns) -> tuple[Tensor, Tensor]:
    """``drawn`` with what of ``theta`` / ``factors`` is not 0 written at ``rows`` and ``columns``,
    and the mask of what was written."""
    mask = torch.zeros_like(drawn, dtype=torch.bool)
    mask[rows[:, None], columns] = theta != 0
    planted = torch.zeros_like(drawn)
    planted[rows[:, None], columns] = (theta / factors[:, None]).to(drawn.dtype)
    return torch.where(mask, planted, drawn), mask


def _match(theta: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """For every target neuron [T, k] its place among the source neurons [S, k], each taken once,
    and the factor s by which the source's parameters, where the target has any, come nearest."""
    free = torch.ones(len(random), dtype=torch.bool)
    places, factors = [], []
    for row in theta:
        m = random * (row != 0)
        norm = m.square().sum(1)
        s = (m @ row) / norm
        distance = (row - s[:, None] * m).norm(dim=1)
        usable = free & (s > 0)
        if bool(usable.any()):
            place = int(torch.where(usable, distance, torch.inf).argmin())
            factor = s[place]
        else:  # no free neuron points there, or there is nothing to plant
            place = int(free.float().argmax())
            factor = row.norm() / norm[place].sqrt() if bool(row.any()) else row.new_ones(())
        free[place] = False
        places.append(place)
        factors.append(factor)
    return torch.tensor(places), torch.stack(factors)


def existence_probability(target: nn.Sequential, width: int, tolerance: float) -> float:
    """Theorem 2: how probable it is at least that a random network, hidden layers ``width`` wide,
    contains ``target`` with every non-zero parameter within ``tolerance``.

    Parameters of the source are U[-1, 1], those of the target at most 1 - ``tolerance`` (rescale a
    homogeneous network first). One source neuron matches one with k parameters with probability
    tolerance^k; a layer fails at most as often as its neurons do together. Outputs have one
    candidate each.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: got {tolerance}, need a number in (0, 1)")
    probability, layers = 1.0, _linears(target)
    for layer in layers:
        candidates = 1 if layer is layers[-1] else width
        counts = (layer.weight != 0).sum(1) + (layer.bias != 0)
        missed = sum((1 - tolerance**k) ** candidates for k in counts.tolist())
        probability *= max(1 - missed, 0.0)
    return probability


def mask_iou(found: Mapping[str, PackedMask], planted: Mapping[str, PackedMask]) -> float:
    """Entries that both masks keep over entries that either keeps, over all layers together."""
    both = sum((found[name] & mask).kept for name, mask in planted.items())
    either = sum((found[name] | mask).kept for name, mask in planted.items())
    return both / either if either else 1.0


def _kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """p-value of the two-sample test, by the asymptotic law."""
    points = torch.cat([a, b])
    a, b = a.sort().values, b.sort().values
    gap = torch.searchsorted(a, points, right=True) / len(a) - torch.searchsorted(
        b, points, right=True
    ) / len(b)
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    z = (root + 0.12 + 0.11 / root) * float(gap.abs().max())
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * z) ** 2) for k in range(1, 101))
    return min(max(sum(terms), 0.0), 1.0) if z > 0.2 else 1.0


def _piecewise(f: Callable, low: float, high: float, knots: int):
    """(w, b, o, c): f(x) ~ sum o_j relu(w_j x + b_j) + c from ``low`` to ``high``; w is +-1 in
    turn, so that not all neurons look alike."""
    if knots < 2:
        raise ValueError(f"knots: got {knots}, need at least 2")
    t = torch.linspace(low, high, knots, dtype=torch.float64)
    ends = torch.cat([t, t[-1:] + (t[1] - t[0])])
    slope = f(ends).diff() / ends.diff()
    o = torch.cat([slope[:1], slope.diff()])
    o[o.abs() < 1e-9 * slope.abs().max()] = 0
    w = torch.ones_like(t)
    w[1::2] = -1  # relu(-z) = relu(z) - z: the first neuron makes up for the lines
    o[0] += o[1::2].sum()
    b = -t * w
    c = f(t[:1])[0] - (o * torch.relu(w * t[0] + b)).sum()
    return w, b, o, c


def _network(layers: Sequence[tuple[Tensor, Tensor]]) -> nn.Sequential:
    modules = []
    for weight, bias in layers:
        bias = bias if len(bias) else weight.new_zeros(len(weight))
        modules += [_linear(weight, bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _linears(network: nn.Sequential) -> list[nn.Linear]:
    return [m for m in network if isinstance(m, nn.Linear)]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return layer


def _check_depth(depth: int) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 3:
        raise ValueError(f"depth: got {depth!r}, need an integer of at least 3, input included")


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    number, sigma = ops.signed64(layer_number(name)), 1 / math.sqrt(3)
    return 0.5 + 0.5 * ops.regenerate(seed, number, shape, "uniform", sigma, stream="sampling")
