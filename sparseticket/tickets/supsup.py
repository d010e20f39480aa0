"""Supermasks in superposition: Wortsman, Ramanujan, Liu, Kembhavi, Rastegari, Yosinski, Farhadi,
NeurIPS 2020, sections 3.2 to 3.4.

One random net, one mask for each task. A task's mask is where its scores are >= 0, learned straight
through, G * W. ``superpose`` puts many tasks' tickets over one seed; ``infer_task`` finds out which
task an input belongs to: mix the masks by alpha = 1/k, and take the task whose alpha lowers the
entropy of the output most (one shot), or halve the candidates log2 k times (binary).

Deviations from the reference code (RAIVNLab/supsup):

- masks are exact and packed; with ``rule="topk"`` (MaskConv) each layer keeps the part
  min(1/2, factor * (out + in) / weights) of its weights with the largest |score|;
- ``task`` numbers the draws of the first scores, so that every task starts from its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseticket.formats import kept_count
from sparseticket.masks import PackedMask
from sparseticket.nn import Plane, ScoreLayer, SparseModule, Superposed

from .engine import (
    Strong,
    check_choice,
    check_integer,
    check_number,
    draw_scores,
    fan_in,
    select,
    setting,
)

__all__ = ["SupSup", "infer_task", "set_task", "superpose"]


@dataclass(frozen=True)
class SupSup(Strong):
    """Config of one task of SupSup, for ``sparsify_`` and ``search``."""

    name: ClassVar[str] = "supsup"
    recipe: ClassVar[dict[str, Any]] = {"optimizer": "rmsprop", "lr": 1e-3, "weight_decay": 0.0}

    scale: Literal["none", "dynamic"] = setting(
        "none", "divide the weights' deviation by sqrt of each layer's density"
    )
    rule: Literal["threshold", "topk"] = setting(
        "threshold", "keep scores >= 0, or the best of a density that falls with the layer's size"
    )
    factor: float = setting(4.0, "of the density with rule topk; 4, 8 and 16 in the paper")
    task: int = setting(0, "number of the task; every task has its own first scores")
    tasks: int = setting(
        1, "search so many tasks, the data set with its pixels permuted, into one ticket"
    )
    inference: Literal["one-shot", "binary"] = setting(
        "one-shot", "how the report's inferred accuracies find the task of a batch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ("none", "dynamic"))
        check_choice("rule", self.rule, ("threshold", "topk"))
        check_number("factor", self.factor, 0)
        check_integer("task", self.task, 0)
        check_integer("tasks", self.tasks, 1)
        check_choice("inference", self.inference, ("one-shot", "binary"))

    def score_start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        sigma = math.sqrt(1 / 3 / fan_in(shape))
        return draw_scores(self.seed, name, shape, "uniform", sigma, draw=self.task)

    def surrogate(self, layer: ScoreLayer) -> Tensor:
        return layer.scores if self.rule == "threshold" else layer.scores.abs()

    @torch.no_grad()
    def update(self, layers: list[ScoreLayer], step: int) -> None:
        if self.rule == "threshold":
            for layer in layers:
                layer.mask = PackedMask.from_dense(layer.scores >= 0)
            return
        kept = [self._kept(layer.weight_shape) for layer in layers]
        masks = select([layer.scores for layer in layers], kept)
        for layer, mask in zip(layers, masks, strict=True):
            layer.mask = mask

    def _kept(self, shape: tuple[int, ...]) -> int:
        n = math.prod(shape)
        density = min(0.5, self.factor * (shape[0] + shape[1]) / n) if n else 0.5
        return kept_count(density, n)


def superpose(models: Sequence[nn.Module]) -> nn.Module:
    """The first of equal models in ticket form, in place, with the masks of all of them: one task
    each. It starts with task 0; :func:`set_task` changes it.

    ValueError unless their layers are tickets over the same seed and recipe.
    """
    first, *others = models
    for name, module in list(first.named_modules()):
        if not isinstance(module, SparseModule):
            continue
        twins = [module, *(other.get_submodule(name) for other in others)]
        if any(twin.form != "ticket" or twin.recipe != module.recipe for twin in twins):
            raise ValueError(f"superpose: models: {name} is not a ticket of one recipe in all")
        planes = [Plane(twin.mask) for twin in twins]
        plain = module.to_dense()
        owner, _, child = name.rpartition(".")
        new = Superposed.of(plain, module.recipe, "tasks", planes)
        setattr(first.get_submodule(owner), child, new.requires_grad_(False))
    set_task(first, 0)
    return first


def set_task(model: nn.Module, task: int | Tensor) -> None:
    """Compute with the mask of ``task``, or with the mixture that a tensor of weights gives."""
    for layer in _superposed(model):
        count = len(layer.plane_words)
        if isinstance(task, Tensor):
            layer.alpha = task
        elif 0 <= task < count:
            layer.alpha = torch.eye(count, device=layer.plane_words.device)[task]
        else:
            raise ValueError(f"set_task: task: got {task}, need 0 to {count - 1}")


def infer_task(
    model: nn.Module, x: Tensor, method: Literal["one-shot", "binary"] = "one-shot"
) -> int:
    """The task that the batch ``x`` comes from; the model then computes with it.

    ``one-shot``: one forward and backward pass; ``binary``: log2 of the number of tasks.
    """
    check_choice("method", method, ("one-shot", "binary"))
    count = len(_superposed(model)[0].plane_words)
    alive = torch.ones(count, dtype=torch.bool)
    while True:
        gain = -_entropy_gradient(model, x, alive)
        gain[~alive] = -math.inf
        if method == "one-shot" or int(alive.sum()) <= 2:
            task = int(gain.argmax())
            set_task(model, task)
            return task
        worst = gain.argsort(descending=True, stable=True)[(int(alive.sum()) + 1) // 2 :]
        alive[worst] = False


def _entropy_gradient(model: nn.Module, x: Tensor, alive: Tensor) -> Tensor:
    """d entropy of the output / d alpha, at alpha = 1/k for the ``alive`` tasks."""
    alpha = (alive.float() / alive.sum()).to(x.device).requires_grad_()
    with torch.enable_grad():
        set_task(model, alpha)
        log_p = model(x).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return torch.autograd.grad(entropy, alpha)[0].cpu()


def _superposed(model: nn.Module) -> list[Superposed]:
    layers = [m for m in model.modules() if isinstance(m, Superposed) and m.kind == "tasks"]
    if not layers:
        raise ValueError("model: has no layers of several tasks; make one with superpose")
    return layers
