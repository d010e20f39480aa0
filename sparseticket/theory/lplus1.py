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

- the code redraws for ever where the univariate neurons of one sign are few: here, so many are
  drawn that every input has ``base`` of each sign;
- a constant neuron's value is known, and so enters the next layer's sums as it is, without error;
- for tanh and the sigmoid, v is U[-s, s], so small that phi(v x) is off its line by eps of it at
  most, and the next layer's weights are large: the products have ReLU's distribution;
- fewest elements within ``eps``, from up to 64 numbers, where the code tries up to ten of 15.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseticket.formats import check_density
from sparseticket.masks import PackedMask
from sparseticket.prng import check_seed

from .copies import MOST, Draws, Parents, choose, goal_of
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

__all__ = ["LPlusOne", "lplus1_bound", "lplus1_budgets", "lplus1_ticket"]

_BOUND = "a weight is off by at most eps wherever its sums were solved; outputs: lplus1_bound"


@dataclass(frozen=True)
class LPlusOne(Construction):
    """``neurons``: for every layer of the target, which neurons of its source layer are copies of
    which of its own, [neurons, copies]; ``rows``: for every source layer, which rows of the random
    weights it has: all up to the last one used, but in the last layer, whose passed-over rows are
    no outputs; ``links``: of a random sparse source, by parameter, the links that there are;
    ``errors``: the largest of a weight or bias, for every layer of the target."""

    neurons: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    links: dict[str, PackedMask]
    errors: tuple[float, ...]


@torch.no_grad()
def lplus1_ticket(
    target: nn.Sequential,
    base: int | Sequence[int] = 15,
    eps: float | Sequence[float] = 0.01,
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
    ``eps``: error of a weight, likewise; see :func:`lplus1_budgets`.
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
    numbers, budgets = _check_numbers(base, eps, len(layers), density, redraws, radius)
    copies = [math.ceil((n + 2 * math.sqrt(n * (1 - density))) / density) for n in numbers] + [1]
    draws = Draws(seed, layers[0].weight, density, redraws, budgets[0], solver)
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
        draws = dataclasses.replace(draws, eps=budgets[number - 1])
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
        torch.cat(
            [torch.full_like(p.error, e).flatten() for p, e in zip(parts, budgets, strict=True)]
        ),
        _BOUND,
        sum(part.redraws for part in parts),
        neurons=tuple(part.neurons for part in parts),
        rows=(torch.arange(len(added.weight)), *(part.rows for part in parts)),
        links=links,
        errors=tuple(float(part.error.max()) for part in parts),
    )


def _check_numbers(base, eps, layers, density, redraws, radius) -> tuple[list[int], list[float]]:
    """``base`` and ``eps`` for every layer."""
    for name, value in (("base", base), ("eps", eps)):
        if not isinstance(value, int | float | Sequence):
            raise TypeError(f"{name}: got {value!r}, need a number, or one for each layer")
    numbers = list(base) if isinstance(base, Sequence) else [base] * layers
    if len(numbers) != layers or not all(n in range(1, MOST + 1) for n in numbers):
        raise ValueError(f"base: got {base}, need 1 to {MOST}, one number or {layers}")
    budgets = list(eps) if isinstance(eps, Sequence) else [eps] * layers
    if len(budgets) != layers or not all(0 < e < math.inf for e in budgets):
        raise ValueError(f"eps: got {eps}, need finite numbers > 0, one or {layers}")
    if check_density(density) == 0:
        raise ValueError("density: got 0, need a source with links")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius: got {radius}, need a finite number > 0")
    if redraws < 0:
        raise ValueError(f"redraws: got {redraws}, need at least 0")
    return numbers, budgets


