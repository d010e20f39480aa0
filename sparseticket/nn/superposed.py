"""Tickets of several masks: coats, tasks or draws over one random weight that is never stored."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops
from sparseticket.masks import PackedMask

from ._sparse import keep_dtype
from .plain import plain_layer
from .recipe import WeightRecipe

__all__ = [
    "KINDS",
    "Plane",
    "Superposed",
    "SuperposedConv1d",
    "SuperposedConv2d",
    "SuperposedConvTranspose2d",
    "SuperposedLinear",
]

KINDS = ("sum", "draws", "tasks")


@dataclass(frozen=True)
class Plane:
    """One mask of a superposition and what it is multiplied by."""

    mask: PackedMask
    coefficient: float = 1.0


class Superposed(nn.Module):
    """Mixin before a torch layer: a frozen weight made of a seed and several masks.

    ``sum``: W * sum of coefficient_i * mask_i, the masks nested (each within the one before);
    ``tasks``: the same of independent masks, one a task;
    ``draws``: where mask_i holds and mask_(i+1), within it, does not: the i-th draw of W.
    ``alpha`` (float32 ``[planes]``) holds the coefficients; it may be replaced, and differentiated.
    """

    _BASE: ClassVar[type[nn.Module]]
    recipe: WeightRecipe
    kind: str
    weight_shape: tuple[int, ...]

    @staticmethod
    def of(
        module: nn.Module, recipe: WeightRecipe, kind: str, planes: Sequence[Plane]
    ) -> Superposed:
        """The superposed layer like ``module``, whose weight it drops.

        ValueError for no planes, an unknown kind, or masks that are not nested though they must be.
        """
        kinds = (SuperposedLinear, SuperposedConv1d, SuperposedConv2d, SuperposedConvTranspose2d)
        cls = next(kind for kind in kinds if isinstance(module, kind._BASE))
        return cls._make(module, recipe, kind, list(planes))

    @classmethod
    def _make(cls, module, recipe, kind, planes) -> Self:
        if kind not in KINDS:
            raise ValueError(f"Superposed: kind: got {kind!r}, accepted: {', '.join(KINDS)}")
        if not planes:
            raise ValueError("Superposed: planes: got none, need at least one mask")
        masks = [plane.mask for plane in planes]
        for outer, inner in itertools.pairwise(masks):
            if kind != "tasks" and outer & inner != inner:
                raise ValueError(f"Superposed: planes: masks of kind {kind!r} must be nested")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            vars(self).setdefault(name, value)
        self.training = module.training
        self.recipe, self.kind, self.weight_shape = recipe, kind, tuple(module.weight.shape)
        device, dtype = module.weight.device, module.weight.dtype
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_parameter("bias", module.bias)
        self.register_buffer("plane_words", torch.stack([m.words.to(device) for m in masks]))
        coefficients = [plane.coefficient for plane in planes]
        self.register_buffer("alpha", torch.tensor(coefficients, device=device))
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def masks(self) -> list[PackedMask]:
        """Copies of the masks."""
        return [PackedMask(words.clone(), self.weight_shape) for words in self.plane_words]

    @property
    def mask(self) -> PackedMask:
        """Where any mask holds."""
        return functools.reduce(operator.or_, self.masks)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, made anew at every access."""
        return self._drawn() if self.kind == "draws" else self._summed()

    def _drawn(self) -> torch.Tensor:
        masks = self.masks
        none = PackedMask(torch.zeros_like(masks[0].words), self.weight_shape)
        total = 0
        for draw, (mask, inner) in enumerate(zip(masks, [*masks[1:], none], strict=True)):
            total = total + self._regenerate(draw, (mask ^ inner).words)
        return total

    def _summed(self) -> torch.Tensor:
        bits = torch.stack([m.to_dense() for m in self.masks]).to(self.alpha.dtype)
        factor = torch.tensordot(self.alpha, bits, dims=1)
        return self._regenerate(0, None) * factor.to(self.dtype)

    def _regenerate(self, draw: int, words: torch.Tensor | None) -> torch.Tensor:
        recipe, device = self.recipe.arguments(self.weight_shape), self._like.device
        return ops.regenerate(*recipe, draw=draw, dtype=self.dtype, device=device, words=words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x, self.weight)

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A plain torch layer with the present weight and the bias, trainable."""
        dense = plain_layer(self, bias=False)
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone())
        return dense.train(self.training)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(fn, (self.alpha,)), recurse)

    def get_extra_state(self) -> torch.Tensor:
        return self.recipe.to_tensor()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.recipe = WeightRecipe.from_tensor(state)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}, planes={len(self.plane_words)}"


class SuperposedLinear(Superposed, nn.Linear):
    """``nn.Linear`` of several masks; see :class:`Superposed`."""

    _BASE = nn.Linear

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.bias)


class SuperposedConv1d(Superposed, nn.Conv1d):
    """``nn.Conv1d`` of several masks; see :class:`Superposed`."""

    _BASE = nn.Conv1d

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias)


class SuperposedConv2d(Superposed, nn.Conv2d):
    """``nn.Conv2d`` of several masks; see :class:`Superposed`."""

    _BASE = nn.Conv2d

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias)


class SuperposedConvTranspose2d(Superposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` of several masks; see :class:`Superposed`."""

    _BASE = nn.ConvTranspose2d

    def _call(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        place = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, weight, self.bias, *place)
