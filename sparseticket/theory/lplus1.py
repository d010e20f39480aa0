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
- for tanh and the sigmoid, v is small, U[-s, s] by :func:`_slope`, and the next layer's weights
  large, so that the products have ReLU's distribution;
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

from .pairs import bits, drawn, uniform
from .solver import subset_sum
from .ticket import Construction, linear_with

__all__ = ["LPlusOne", "lplus1_bound", "lplus1_ticket"]

_BOUND = (
    "a target weight is off by at most eps wherever its sums were solved; outputs: lplus1_bound"
)
_MOST = 64  # numbers that a subset sum can choose from
_AT_ONCE = 1 << 23  # numbers of the subset sums that are solved in one call
_LAYERS = (nn.Linear, nn.Conv2d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)


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
    redraws: int = 50,
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
    modules = _check_target(target)
    at = [i for i, m in enumerate(modules) if isinstance(m, _LAYERS)]
    layers = [modules[i] for i in at]
    check_seed(seed)
    numbers = _check_numbers(base, len(layers), eps, density, redraws, radius)
    copies = [math.ceil((n + 2 * math.sqrt(n * (1 - density))) / density) for n in numbers] + [1]
    draws = _Draws(seed, layers[0].weight, density, redraws, eps, solver)
    biased = [m.bias is not None and bool((m.bias != 0).any()) for m in layers]
    phi = next((m for m in modules if _line(m) is not None), nn.ReLU())
    added, parents = _added_layer(
        layers[0], phi, copies[0], any(biased), nonnegative, radius, draws
    )
    source = [*map(copy.deepcopy, modules[: at[0]]), added, copy.deepcopy(phi)]
    masks, links, parts = {}, {}, []
    for number, (layer, start, end) in enumerate(zip(layers, at, [*at[1:], None], strict=True), 1):
        after = modules[start + 1 : end]
        constants = copies[number] if any(biased[number:]) else 0
        goal = _goal(layer, parents, copies[number], constants, after)
        part = _choose(goal, parents, layer, number, end is None, draws)
        if number == 1:
            for parameter, mask in _kept_of_added(added, parents, part.chosen).items():
                masks[f"{len(source) - 2}.{parameter}"] = PackedMask.from_dense(mask)
        masks[f"{len(source)}.weight"] = PackedMask.from_dense(part.chosen)
        if part.links is not None:
            links[f"{len(source)}.weight"] = PackedMask.from_dense(part.links)
        source += [_like(layer, part.weight, padded=number > 1), *map(copy.deepcopy, after)]
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


