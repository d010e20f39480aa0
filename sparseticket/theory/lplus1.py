"""One random layer more than the target has: Burkholz, "Convolutional and residual networks
provably contain lottery tickets" (ICML 2022) and "Most activation functions can win the lottery
without excessive depth" (NeurIPS 2022); code: RelationalML/LT-existence.

The source's first layer holds univariate neurons phi(v x_i) and constant ones phi(b). The next one
has rho copies of every neuron of the target's first layer, whose weights are subset sums over
products u v. From then on no products are needed: the rho copies of a parent, each with a random
link to the child, *are* what the child's subset sum chooses from. So depth L + 1 is enough, where
two layers for each one take 2L, at the price of rho times as many subset sums. Some copies of a
constant neuron carry the biases on.

phi(z) = phi(0) + m+ z for z > 0 and phi(0) + m- z for z < 0, exactly for ReLU and leaky ReLU, up to
a cubic term for tanh and the sigmoid. The neurons with v > 0 and those with v < 0 must then sum to
w / (m+ + m-) each, or all of them together to w / m where m+ = m- = m. What phi(0) adds is one more
constant, which the bias takes off again.

Convolutions: the first layer is 1x1 and does the padding, so that constants reach its border as
well; later ones take the bias through a tap that never lies in the padding. Stride, dilation,
groups (of which the source knows nothing: its links to other groups are dropped), padding modes,
pooling and flattening are the target's own.

Every layer of the source is one call of ``regenerate``: a neuron one of whose parameters cannot be
met is passed over for the next row (a redraw) and stays in the source, all links dropped.

Deviations from the paper and from its code:

- the code redraws for ever where the univariate neurons of one sign are few: here, as many are
  taken as give every input ``base`` of each sign;
- a constant neuron's value is known, and so enters the next layer's sums as it is, without error;
- for tanh and the sigmoid, v is U[-s, s], so small that phi(v x) is off its line by eps of it at
  most, and the next layer's weights are large: the products have ReLU's distribution;
- fewest elements within ``eps``, from up to 64 numbers, where the code tries up to ten of 15.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket.formats import check_density
from sparseticket.masks import PackedMask
from sparseticket.prng import check_seed

from .copies import Draws, Parents, choose, goal_of
from .layers import (
    LAYERS,
    check_modules,
    convolution,
    dense_weight,
    inputs_of,
    like,
    line_of,
    of_constant,
)
from .ticket import Construction, linear_with

__all__ = ["LPlusOne", "lplus1_bound", "lplus1_ticket"]

_BOUND = "a weight is off by at most eps wherever its sums were solved; outputs: lplus1_bound"
_MOST = 64  # numbers that a subset sum can choose from


@dataclass(frozen=True)
class LPlusOne(Construction):
    """``neurons``: for every layer of the target, which neurons of its source layer are copies of
    which of its own, [neurons, copies]; ``rows``: for every source layer, which rows of the random
    weights it has: all up to the last one used, but in the last layer, whose passed-over rows are
    no outputs; ``links``: of a random sparse source, by parameter, the links that there are."""

    neurons: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    links: dict[str, PackedMask]


@torch.no_grad()
def lplus1_ticket(
    target: nn.Sequential,
    base: int | Sequence[int] = 15,
    eps: float = 0.01,
    *,
    density: float = 1.0,
    redraws: int = 20,
    radius: float = 1.0,
    nonnegative: bool = False,
    seed: int = 0,
    **solver: Any,
) -> LPlusOne:
    """``target`` inside a random network with one layer more.

    ``target``: a Sequential of Linear and Conv2d layers and their biases; between them ReLU,
    LeakyReLU, Tanh, Sigmoid or Identity, pooling, Flatten; float32 or float64. The added layer has
    its first activation. ``base``: rho, the random numbers that a subset sum chooses from, at most
    64, one for all layers of the target or one for each: the first, which has products, needs more.
    ``density``: of a random mask on the source's links (not those of the added layer), each one
    there with that probability; copies are then so many that ``base`` of their links are there.
    ``redraws``: source neurons that a neuron may pass over; then it keeps the last one, and what is
    off by more than ``eps`` counts as ``failed``. ``radius``: largest |input| for which the neurons
    phi(v x) of tanh and the sigmoid have to be near their lines. ``nonnegative``: inputs are never
    below 0, neurons with v < 0 not needed. ``solver``: further arguments of :func:`subset_sum`.

    Layer l of the source is ``lplus1.l`` of the generator: U[-2, 2], from the second layer U[-1, 1]
    (for tanh and the sigmoid see the module); its biases, in the added layer, U[-2, 2].
    """
    modules = check_modules(target)
    at = [i for i, m in enumerate(modules) if isinstance(m, LAYERS)]
    layers = [modules[i] for i in at]
    check_seed(seed)
    numbers = _check_numbers(base, len(layers), eps, density, redraws, radius)
    copies = [math.ceil((n + 2 * math.sqrt(n * (1 - density))) / density) for n in numbers] + [1]
    draws = Draws(seed, layers[0].weight, density, redraws, eps, solver)
    biased = [m.bias is not None and bool((m.bias != 0).any()) for m in layers]
    phi = next((m for m in modules if line_of(m) is not None), nn.ReLU())
    added, parents = _added_layer(
        layers[0], phi, copies[0], any(biased), nonnegative, radius, draws
    )
    source = [*map(copy.deepcopy, modules[: at[0]]), added, copy.deepcopy(phi)]
    masks, links, parts = {}, {}, []
    for number, (layer, start, end) in enumerate(zip(layers, at, [*at[1:], None], strict=True), 1):
        after = modules[start + 1 : end]
        constants = copies[number] if any(biased[number:]) else 0
        goal = goal_of(layer, parents, copies[number], constants, after)
        part = choose(goal, parents, layer, number, end is None, draws)
        if number == 1:
            for parameter, mask in _kept_of_added(added, parents, part.chosen).items():
                masks[f"{len(source) - 2}.{parameter}"] = PackedMask.from_dense(mask)
        masks[f"{len(source)}.weight"] = PackedMask.from_dense(part.chosen)
        if part.links is not None:
            links[f"{len(source)}.weight"] = PackedMask.from_dense(part.links)
        source += [like(layer, part.weight, padded=number > 1), *map(copy.deepcopy, after)]
        parts.append(part)
        parents = part.parents(after)
    return LPlusOne.of(
        nn.Sequential(*source),
        masks,
        layers,
        torch.cat([part.error.flatten() for part in parts]),
        eps,
        _BOUND,
        sum(part.redraws for part in parts),
        neurons=tuple(part.neurons for part in parts),
        rows=(torch.arange(len(added.weight)), *(part.rows for part in parts)),
        links=links,
    )


def _check_numbers(base, layers, eps, density, redraws, radius) -> list[int]:
    """``base`` for every layer."""
    if not isinstance(base, int | Sequence):
        raise TypeError(f"base: got {base!r}, need an integer, or one for each layer")
    numbers = [base] * layers if isinstance(base, int) else list(base)
    if len(numbers) != layers or not all(1 <= n <= _MOST for n in numbers):
        raise ValueError(f"base: got {base}, need 1 to {_MOST}, one number or {layers}")
    if check_density(density) == 0:
        raise ValueError("density: got 0, need a source with links")
    for name, value in (("eps", eps), ("radius", radius)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value}, need a finite number > 0")
    if redraws < 0:
        raise ValueError(f"redraws: got {redraws}, need at least 0")
    return numbers


def _added_layer(
    layer, phi, copies, biased, nonnegative, radius, draws
) -> tuple[nn.Module, Parents]:
    """Neurons v x_i, one input after the other in rounds, until all have ``copies`` of each sign;
    then constant ones."""
    line, inputs = line_of(phi), inputs_of(layer)
    offset = float(phi(torch.zeros((), dtype=torch.float64)))
    limit = math.sqrt(draws.eps * line.above / line.cubic) / radius if line.cubic else 2.0
    constants = 2 * copies * (2 if offset else 1) if biased or offset else 0
    rounds = copies
    while True:
        neurons = rounds * inputs
        weight = draws.weight("lplus1.0", (neurons + constants, inputs), limit)
        slopes = weight[:neurons].view(rounds, inputs, inputs).diagonal(dim1=1, dim2=2)
        sides = [slopes > 0, slopes < 0][: 1 if nonnegative else 2]
        if line.above == line.below:
            sides = [slopes != 0]
        there = torch.stack(sides, 2).flatten(1).T  # [inputs * signs, rounds]
        lengths = there.sum(1)
        if int(lengths.min()) >= copies:
            break
        rounds += 1 + copies // 4
    order = there.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : lengths.max()]
    groups = order * inputs + torch.arange(inputs).repeat_interleave(len(sides))[:, None]
    bias = draws.weight("lplus1.0.bias", (neurons + constants,), 2.0)
    values = of_constant([phi], bias[neurons:].double())
    slope = line.above if len(sides) == 1 else line.above + line.below
    next_limit = 2 / (limit * line.above)
    # phi(0) of all chosen neurons adds up as a random walk does; constants must undo it
    reach = next_limit * max(1, math.sqrt(dense_weight(layer)[0].numel()) / 4) if offset else 1.0
    parents = Parents(
        groups,
        lengths,
        len(sides),
        neurons + values.nonzero()[:, 0],
        torch.cat([slopes.flatten().double() * slope, values]),
        torch.cat([values.new_full((neurons,), offset), values.new_zeros(constants)]),
        torch.cat([weight.new_full((neurons,), next_limit), weight.new_full((constants,), reach)]),
    )
    bias = bias if constants else None
    if isinstance(layer, nn.Linear):
        return linear_with(weight, bias), parents
    return convolution(layer, weight[..., None, None], bias=bias), parents


def _kept_of_added(added: nn.Module, parents: Parents, chosen: Tensor) -> dict[str, Tensor]:
    """Masks of the added layer: the input of every neuron that is used, or its bias."""
    used = chosen.flatten(1).any(0).view(len(parents.carried), -1).any(1)
    constant = torch.zeros_like(used)
    constant[parents.constants] = True
    neurons = (used & ~constant).nonzero()[:, 0]
    masks = {"weight": torch.zeros(added.weight.shape, dtype=torch.bool)}
    masks["weight"][neurons, neurons % added.weight.shape[1]] = True
    if added.bias is not None:
        masks["bias"] = used & constant
    return masks


@torch.no_grad()
def lplus1_bound(target: nn.Sequential, found: LPlusOne, x: Tensor) -> Tensor:
    """How far the outputs of ``found.network`` can be from those of ``target`` at ``x``, each one,
    but for rounding.

    With e the largest error of a weight, layer by layer: |dz| <= |U| |dh| + e (|h|_1 + 1), |U| the
    chosen random weights, h the target's inputs that a neuron sees; |dh| <= Lip(phi) |dz|. Neurons
    of the added layer are off their lines by c |v x|^3.
    """
    modules, network = list(target), list(found.network)
    start = next(i for i, m in enumerate(modules) if isinstance(m, LAYERS))
    h = nn.Sequential(*modules[:start])(x)
    off = line_of(network[start + 1]).cubic * _magnitude(network[start])(h.abs()) ** 3
    neurons = iter(found.neurons)
    for module, twin in zip(modules[start:], network[start + 2 :], strict=True):
        if isinstance(module, LAYERS):
            seen = like(module, torch.ones_like(dense_weight(module)[:1]))(h.abs())
            off = _magnitude(twin)(off)
            off[:, next(neurons).flatten()] += found.report.max_error * (seen + 1)
        else:
            line = line_of(module)
            off = twin(off) if line is None else line.lipschitz * off
        h = module(h)
    return off


def _magnitude(layer: nn.Module) -> nn.Module:
    return like(layer, layer.weight.abs())
