"""Layers under search whose weight is not simply W*mask: what it is, the search method says.

A search over masks of another kind (coats, signs, samples, only a part of the weights) differs from
edge-popup in two functions of a layer: the weight it computes with, and the function of the scores
that the gradient takes for it. Everything else is shared, here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops
from sparseticket.formats import words_shape
from sparseticket.masks import PackedMask, as_mask

from ._sparse import SparseModule, keep_dtype, refusal
from .conv1d import SparseConv1d
from .conv2d import SparseConv2d
from .conv_transpose2d import SparseConvTranspose2d
from .frozen import FrozenPattern
from .linear import SparseLinear
from .plain import plain_layer
from .recipe import WeightRecipe
from .superposed import Plane, Superposed

__all__ = [
    "ScoreConv1d",
    "ScoreConv2d",
    "ScoreConvTranspose2d",
    "ScoreLayer",
    "ScoreLinear",
    "WeightRule",
    "tickets_",
]


class WeightRule(Protocol):
    """What a search method says of one of its layers."""

    def value(self, layer: ScoreLayer) -> torch.Tensor:
        """The weight that the layer computes with, ``[O, ...]``; no gradient is taken."""

    def surrogate(self, layer: ScoreLayer) -> torch.Tensor:
        """A differentiable function of ``layer.scores``, in their shape. The gradient of the loss
        is G * W * d surrogate / d scores, G being that by the layer's weight (straight-through)."""

    def planes(self, layer: ScoreLayer) -> tuple[str, list[Plane]] | None:
        """How a ticket makes the weight from several masks, see Superposed; None: from its mask."""