# What is covered ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """phi(z) - phi(0) is about ``above`` z for z > 0 and ``below`` z for z < 0, off by at most
    ``cubic`` |z|^3; ``lipschitz``: a Lipschitz constant of phi."""

    above: float
    below: float
    cubic: float
    lipschitz: float


def _line(module: nn.Module) -> _Line | None:
    """None for what is no activation that the construction knows."""
    match module:
        case nn.Identity():
            return _Line(1, 1, 0, 1)
        case nn.ReLU():
            return _Line(1, 0, 0, 1)
        case nn.LeakyReLU() if module.negative_slope >= 0:
            return _Line(1, module.negative_slope, 0, max(1, module.negative_slope))
        case nn.Tanh():
            return _Line(1, 1, 1 / 3, 1)
        case nn.Sigmoid():
            return _Line(1 / 4, 1 / 4, 1 / 48, 1 / 4)
    return None


def _check_target(target: nn.Module) -> list[nn.Module]:
    """Its modules; ValueError for what the construction does not cover."""
    modules = list(target) if isinstance(target, nn.Sequential) else []
    if not any(isinstance(m, _LAYERS) for m in modules):
        found = ", ".join(type(m).__name__ for m in modules) or type(target).__name__
        raise ValueError(
            f"lplus1_ticket: target: got {found}, need a Sequential with Linear or Conv2d layers"
        )
    flat = None
    for module in modules:
        problem = _problem(module)
        if isinstance(module, nn.Conv2d) and flat:
            problem = "a convolution cannot follow a flat layer"
        if isinstance(module, nn.Linear) and flat is False:
            problem = "needs a Flatten between it and the convolution before"
        if problem:
            raise ValueError(f"lplus1_ticket: target: got {module}: {problem}")
        if isinstance(module, nn.Flatten | nn.Linear | nn.Conv2d):
            flat = not isinstance(module, nn.Conv2d)
    return modules


def _problem(module: nn.Module) -> str:
    """Why the construction does not cover it, or nothing."""
    kind = type(module)
    if kind in _LAYERS:
        numbers = list(module.parameters())
        if module.weight.dtype not in (torch.float32, torch.float64) or not module.weight.numel():
            return "need weights in float32 or float64, at least one"
        return "" if all(bool(p.isfinite().all()) for p in numbers) else "it is not finite"
    if kind is nn.AvgPool2d:
        padded = bool(torch.tensor(module.padding).any()) and module.count_include_pad
        if padded or module.divisor_override is not None:
            return "it changes constants; need count_include_pad=False and no divisor_override"
    elif kind is nn.Flatten:
        if (module.start_dim, module.end_dim) != (1, -1):
            return "need start_dim=1, end_dim=-1"
    elif kind not in _POOLS and _line(module) is None:
        return (
            "the construction does not cover it; it takes Linear, Conv2d, ReLU, LeakyReLU with a "
            "slope >= 0, Tanh, Sigmoid, Identity, 2-d pooling, Flatten (fold a batch norm into its "
            "convolution)"
        )
    return ""


def _check_numbers(base, layers, eps, density, redraws, radius) -> list[int]:
    """``base`` for every layer."""
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


# Layers on other weights ----------------------------------------------------------------------


def _inputs(layer: nn.Module) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same" and any(span % 2 for span in spans):
        raise ValueError(
            f"lplus1_ticket: target: got {layer}: padding='same' is uneven for it; pad in numbers"
        )
    return tuple(span // 2 if layer.padding == "same" else 0 for span in spans)


def _tap_inside(layer: nn.Module) -> int:
    """Number of a tap of the kernel that never lies in the zeros around its input: what it sees of
    a constant is the constant. Tap t reaches from t d - p to p - (k - 1 - t) d behind the last."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return 0
    place = 0
    for k, d, p in zip(layer.kernel_size, layer.dilation, _padding(layer), strict=True):
        tap = -(-p // d)
        if tap * d > d * (k - 1) - p:
            raise ValueError(
                f"lplus1_ticket: target: got {layer}: every tap of its kernel sees padding, so "
                "that biases cannot be carried; need padding up to dilation * (kernel_size - 1) / 2"
            )
        place = place * k + tap
    return place


def _dense(layer: nn.Module) -> Tensor:
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


def _like(layer: nn.Module, weight: Tensor, padded: bool = True) -> nn.Module:
    """A layer of ``layer``'s kind and geometry, but for groups, that holds ``weight``."""
    if isinstance(layer, nn.Linear):
        return linear_with(weight)
    return _convolution(layer, weight, layer.stride, layer.dilation, padded)


def _convolution(layer, weight, stride=1, dilation=1, padded=True, bias=None) -> nn.Conv2d:
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


# The source -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """What the source is drawn from, and how it is searched."""

    seed: int
    like: Tensor
    density: float
    redraws: int
    eps: float
    solver: dict[str, Any]

    def weight(self, name: str, shape: Sequence[int], limit: float = 1.0) -> Tensor:
        return drawn(self.seed, name, shape, limit, self.like)

    def links(self, name: str, shape: Sequence[int]) -> Tensor | None:
        if self.density == 1:
            return None
        return (uniform(self.seed, name, shape, "mask") < self.density).flatten(1)


@dataclass(frozen=True)
class _Parents:
    """Neurons of a source layer, as the next one sees them.

    ``groups`` [G, m]: which stand for an input of the target's layer (or one sign of it), the first
    ``lengths`` [G] of each count; ``signs``: groups for an input; ``constants`` [c]: which have the
    same value everywhere. Of every neuron: ``carried``, that value, or its slope in the input;
    ``offset``: what else it is where the input is 0; ``limit``: of the next layer's weights to it.
    """

    groups: Tensor
    lengths: Tensor
    signs: int
    constants: Tensor
    carried: Tensor
    offset: Tensor
    limit: Tensor

    def through(self, taps: int, tap: int) -> _Parents:
        """The same of the columns of a weight that sees each neuron in ``taps`` places, constants
        in one of them only."""
        groups = self.groups[:, None] * taps + torch.arange(taps)[:, None]
        each = (t.repeat_interleave(taps) for t in (self.carried, self.offset, self.limit))
        lengths = self.lengths.repeat_interleave(taps)
        return _Parents(
            groups.flatten(0, 1), lengths, self.signs, self.constants * taps + tap, *each
        )


def _added_layer(
    layer, phi, copies, biased, nonnegative, radius, draws
) -> tuple[nn.Module, _Parents]:
    """Neurons v x_i, one input after the other in rounds, until all have ``copies`` of each sign;
    then constant ones."""
    line, inputs = _line(phi), _inputs(layer)
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
    values = phi(bias[neurons:].double())
    slope = line.above if len(sides) == 1 else line.above + line.below
    next_limit = 2 / (limit * line.above)
    # phi(0) of all chosen neurons adds up as a random walk does; constants must undo it
    reach = next_limit * max(1, math.sqrt(_dense(layer)[0].numel()) / 4) if offset else 1.0
    parents = _Parents(
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
    return _convolution(layer, weight[..., None, None], bias=bias), parents


def _kept_of_added(added: nn.Module, parents: _Parents, chosen: Tensor) -> dict[str, Tensor]:
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


@dataclass(frozen=True)
class _Goal:
    """What every child needs: ``weight`` [children, columns] of every group of parents and tap,
    ``bias`` [children] of the constants. ``copies`` of every neuron in turn, then ``constants``
    children that are constants themselves."""

    weight: Tensor
    bias: Tensor
    copies: int
    constants: int


def _goal(layer, parents, copies, constants, after) -> _Goal:
    dense = _dense(layer).double()
    channels = len(parents.groups) // parents.signs
    if dense[0].numel() % channels:
        raise ValueError(f"lplus1_ticket: target: got {layer} behind {channels} outputs")
    each = dense.reshape(len(dense), channels, 1, -1).expand(-1, -1, parents.signs, -1).flatten(1)
    bias = each.new_zeros(len(each)) if layer.bias is None else layer.bias.double()
    # a neuron without links is a constant already, where the activation is not 0 at 0
    level = float(_constant(after, each.new_zeros(())) == 0)
    return _Goal(
        torch.cat([each.repeat_interleave(copies, 0), each.new_zeros(constants, each.shape[1])]),
        torch.cat([bias.repeat_interleave(copies), bias.new_full((constants,), level)]),
        copies,
        constants,
    )


def _constant(modules: Sequence[nn.Module], value: Tensor) -> Tensor:
    """What they make of a constant, which pooling and flattening leave as it is."""
    for module in modules:
        value = value if _line(module) is None else module(value)
    return value


@dataclass(frozen=True)
class _Part:
    """A source layer: random ``weight``, the ``links`` that there are (None: all) and those that
    are ``chosen``; the ``rows`` of the generator that it holds. ``neurons`` [n, copies]: which of
    those stand for the target's; ``constants``, and their ``values`` before the activation;
    ``error`` of every subset sum [children, columns + 1]."""

    weight: Tensor
    links: Tensor | None
    chosen: Tensor
    rows: Tensor
    neurons: Tensor
    constants: Tensor
    values: Tensor
    error: Tensor
    redraws: int

    def parents(self, after: Sequence[nn.Module]) -> _Parents:
        """Of the next layer, ``after`` between the two."""
        carried = self.values.new_ones(len(self.rows))
        carried[self.constants] = _constant(after, self.values)
        lengths = torch.full((len(self.neurons),), self.neurons.shape[1])
        constants = self.constants[carried[self.constants] != 0]
        ones = torch.ones_like(carried)
        return _Parents(self.neurons, lengths, 1, constants, carried, 0 * ones, ones)


def _choose(goal: _Goal, parents: _Parents, layer, number: int, last: bool, draws) -> _Part:
    """A row of the generator for every child, a later one where that fails."""
    name = f"lplus1.{number}"
    taps = goal.weight.shape[1] // len(parents.groups)
    count = len(parents.carried)
    shape = (count, *layer.kernel_size) if isinstance(layer, nn.Conv2d) else (count * taps,)
    inside = _tap_inside(layer) if number > 1 and len(parents.constants) else 0
    parents = parents.through(taps, inside)
    limit = parents.limit.to(draws.like.dtype)
    weight, links = limit.new_empty(0, len(limit)), None
    rows = torch.zeros(len(goal.bias), dtype=torch.int64)
    error = goal.weight.new_zeros(len(rows), len(parents.groups) + 1)
    chosen, open_, taken, redraws = [], torch.arange(len(rows)), 0, 0
    for attempt in range(draws.redraws + 1):
        fresh = slice(taken, taken + len(open_))
        taken = fresh.stop
        if taken > len(weight):  # more than this attempt needs: every call draws all rows again
            drawn_ = (max(taken, len(weight) * 3 // 2), *shape)
            weight = draws.weight(name, drawn_).flatten(1) * limit
            links = draws.links(name, drawn_)
        there = None if links is None else links[fresh]
        wanted = goal.weight[open_], goal.bias[open_]
        mask, off = _solve(weight[fresh], there, *wanted, parents, draws)
        failed = (off > draws.eps).any(1) & (attempt < draws.redraws)
        mask[failed] = False
        chosen.append(mask)
        rows[open_[~failed]] = torch.arange(fresh.start, taken)[~failed]
        error[open_[~failed]] = off[~failed]
        redraws += int(failed.sum())
        open_ = open_[failed]
        if not len(open_):
            break
    held = rows if last else torch.arange(taken)
    place = torch.arange(len(rows)) if last else rows
    weight, chosen = weight[held], torch.cat(chosen)[held]
    neurons, constants = place.split([len(rows) - goal.constants, goal.constants])
    values = (weight[constants].double() * chosen[constants]) @ parents.carried
    return _Part(
        weight.view(-1, *shape),
        None if links is None else links[held].view(-1, *shape),
        chosen.view(-1, *shape),
        held,
        neurons.view(-1, goal.copies),
        constants,
        values,
        error,
        redraws,
    )


def _solve(weight, links, goal, bias, parents, draws) -> tuple[Tensor, Tensor]:
    """Chosen links [children, columns] of random ``weight``, and errors [children, groups + 1]:
    of the weights first, then of the biases and of what the chosen neurons' offsets add."""
    chosen, error = [], []
    step = max(_AT_ONCE // max(parents.groups.numel(), 1), 1)
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        there = None if links is None else links[some]
        exact = weight[some].double()
        values = exact * parents.carried
        found, off = _subsets(values, there, goal[some], parents.groups, parents.lengths, draws)
        rest = bias[some] - (exact * found) @ parents.offset
        count = torch.tensor([len(parents.constants)])
        more, off_bias = _subsets(
            values, there, rest[:, None], parents.constants[None], count, draws
        )
        chosen.append(found | more)
        error.append(torch.cat([off, off_bias], 1))
    return torch.cat(chosen), torch.cat(error)


def _subsets(values, links, goal, groups, lengths, draws) -> tuple[Tensor, Tensor]:
    """Chosen links [children, columns], and errors of ``goal`` [children, groups], each a sum over
    the columns in ``groups`` [groups, m], of links that there are the first 64."""
    if not groups.numel():
        return torch.zeros(values.shape, dtype=torch.bool), goal.abs()
    shape = (len(values), *groups.shape)
    if links is None:
        members, counts = groups[:, :_MOST].expand(len(values), -1, -1), lengths.expand(shape[:2])
    else:
        there = links[:, groups] & (torch.arange(groups.shape[1]) < lengths[:, None])
        order = there.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :_MOST]
        members, counts = groups.expand(shape).gather(-1, order), there.sum(-1)
    base = values[:, None].expand(-1, len(groups), -1).gather(-1, members)
    found = subset_sum(base, goal, draws.eps, lengths=counts.clamp(max=_MOST), **draws.solver)
    taken = bits(found.mask, base.shape[-1]).to(torch.uint8)
    chosen = torch.zeros(values.shape, dtype=torch.uint8)
    chosen.scatter_add_(1, members.flatten(1), taken.flatten(1))
    return chosen.bool(), found.error


# What follows for the outputs -----------------------------------------------------------------


@torch.no_grad()
def lplus1_bound(target: nn.Sequential, found: LPlusOne, x: Tensor) -> Tensor:
    """How far the outputs of ``found.network`` can be from those of ``target`` at ``x``, each one,
    but for rounding.

    With e the largest error of a weight, layer by layer: |dz| <= |U| |dh| + e (|h|_1 + 1), |U| the
    chosen random weights, h the target's inputs that a neuron sees; |dh| <= Lip(phi) |dz|. Neurons
    of the added layer are off their lines by c |v x|^3.
    """
    modules, network = list(target), list(found.network)
    start = next(i for i, m in enumerate(modules) if isinstance(m, _LAYERS))
    h = nn.Sequential(*modules[:start])(x)
    off = _line(network[start + 1]).cubic * _magnitude(network[start])(h.abs()) ** 3
    neurons = iter(found.neurons)
    for module, twin in zip(modules[start:], network[start + 2 :], strict=True):
        if isinstance(module, _LAYERS):
            seen = _like(module, torch.ones_like(_dense(module)[:1]))(h.abs())
            off = _magnitude(twin)(off)
            off[:, next(neurons).flatten()] += found.report.max_error * (seen + 1)
        else:
            line = _line(module)
            off = twin(off) if line is None else line.lipschitz * off
        h = module(h)
    return off


def _magnitude(layer: nn.Module) -> nn.Module:
    return _like(layer, layer.weight.abs())
