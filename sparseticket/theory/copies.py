"""Random links that add up to a target's weights: each of its neurons in several copies, of which
the subset sums of the next layer choose; random neurons that cannot be met are passed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import dense_weight, of_constant, tap_inside
from .pairs import bits, drawn, uniform
from .solver import subset_sum

__all__ = ["MOST", "Draws", "Goal", "Parents", "Part", "choose", "goal_of"]

MOST = 64  # numbers that a subset sum can choose from
_AT_ONCE = 1 << 23  # numbers of the subset sums that are solved in one call
_COARSE = 1.0  # what a set of constants may leave to the next one
_HOPELESS = 100  # rows, none of which serves, after which no more are tried


@dataclass(frozen=True)
class Draws:
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
class Parents:
    """Neurons of a source layer, as the next one sees them.

    ``groups`` [G, m]: which stand for an input of the target's layer (or one sign of it);
    ``signs``: groups for an input; ``constants``: which have the same value everywhere, in sets of
    which each makes up for what the one before leaves. Of every neuron: ``carried``, that value, or
    its slope in the input; ``offset``: what else it is where the input is 0; ``limit``: of the next
    layer's weights to it.
    """

    groups: Tensor
    signs: int
    constants: tuple[Tensor, ...]
    carried: Tensor
    offset: Tensor
    limit: Tensor

    def through(self, taps: int, tap: int) -> Parents:
        """The same of the columns of a weight that sees each neuron in ``taps`` places, constants
        in one of them only."""
        groups = self.groups[:, None] * taps + torch.arange(taps)[:, None]
        each = (t.repeat_interleave(taps) for t in (self.carried, self.offset, self.limit))
        constants = tuple(some * taps + tap for some in self.constants)
        return Parents(groups.flatten(0, 1), self.signs, constants, *each)


@dataclass(frozen=True)
class Goal:
    """What every child needs: ``weight`` [children, columns] of every group of parents and tap,
    ``bias`` [children] of the constants. ``copies`` of every neuron in turn, then ``constants``
    children that are constants themselves."""

    weight: Tensor
    bias: Tensor
    copies: int
    constants: int


def goal_of(layer, parents, copies, constants, after) -> Goal:
    dense = dense_weight(layer).double()
    channels = len(parents.groups) // parents.signs
    if dense[0].numel() % channels:
        raise ValueError(f"target: got {layer} behind {channels} outputs")
    each = dense.reshape(len(dense), channels, 1, -1).expand(-1, -1, parents.signs, -1).flatten(1)
    bias = each.new_zeros(len(each)) if layer.bias is None else layer.bias.double()
    # a neuron without links is a constant already, where the activation is not 0 at 0
    level = float(of_constant(after, each.new_zeros(())) == 0)
    return Goal(
        torch.cat([each.repeat_interleave(copies, 0), each.new_zeros(constants, each.shape[1])]),
        torch.cat([bias.repeat_interleave(copies), bias.new_full((constants,), level)]),
        copies,
        constants,
    )


@dataclass(frozen=True)
class Part:
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

    def parents(self, after: Sequence[nn.Module]) -> Parents:
        """Of the next layer, ``after`` between the two."""
        carried = self.values.new_ones(len(self.rows))
        carried[self.constants] = of_constant(after, self.values)
        constants = self.constants[carried[self.constants] != 0]
        ones = torch.ones_like(carried)
        return Parents(
            self.neurons, 1, (constants,) if len(constants) else (), carried, 0 * ones, ones
        )


class _Rows:
    """Random weights and links of a layer, as many rows as were asked for."""

    def __init__(self, draws: Draws, name: str, shape: Sequence[int], limit: Tensor) -> None:
        self.draws, self.name, self.shape = draws, name, shape
        self.limit = limit.to(draws.like.dtype)
        self.weight, self.links = self.limit.new_empty(0, len(limit)), None

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        if rows.stop > len(self.weight):  # some more: the generator begins at row 0 every time
            shape = (max(rows.stop, len(self.weight) * 3 // 2), *self.shape)
            self.weight = self.draws.weight(self.name, shape).flatten(1) * self.limit
            self.links = self.draws.links(self.name, shape)
        return self.weight[rows], None if self.links is None else self.links[rows]


def choose(goal: Goal, parents: Parents, layer, number: int, last: bool, draws: Draws) -> Part:
    """Source layer ``number``, which stands for ``layer``: a row of the generator for every child,
    a later one where it fails."""
    taps = goal.weight.shape[1] // len(parents.groups)
    count = len(parents.carried)
    shape = (count, *layer.kernel_size) if isinstance(layer, nn.Conv2d) else (count * taps,)
    inside = tap_inside(layer) if number > 1 and parents.constants else 0
    parents = parents.through(taps, inside)
    drawn_ = _Rows(draws, f"lplus1.{number}", shape, parents.limit)
    rows = torch.zeros(len(goal.bias), dtype=torch.int64)
    error = goal.weight.new_zeros(len(rows), len(parents.groups) + 1)
    masks, open_, taken = [], torch.arange(len(rows)), 0
    for attempt in range(draws.redraws + 1):
        fresh = torch.arange(taken, taken + len(open_))
        weight, links = drawn_(slice(taken, taken + len(open_)))
        taken += len(open_)
        chosen, off = _solve(weight, links, goal.weight[open_], goal.bias[open_], parents, draws)
        failed = (off > draws.eps).any(1)
        hopeless = taken >= _HOPELESS and int(failed.sum()) == len(rows)
        if attempt == draws.redraws or hopeless:
            failed[:] = False  # these have to do
        rows[open_[~failed]], error[open_[~failed]] = fresh[~failed], off[~failed]
        masks.append(chosen & ~failed[:, None])
        open_ = open_[failed]
        if not len(open_):
            break
    held = rows if last else torch.arange(taken)
    place = torch.arange(len(rows)) if last else rows
    neurons, constants = place.split([len(rows) - goal.constants, goal.constants])
    (weight, links), chosen = drawn_(slice(0, taken)), torch.cat(masks)
    values = (weight[held[constants]].double() * chosen[held[constants]]) @ parents.carried
    return Part(
        weight[held].view(-1, *shape),
        None if links is None else links[held].view(-1, *shape),
        chosen[held].view(-1, *shape),
        held,
        neurons.view(-1, goal.copies),
        constants,
        values,
        error,
        taken - len(rows),
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
        mask, off = _subsets(values, there, goal[some], parents.groups, draws.eps, draws)
        rest = (bias[some] - (exact * mask) @ parents.offset)[:, None]
        off_bias = rest.abs()
        for number, constants in enumerate(parents.constants, 1):
            eps = _COARSE if number < len(parents.constants) else draws.eps
            more, off_bias = _subsets(values, there, rest, constants[None], eps, draws)
            rest = rest - (values * more).sum(1, keepdim=True)
            mask |= more
        chosen.append(mask)
        error.append(torch.cat([off, off_bias], 1))
    return torch.cat(chosen), torch.cat(error)


def _subsets(values, links, goal, groups, eps, draws) -> tuple[Tensor, Tensor]:
    """Chosen links [children, columns], and errors of ``goal`` [children, groups], each a sum over
    the columns in ``groups`` [groups, m], of links that there are the first 64."""
    members, lengths = groups.expand(len(values), *groups.shape), None
    if links is not None:
        there = links[:, groups]
        order = there.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        members, lengths = members.gather(-1, order), there.sum(-1).clamp(max=MOST)
    members = members[..., :MOST]
    base = values[:, None].expand(-1, len(groups), -1).gather(-1, members)
    found = subset_sum(base, goal, eps, lengths=lengths, **draws.solver)
    taken = bits(found.mask, base.shape[-1]).to(torch.uint8)
    chosen = torch.zeros(values.shape, dtype=torch.uint8)
    chosen.scatter_add_(1, members.flatten(1), taken.flatten(1))
    return chosen.bool(), found.error
