"""Optimizers of masked modules: the live weights are stepped, dead ones have no gradient, no decay
and no state, all in one pass over memory and on CUDA in one launch.

``MaskedSGD`` does what ``torch.optim.SGD`` does on the live weights, ``MaskedAdamW`` what
``torch.optim.AdamW`` does; a dead weight keeps its value. Weights that a new mask brings to life
start with a state of zero.

``shadow``: a low-precision dtype. Each module then has ``weight * mask`` in it as a buffer, which
the step writes and forward passes under autocast to that dtype read instead of masking and casting
the weight. Anything else that writes weight or mask switches it off until the next step; writes
that torch does not count (other optimizers with ``fused=True``, ``.data``) go unseen.

``raw_grad=True``: ``weight.grad`` of these modules is the dense gradient, live or dead, for the
life of the optimizer; that saves a pass, and RigL reads it. Clip norms with care then.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparseticket import ops
from sparseticket.nn import SparseModule

from ._rules import AdamWRule, SGDRule, groups_of, modules_of, roots_of

__all__ = ["MaskedAdamW", "MaskedSGD"]


class _Masked(Optimizer):
    """``param_groups[0]`` holds the masked weights, ``[1]`` the model's other trainable parameters.

    ``state_dict()`` holds everything that a bit-exact resume needs, under torch's own names.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        defaults: dict[str, Any],
        shadow: torch.dtype | None,
        raw_grad: bool,
    ) -> None:
        name, roots = type(self).__name__, roots_of(self, model)
        if shadow not in (None, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: shadow: got {shadow}, accepted: None, bfloat16, float16")
        masked = [
            m for m in modules_of(roots) if isinstance(m, SparseModule) and m.form == "masked"
        ]
        self._modules = [m for m in masked if m.weight.requires_grad]
        if not self._modules:
            raise ValueError(f"{name}: model: no module is in form 'masked' and trains its weight")
        if wrong := [m for m in self._modules if m.weight.dtype != torch.float32]:
            raise TypeError(
                f"{name}: model: a masked module has {wrong[0].weight.dtype} weights, need float32 "
                "(autocast computes in less)"
            )
        super().__init__(groups_of(roots, [m.weight for m in self._modules]), defaults)
        self._shadow, self._token = shadow, object()
        for m in self._modules if raw_grad else ():
            m._raw_grad_for = self._token
        weakref.finalize(self, _release, self._modules, self._token)

    def _step_ours(self, masked: dict[str, Any]) -> None:
        parts = defaultdict(list)  # by device and the number of steps they have made
        for m in self._modules:
            if m.weight.grad is not None:
                parts[m.weight.device, self._prepare(masked, m.weight)].append(m)
        for (_, step), modules in parts.items():
            self._masked_step(masked, modules, step)

    def _masked_step(self, group: dict[str, Any], modules: list[SparseModule], step: int) -> None:
        weights = [m.weight for m in modules]
        ops.masked_step(
            weights,
            [w.grad for w in weights],
            *self._moments(group, weights),
            [] if self._shadow is None else [m.shadow_buffer(self._shadow) for m in modules],
            [m.mask_words for m in modules],
            **self._settings(group, step),
        )
        for m in modules if self._shadow is not None else ():
            m.shadow_written(self._token)


def _release(modules: list[SparseModule], token: object) -> None:
    """The end of an optimizer: nobody writes its shadows any more."""
    for m in modules:
        if m._shadow_owner is token:
            m.drop_shadow()
        if m._raw_grad_for is token:
            m._raw_grad_for = None


class MaskedSGD(SGDRule, _Masked):
    """``torch.optim.SGD`` (dampening 0) on the live weights, for a model or some modules.

    ``param_groups[1]``, if the model trains anything else, is stepped by torch's own SGD.
    TypeError or ValueError unless ``model`` holds masked float32 modules and the numbers are >= 0.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        shadow: torch.dtype | None = None,
        raw_grad: bool = False,
    ) -> None:
        settings = self._defaults(lr, momentum, weight_decay, nesterov)
        super().__init__(model, settings, shadow, raw_grad)


class MaskedAdamW(AdamWRule, _Masked):
    """``torch.optim.AdamW`` on the live weights, for a model or some modules.

    Otherwise as :class:`MaskedSGD`.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        shadow: torch.dtype | None = None,
        raw_grad: bool = False,
    ) -> None:
        settings = self._defaults(lr, betas, eps, weight_decay)
        super().__init__(model, settings, shadow, raw_grad)
