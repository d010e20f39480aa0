"""torch's SGD and AdamW as our optimizers share them: settings, state, and the plain step for
parameters that no op of ours updates. Mixed in before what decides which tensors are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

__all__ = ["AdamWRule", "SGDRule", "groups_of", "modules_of", "roots_of"]


def roots_of(optimizer: Optimizer, model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """The model or modules that an optimizer was given; TypeError for anything else."""
    roots = [model] if isinstance(model, nn.Module) else list(model)
    if wrong := [r for r in roots if not isinstance(r, nn.Module)]:
        name = type(optimizer).__name__
        raise TypeError(f"{name}: model: got a {type(wrong[0]).__name__}, need modules")
    return roots


def modules_of(roots: list[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(m for root in roots for m in root.modules()))


def groups_of(roots: list[nn.Module], ours: list[nn.Parameter]) -> list[dict[str, Any]]:
    """``ours`` as the first group; the second, if there are any, what else is trained."""
    held = {id(p) for p in ours}
    trained = dict.fromkeys(p for r in roots for p in r.parameters() if p.requires_grad)
    others = [p for p in trained if id(p) not in held]
    return [{"params": ours}, *([{"params": others}] if others else [])]


class _Rule(Optimizer):
    _MOMENTS: ClassVar[tuple[str, ...]]  # state of every tensor, in the order of the ops
    _step_ours: Callable[[dict[str, Any]], None]  # updates the first group: of the other base

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours, *others = self.param_groups
        for group in others:
            if params := [p for p in group["params"] if p.grad is not None]:
                self._plain_step(group, params)
        self._step_ours(ours)
        return loss

    def _prepare(self, group: dict[str, Any], tensor: torch.Tensor) -> int:
        """Count a step of this tensor and make its state if it has none; returns the count."""
        state = self.state[tensor]
        for name in self._MOMENTS:
            if name not in state and self._keeps(group, name):
                state[name] = torch.zeros_like(tensor)
        return self._count(state)

    def _moments(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> list[list]:
        """First and second moments as the ops take them, empty where there are none."""
        lists = [
            [self.state[t][name] for t in tensors] if self._keeps(group, name) else []
            for name in self._MOMENTS
        ]
        return [*lists, *[[] for _ in range(2 - len(lists))]]

    def _keeps(self, group: dict[str, Any], moment: str) -> bool:
        return True

    def _count(self, state: dict[str, Any]) -> int:
        raise NotImplementedError

    def _settings(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        raise NotImplementedError

    def _plain_step(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        raise NotImplementedError


class SGDRule(_Rule):
    _MOMENTS = ("momentum_buffer",)

    def _defaults(
        self, lr: float, momentum: float, weight_decay: float, nesterov: bool
    ) -> dict[str, Any]:
        name = type(self).__name__
        _check_numbers(name, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and not momentum:
            raise ValueError(f"{name}: nesterov: got True with momentum 0, need momentum > 0")
        settings = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        return {"lr": lr, **settings}

    def _keeps(self, group: dict[str, Any], moment: str) -> bool:
        return group["momentum"] != 0

    def _count(self, state: dict[str, Any]) -> int:
        return 1  # its formula is the same at every step

    def _settings(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        return {
            "lr": float(group["lr"]),
            "beta1": group["momentum"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
        }

    def _plain_step(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        settings = {k: group[k] for k in ("lr", "momentum", "weight_decay", "nesterov")}
        grads = [p.grad for p in params]
        sgd(params, grads, buffers, **settings, dampening=0.0, maximize=False)
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


class AdamWRule(_Rule):
    _MOMENTS = ("exp_avg", "exp_avg_sq")

    def _defaults(
        self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> dict[str, Any]:
        name = type(self).__name__
        _check_numbers(name, lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{name}: betas: got {betas}, need two numbers in [0, 1)")
        return {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}

    def _count(self, state: dict[str, Any]) -> int:
        state.setdefault("step", torch.tensor(0.0)).add_(1)
        return int(state["step"])

    def _settings(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        names = ("eps", "weight_decay")
        settings = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "step": step}
        return settings | {name: group[name] for name in names}

    def _plain_step(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            state.setdefault("step", torch.tensor(0.0))
            for name in self._MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(p)
        lists = [[self.state[p][name] for p in params] for name in self._MOMENTS]
        steps = [self.state[p]["step"] for p in params]
        adam(
            params,
            [p.grad for p in params],
            *lists,
            [],
            steps,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_numbers(name: str, **numbers: float) -> None:
    for key, value in numbers.items():
        if not value >= 0:  # also for NaN
            raise ValueError(f"{name}: {key}: got {value}, need a number >= 0")