def _added_layer(
    layer, phi, copies, biased, nonnegative, radius, draws
) -> tuple[nn.Module, Parents]:
    """Neurons phi(v x_i), then constant ones."""
    line = line_of(phi)
    offset = float(phi(torch.zeros((), dtype=torch.float64)))
    limit = math.sqrt(draws.eps * line.above / line.cubic) / radius if line.cubic else 2.0
    signs = [0] if line.above == line.below else [1] if nonnegative else [1, -1]
    constants = 2 * copies * (2 if offset else 1) if biased or offset else 0
    weight, own, groups = _univariate(inputs_of(layer), copies, signs, constants, limit, draws)
    slope = line.above if len(signs) == 1 else line.above + line.below
    next_limit = 2 / (limit * line.above)
    bias = draws.weight("lplus1.0.bias", (len(weight),), 2.0)
    values = of_constant([phi], bias[len(own) :].double())
    reaches = torch.ones_like(values)
    if offset:  # what all chosen neurons add is a random walk: half of the constants go as far
        steps = dense_weight(layer)[0].numel()
        reaches[: constants // 2] = next_limit * max(1, math.sqrt(steps) / 4)
    sets = (torch.arange(constants)[values != 0] + len(own)).tensor_split(2 if offset else 1)
    parents = Parents(
        groups,
        len(signs),
        tuple(some for some in sets if len(some)),
        torch.cat([own.double() * slope, values]),
        torch.cat([torch.full_like(own.double(), offset), torch.zeros_like(values)]),
        torch.cat([torch.full_like(own.double(), next_limit), reaches]),
    )
    bias = bias if constants else None
    if isinstance(layer, nn.Linear):
        return linear_with(weight, bias), parents
    return convolution(layer, weight[..., None, None], bias=bias), parents


def _univariate(inputs, copies, signs, constants, limit, draws) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows, each for one input, the inputs going round until all have ``copies`` of each of
    ``signs`` (0: any), and ``constants`` more; what they are of their inputs; and which are those
    [inputs * signs, copies]."""
    rounds = copies
    while True:
        weight = draws.weight("lplus1.0", (rounds * inputs + constants, inputs), limit)
        own = weight[: rounds * inputs].view(rounds, inputs, inputs).diagonal(dim1=1, dim2=2)
        fits = torch.stack([own * s > 0 if s else own != 0 for s in signs], 2).flatten(1).T
        if int(fits.sum(1).min()) >= copies:
            break
        rounds += 1 + copies // 4
    order = fits.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :copies]
    owner = torch.arange(inputs).repeat_interleave(len(signs))
    return weight, own.flatten(), order * inputs + owner[:, None]


def _kept_of_added(added: nn.Module, parents: Parents, chosen: Tensor) -> dict[str, Tensor]:
    """Masks of the added layer: the input of every neuron that is used, or its bias."""
    used = chosen.flatten(1).any(0).view(len(parents.carried), -1).any(1)
    constant = torch.zeros_like(used)
    for some in parents.constants:
        constant[some] = True
    neurons = (used & ~constant).nonzero()[:, 0]
    masks = {"weight": torch.zeros(added.weight.shape, dtype=torch.bool)}
    masks["weight"][neurons, neurons % added.weight.shape[1]] = True
    if added.bias is not None:
        masks["bias"] = used & constant
    return masks


def lplus1_budgets(target: nn.Sequential, eps: float) -> list[float]:
    """An ``eps`` for every layer of ``target``, by which all disturb the outputs about as much as
    ``eps`` in the last one: smaller ones in front.

    A sum has about two links, whose weights' squares are 0.4 on average, so that copies which are
    off by independent errors d leave their child off by about sqrt(k) d, k the nonzero weights of
    the child. It is a rule, not a bound; that is :func:`lplus1_bound`.
    """
    layers = [m for m in check_modules(target) if isinstance(m, LAYERS)]
    budgets = [eps]
    for layer in layers[:0:-1]:
        nonzero = int((layer.weight != 0).sum()) / len(layer.weight)
        budgets.insert(0, budgets[0] / math.sqrt(max(nonzero, 1)))
    return budgets


@torch.no_grad()
def lplus1_bound(target: nn.Sequential, found: LPlusOne, x: Tensor) -> Tensor:
    """How far the outputs of ``found.network`` can be from those of ``target`` at ``x``, each one,
    but for rounding.

    With e a layer's largest error of a weight: |dz| <= |U| |dh| + e (|h|_1 + 1), |U| the
    chosen random weights, h the target's inputs that a neuron sees; |dh| <= Lip(phi) |dz|. Neurons
    of the added layer are off their lines by c |v x|^3.
    """
    modules, network = list(target), list(found.network)
    start = next(i for i, m in enumerate(modules) if isinstance(m, LAYERS))
    h = nn.Sequential(*modules[:start])(x)
    off = line_of(network[start + 1]).cubic * _magnitude(network[start])(h.abs()) ** 3
    sizes = zip(found.neurons, found.errors, strict=True)
    for module, twin in zip(modules[start:], network[start + 2 :], strict=True):
        if isinstance(module, LAYERS):
            seen = like(module, torch.ones_like(dense_weight(module)[:1]))(h.abs())
            off = _magnitude(twin)(off)
            neurons, e = next(sizes)
            off[:, neurons.flatten()] += e * (seen + 1)
        else:
            line = line_of(module)
            off = twin(off) if line is None else line.lipschitz * off
        h = module(h)
    return off


def _magnitude(layer: nn.Module) -> nn.Module:
    return like(layer, layer.weight.abs())