class ScoreLayer(nn.Module):
    """Mixin before a torch layer: a frozen random weight, and scores that are trained.

    ``scores`` are float32, one for each weight, or, with a ``pattern``, a 1-D tensor of one for
    each free weight: a frozen one has no score, no gradient and no optimizer state.
    state_dict keys: ``weight``, ``bias``, ``scores``, ``mask_words``, what the method registers,
    and the recipe as extra state.
    """

    _BASE: ClassVar[type[nn.Module]]
    _SPARSE: ClassVar[type[SparseModule]]
    rule: WeightRule
    recipe: WeightRecipe
    weight_shape: tuple[int, ...]
    pattern: FrozenPattern | None

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        *,
        rule: WeightRule,
        recipe: WeightRecipe,
        scores: torch.Tensor,
        scale: str = "none",
    ) -> Self:
        """A layer like ``module``, on its device and in its dtype, with the weights of ``recipe``.

        ``scores`` have the weight's shape; the mask is empty until the method selects. A bias
        becomes zero and is frozen. ``scale`` divides the weights' deviation by sqrt of the mask's
        density (``dynamic``), by the density itself (``inverse``), or leaves it. TypeError for
        anything but a plain torch layer of this kind.
        """
        if reason := refusal(module, cls._BASE):
            raise TypeError(f"{cls.__name__}.from_dense: module: {reason}")
        weight = module.weight.detach()
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            vars(self).setdefault(name, value)
        self.training = module.training
        self.rule, self.recipe, self.pattern, self.scale = rule, recipe, None, scale
        self.weight_shape = tuple(weight.shape)
        drawn = recipe.weight(weight.shape, weight.dtype, weight.device)
        self.weight = nn.Parameter(drawn, requires_grad=False)
        bias = module.bias
        bias = None if bias is None else nn.Parameter(torch.zeros_like(bias), requires_grad=False)
        self.register_parameter("bias", bias)
        self.scores = nn.Parameter(scores.to(weight.device))
        words = torch.zeros(words_shape(weight.shape), dtype=torch.int32, device=weight.device)
        self.register_buffer("mask_words", words)
        return self

    def freeze(self, pattern: FrozenPattern) -> None:
        """From now on, search the pattern's free weights only; before the optimizer is made."""
        self.pattern = pattern
        self.scores = nn.Parameter(pattern.compact(self.scores.detach()))

    # Weights --------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x, self.effective_weight())

    def effective_weight(self) -> torch.Tensor:
        """The weight in use; its gradient reaches the scores."""
        with torch.no_grad():
            value = self.rule.value(self)
        if not (torch.is_grad_enabled() and self.scores.requires_grad):
            return value
        surrogate = self.rule.surrogate(self)
        nothing = surrogate - surrogate.detach()  # 0, but not to autograd
        weight = self.weight
        if self.pattern is None:
            return value + weight * nothing.to(weight.dtype)
        free = self.pattern.compact(weight)
        return value + self.pattern.spread(free * nothing.to(weight.dtype))

    def masked_weight(self) -> torch.Tensor:
        """W*mask: what most methods compute with."""
        return ops.apply_mask(self.weight, self.mask_words)

    @property
    def form(self) -> str:
        return "scored"

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def mask(self) -> PackedMask:
        """A copy of the mask: where the layer's weight is not zero."""
        return PackedMask(self.mask_words.clone(), self.weight_shape)

    @mask.setter
    def mask(self, value: PackedMask | torch.Tensor) -> None:
        mask = as_mask(value, self.weight_shape, f"{type(self).__name__}: mask")
        self.mask_words.copy_(mask.words)
        if self.scale in ("dynamic", "inverse"):
            # std / density is std / sqrt(density**2)
            power = 1 if self.scale == "dynamic" else 2
            self.recipe = self.recipe.scaled(mask.density**power)
            self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """The weights of the recipe."""
        self.weight.copy_(self.recipe.weight(self.weight_shape, self.dtype, self.weight.device))

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Scores stay float32, in which they are ranked."""
        ranked = (self.scores, self.scores.grad)
        return super()._apply(keep_dtype(fn, ranked), recurse)

    def get_extra_state(self) -> torch.Tensor:
        return self.recipe.to_tensor()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.recipe = WeightRecipe.from_tensor(state)

    def extra_repr(self) -> str:
        kept = f"{self.mask.kept}/{math.prod(self.weight_shape)}"
        return f"{super().extra_repr()}, rule={type(self.rule).__name__}, kept={kept}"

    # Conversion -----------------------------------------------------------------------------

    def to_ticket(self) -> nn.Module:
        """The layer from seed and masks alone: a SparseModule in ticket form, or a Superposed."""
        planes = self.rule.planes(self)
        if planes is not None:
            return Superposed.of(self._plain(), self.recipe, *planes)
        ticket = self._SPARSE.from_dense(
            self._plain(),
            form="ticket",
            mask=self.mask,
            seed=self.recipe.seed,
            layer=self.recipe.layer,
            weights=self.recipe.dist,
        )
        ticket.recipe = self.recipe
        ticket.frozen_pattern = self.pattern
        return ticket

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A plain torch layer with the weight in use and the bias, trainable."""
        dense = self._plain().requires_grad_()
        dense.weight.copy_(self.effective_weight())
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense

    def _plain(self) -> nn.Module:
        """The torch module of the same call, its weight uninitialised."""
        plain = plain_layer(self, self.bias is not None)
        plain = plain.to_empty(device=self.weight.device).to(self.dtype)
        if plain.bias is not None:
            nn.init.zeros_(plain.bias)
            plain.bias.requires_grad_(False)
        return plain.train(self.training)

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ScoreLinear(ScoreLayer, nn.Linear):
    """``nn.Linear`` under a search; see :class:`ScoreLayer`."""

    _BASE = nn.Linear
    _SPARSE = SparseLinear

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.bias)


class _ScoreConv(ScoreLayer):
    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias)


class ScoreConv1d(_ScoreConv, nn.Conv1d):
    """``nn.Conv1d`` under a search; see :class:`ScoreLayer`."""

    _BASE = nn.Conv1d
    _SPARSE = SparseConv1d


class ScoreConv2d(_ScoreConv, nn.Conv2d):
    """``nn.Conv2d`` under a search; see :class:`ScoreLayer`."""

    _BASE = nn.Conv2d
    _SPARSE = SparseConv2d


class ScoreConvTranspose2d(ScoreLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` under a search, without ``output_size``; see :class:`ScoreLayer`."""

    _BASE = nn.ConvTranspose2d
    _SPARSE = SparseConvTranspose2d

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        place = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, weight, self.bias, *place)


def tickets_(model: nn.Module) -> None:
    """Turn every ScoreLayer of ``model`` into its ticket, in place."""
    tickets: dict[ScoreLayer, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ScoreLayer):  # one layer may stand under several names
            if module not in tickets:
                tickets[module] = module.to_ticket()
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, tickets[module])
