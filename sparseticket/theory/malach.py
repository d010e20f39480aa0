"""Single random neurons for a weight: Malach, Yehudai, Shalev-Shwartz, Shamir, "Proving the lottery
ticket hypothesis: pruning is all you need", ICML 2020 (arXiv 2002.00585).

alpha x = relu(alpha x) - relu(-alpha x): two neurons of a random hidden layer stand for a weight
if one has nearly the weights alpha (in) and 1 (out), the other -alpha and -1. Every nonzero weight
of the target searches a block of neurons of its own for them, so that the layer's width grows as
1/eps^2. :func:`neuron_subnetwork` is the weaker kind of ticket, which drops whole neurons.

Deviations: the paper's constants are not known here, those of :func:`malach_neurons` are proved by
hand (a neuron hits with probability e^2/(4s) and a block must hit twice); weights up to any size s
are taken, from a first layer U[-s, s]; weights of at most eps/2 are dropped; ``rule="product"``
accepts any pair whose product is near enough, which needs about 1/eps neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseticket.masks import PackedMask
from sparseticket.prng import check_seed

from .pairs import drawn
from .ticket import Construction, check_target, linear_with

__all__ = ["NeuronSubnetwork", "malach_neurons", "malach_ticket", "neuron_subnetwork"]

_BOUND = "a target weight is off by at most eps, all with probability >= 1 - delta (paper's rule)"


def malach_neurons(eps: float, delta: float, scale: float = 1.0) -> int:
    """Neurons in which both of a weight's are found with probability at least 1 - ``delta``, by the
    paper's rule with tolerance eps/2 a factor: (16 s / eps^2) ln(2 / delta)."""
    return math.ceil(16 * scale / eps**2 * math.log(2 / delta))


@torch.no_grad()
def malach_ticket(
    target: nn.Sequential,
    eps: float,
    *,
    delta: float = 0.1,
    rule: str = "paper",
    neurons: int | None = None,
    seed: int = 0,
) -> Construction:
    """``target``, Linear and ReLU in turn and without biases, in a source of twice its depth.

    ``rule``: ``paper``, both factors within eps/2 of alpha and 1 (-alpha and -1); ``product``, the
    product within eps. ``neurons``: of the block of a weight; by default :func:`malach_neurons` at
    ``delta`` over the number of weights, or 64/eps for ``product``. A weight whose block holds no
    such neuron for a sign of x gets none for it, and counts as failed.
    """
    layers = check_target("malach_ticket", target)
    check_seed(seed)
    if rule not in ("paper", "product"):
        raise ValueError(f"rule: got {rule!r}, accepted: paper, product")
    if not (eps > 0 and 0 < delta < 1):
        raise ValueError(f"eps, delta: got {eps}, {delta}, need eps > 0 and delta in (0, 1)")
    weights = sum(m.weight.numel() for m in layers)
    modules, masks, errors = [], {}, []
    for i, layer in enumerate(layers):
        scale = max(1.0, float(layer.weight.abs().max()))
        block = neurons or _default_block(rule, eps, delta / weights, scale)
        first, second, chosen, error = _matched(layer.weight, block, scale, eps, rule, i, seed)
        for k, mask in zip((0, 2), chosen, strict=True):
            masks[f"{len(modules) + k}.weight"] = PackedMask.from_dense(mask)
        modules += [linear_with(first), nn.ReLU(), linear_with(second), nn.ReLU()]
        errors.append(error)
    source = nn.Sequential(*modules[:-1])
    return Construction.of(source, masks, layers, torch.cat(errors), eps, _BOUND)


def _default_block(rule: str, eps: float, delta: float, scale: float) -> int:
    return malach_neurons(eps, delta, scale) if rule == "paper" else math.ceil(64 * scale / eps)


def _matched(weight, block, scale, eps, rule, number, seed):
    """Both layers, their masks, and the error of every weight for x > 0 and for x < 0."""
    rows, columns = weight.shape
    hidden = rows * columns * block
    first = drawn(seed, f"malach.{number}.v", (hidden, columns), scale, weight)
    second = drawn(seed, f"malach.{number}.u", (rows, hidden), 1.0, weight)
    v = first.view(rows, columns, block, columns).diagonal(dim1=1, dim2=3).mT  # [m, d, block]
    u = second.view(rows, rows, columns, block).diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    large = weight.abs() > eps / 2  # below, a neuron's sign would not be sure
    goal = weight[..., None]
    masks = [torch.zeros(t.shape, dtype=torch.bool) for t in (first, second)]
    errors = []
    for sign in (1, -1):  # of x, and so of the first factor
        if rule == "paper":  # the neuron of sign(v) = sign has v near sign |alpha|
            near = (v - sign * goal.abs()).abs() <= eps / 2
            fits = near & ((u - sign * goal.sign()).abs() <= eps / 2) & (v.sign() == sign)
        else:
            fits = ((u * v - goal).abs() <= eps) & (v.sign() == sign)
        fits &= large[..., None]
        place = fits.to(torch.uint8).argmax(-1)
        found = fits.any(-1)
        product = (u * v).gather(-1, place[..., None]).squeeze(-1)
        errors.append((torch.where(found, product, 0) - weight).abs().double().flatten())
        j, i = found.nonzero(as_tuple=True)
        neuron = (j * columns + i) * block + place[j, i]
        masks[0][neuron, i] = True
        masks[1][j, neuron] = True
    return first, second, masks, torch.cat(errors)


@dataclass(frozen=True)
class NeuronSubnetwork:
    """``network``: the kept neurons of a random layer, their random outputs and one scale;
    ``kept``: bool [k]; ``features``: the fitted combination of all neurons that it stands for."""

    network: nn.Sequential
    features: nn.Sequential
    kept: Tensor
    scale: float


@torch.no_grad()
def neuron_subnetwork(
    x: Tensor, y: Tensor, neurons: int, *, ridge: float = 1e-2, seed: int = 0
) -> NeuronSubnetwork:
    """Drop whole neurons of u . relu(V x), so that what is left does what the best combination
    v* of the same neurons does, up to one scale 4C, C = max |v*|.

    ``x`` [N, d], ``y`` [N]. Neuron i is kept with probability |v*_i| / C if u_i has the sign of
    v*_i, else never: the expectation of what is kept is v* / (4C). Its error against v* falls as
    the square root of ``neurons``; v* itself cannot be had with few neurons (the paper's lower
    bound, exponential in d).
    """
    check_seed(seed)
    like = x.double()
    first = drawn(seed, "malach.neurons.v", (neurons, x.shape[1]), 1.0, like)
    second = drawn(seed, "malach.neurons.u", (neurons,), 1.0, like)
    hidden = (like @ first.T).relu()
    normal = hidden.T @ hidden + ridge * len(x) * torch.eye(neurons, dtype=like.dtype)
    best = torch.linalg.solve(normal, hidden.T @ y.double())
    top = float(best.abs().max())
    chance = drawn(seed, "malach.neurons.keep", (neurons,), 1.0, like).abs()
    kept = (chance * top < best.abs()) & (second.sign() == best.sign())
    scale = 4 * top
    pruned = (second * kept * scale)[None]
    network = nn.Sequential(linear_with(first), nn.ReLU(), linear_with(pruned))
    features = nn.Sequential(linear_with(first), nn.ReLU(), linear_with(best[None]))
    return NeuronSubnetwork(network, features, kept, scale)
