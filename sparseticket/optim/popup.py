"""Optimizers of scored modules: update, straight-through sign and exact selection in one op.

``PopupSGD`` does what ``torch.optim.SGD`` with ``st.attach`` does, ``PopupAdamW`` what
``torch.optim.AdamW`` does: the same scores within float rounding, and exactly the masks of the
scores they made, in one pass over them.

Where a float32 module has signed-constant weights, the backward pass hands over the dense gradient
G of W*mask as it is, and the step multiplies by W*sign(s) from one kept sign bit a weight. For the
life of the optimizer, ``scores.grad`` of such a module is that raw gradient: clipping and hooks see
it without the factor. Make the optimizer before ``backward()``, and only one for a model.

Memory: SGD one float a score with momentum, none without; AdamW two; and the sign bits.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparseticket import ops
from sparseticket.nn import Selection, SparseModule, reselect, selections

from ._rules import AdamWRule, SGDRule, groups_of, modules_of, roots_of

__all__ = ["PopupAdamW", "PopupSGD"]


class _Popup(Optimizer):
    """``param_groups[0]`` holds the scores, ``[1]`` the model's other trainable parameters.

    ``state_dict()`` holds everything that a bit-exact resume needs, under torch's own names.
    """

    def __init__(self, model: nn.Module | Iterable[nn.Module], defaults: dict[str, Any]) -> None:
        roots = roots_of(self, model)
        modules = [m for m in modules_of(roots) if isinstance(m, SparseModule)]
        self._modules = [m for m in modules if m.form == "scored"]
        if not self._modules:
            raise ValueError(
                f"{type(self).__name__}: model: no module is in form 'scored'; convert it first, "
                "with st.sparsify_(model, st.EdgePopup(...)) or form='scored'"
            )
        super().__init__(groups_of(roots, [m.scores for m in self._modules]), defaults)
        self._signs: dict[int, tuple[tuple, torch.Tensor]] = {}
        self._hints: dict[tuple, torch.Tensor] = {}
        self._bound: dict[tuple, tuple[list, Callable[..., None]]] = {}  # steps by modules
        self._grouped: tuple[list, list[Selection]] = [], []
        self._raw = [m for m in self._modules if _takes_signs(m)]
        token = object()
        for m in self._raw:
            m._raw_grad_for = token
        weakref.finalize(self, _ask_plain, self._raw, token)

    def _step_ours(self, scores: dict[str, Any]) -> None:
        """After it all masks are those of the scores. ValueError for NaN scores, on CPU: they have
        been updated, and a forward pass raises."""
        before, self._bound = self._bound, {}  # one that is not used holds memory for nothing
        for selection in self._selections():
            self._select_step(scores, selection, before)

    def _selections(self) -> list[Selection]:
        """Grouped anew where options or devices have changed."""
        key = [(m.options, m._held("scores").device) for m in self._modules]
        if key != self._grouped[0]:
            self._grouped = key, selections(self._modules)
        return self._grouped[1]

    def _select_step(self, group: dict[str, Any], selection: Selection, bound: dict) -> None:
        """Scores without a gradient stay as they are, as in torch, but take part in selection."""
        parts = defaultdict(list)  # by the number of steps they have made
        for i, m in enumerate(selection.modules):
            held = m._held("scores")
            if held.grad is not None:
                parts[self._prepare(group, held)].append(i)
        whole = len(parts) == 1 and len(*parts.values()) == len(selection.modules)
        layerwise = selection.scope == "layer"
        for step, chosen in parts.items():
            modules = [selection.modules[i] for i in chosen]
            if whole:
                kept, scope = selection.kept, selection.scope
            else:  # each by itself; where that is not the selection it follows below
                kept = [selection.kept[i] if layerwise else 0 for i in chosen]
                scope = "layer"
            self._popup_step(group, selection, modules, kept, scope, step, bound)
        if parts and not whole and not layerwise:
            reselect(selection.modules)

    def _popup_step(self, group, selection, modules, kept, scope, step, bound) -> None:
        scores = [m._held("scores") for m in modules]
        grads = [s.grad for s in scores]
        key = (scope, *map(id, modules))
        others = [
            *self._moments(group, scores),
            [m._buffers["mask_words"] for m in modules],
            self._hint(key, scores[0].device),
            kept,
            [self._sign_words(m) for m in modules],
        ]
        options = {
            "scope": scope,
            "transform": selection.transform,
            "min_keep": selection.min_keep if scope == "global" else 0,
        }
        sigmas, settings = [m.recipe.sigma for m in modules], self._settings(group, step)
        if ops.on_plain_cpu(scores) and ops.on_plain_cpu(grads):
            source = [_place(scores), *map(_place, others), options]
            if bound.get(key, (None,))[0] != source:  # moved, loaded, or asked for otherwise
                bound[key] = source, ops.bind_step(scores, *others, **options)
            self._bound[key] = bound[key]
            self._bound[key][1](grads, sigmas, **settings)
        else:
            ops.popup_step(scores, grads, *others, sigmas, **settings, **options)
        for m in modules:
            m._selection_taken()

    def _hint(self, key: tuple, device: torch.device) -> torch.Tensor:
        """Last thresholds: they make the next step fast and change nothing, so no state_dict holds
        them."""
        scope, *modules = key
        if key not in self._hints or self._hints[key].device != device:
            rows = 1 if scope == "global" else len(modules)
            self._hints[key] = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        return self._hints[key]

    def _sign_words(self, module: SparseModule) -> torch.Tensor | None:
        """Remade when another seed was loaded into the module."""
        if not module._gives_raw_grad():
            return None
        recipe, device = module.recipe, module._held("scores").device
        source = recipe.seed, recipe.layer, device
        if self._signs.get(id(module), (None,))[0] != source:
            seed, layer, *_ = recipe.arguments()
            words = ops.sign_words(seed, layer, module.weight_shape, device=device)
            self._signs[id(module)] = (source, words)
        return self._signs[id(module)][1]


def _place(given: Any) -> Any:
    """Of tensors, what tells whether they are where they were; numbers as they are."""
    if isinstance(given, list):
        return [_place(one) for one in given]
    if isinstance(given, torch.Tensor):
        return id(given), given.data_ptr(), given.shape, given.stride()
    return given


def _takes_signs(module: SparseModule) -> bool:
    return module.recipe.dist == "signed_constant" and module.dtype == torch.float32


def _ask_plain(modules: list[SparseModule], token: object) -> None:
    for m in modules:
        if m._raw_grad_for is token:
            m._raw_grad_for = None


class PopupSGD(SGDRule, _Popup):
    """``torch.optim.SGD`` (dampening 0) and the masks of its scores, for a model or some modules.

    ``param_groups[1]``, if the model trains anything but scores, is stepped by torch's own SGD.
    Learning-rate schedulers, closures and hooks work as for any optimizer. TypeError or ValueError
    unless ``model`` holds scored modules and the numbers are >= 0.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(model, self._defaults(lr, momentum, weight_decay, nesterov))


class PopupAdamW(AdamWRule, _Popup):
    """``torch.optim.AdamW`` and the masks of its scores, for a model or some modules.

    Otherwise as :class:`PopupSGD`.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(model, self._defaults(lr, betas, eps, weight_decay))
