"""Per-layer timing, for those who ask for it: the table's kernel or a dense product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ._sparse import SparseModule

__all__ = ["Tuned", "tune"]


@dataclass(frozen=True)
class Tuned:
    """What was measured of one layer, and the kernel that runs now, as :func:`explain` names it."""

    kernel: str
    table_ms: float
    dense_ms: float


@torch.no_grad()
def tune(model: nn.Module, *inputs: Any, samples: int = 9) -> dict[str, Tuned]:
    """Time every ``masked`` layer on its input in ``model(*inputs)``, and keep the faster kernel.

    The contenders are the kernel of the static table and torch's dense product on a stored
    ``W * mask``. Where the latter is faster by the median of ``samples`` interleaved runs, the
    layer keeps that tensor: as much memory as its weight, a derived buffer that is not saved. It
    is used until someone writes the weight or the mask (torch does not see writes through
    ``.data``), so this is for inference. ``to()``, copies and pickles drop it, and so does the next
    call here; without ``inputs`` it only drops.

    Timed choices differ from run to run, and so do the last bits of the output; without this call
    nothing is ever timed. Returns the layers by name. TypeError for a model that is no module;
    ValueError for one in training mode or without masked layers, and for layers that the input
    does not reach.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: model: got {type(model).__name__}, need an nn.Module")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"tune: samples: got {samples!r}, need an integer >= 1")
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, SparseModule) and m.form == "masked"
    }
    if not layers:
        raise ValueError("tune: model: it has no sparse module in form 'masked'")
    if inputs and any(m.training for m in model.modules()):
        raise ValueError("tune: model: got training mode, need model.eval()")
    for layer in layers.values():
        layer.drop_shadow()
    if not inputs:
        return {}
    seen = _inputs(model, layers, inputs)
    if missed := [name for name, m in layers.items() if m not in seen]:
        raise ValueError(f"tune: inputs: model(*inputs) never calls {', '.join(missed)}")
    return {name: _tuned(layer, seen[layer], samples) for name, layer in layers.items()}


def _inputs(model: nn.Module, layers: dict, inputs: tuple) -> dict[nn.Module, torch.Tensor]:
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(layer: nn.Module, args: tuple) -> None:
        seen.setdefault(layer, args[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _tuned(layer: SparseModule, x: torch.Tensor, samples: int) -> Tuned:
    call = layer._OPS["masked"]
    table = layer._arguments(x)
    layer.make_shadow(table[0].dtype)  # the dtype after autocast
    dense = layer._arguments(x)
    table_s, dense_s = _medians([lambda: call(*table), lambda: call(*dense)], x.device, samples)
    if table_s <= dense_s:
        layer.drop_shadow()
    return Tuned(layer.explain(x).kernel, 1e3 * table_s, 1e3 * dense_s)


def _medians(contenders: list[Callable[[], Any]], device: torch.device, samples: int):
    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for run in contenders:
        seconds(run)
    taken = [[seconds(run) for run in contenders] for _ in range(samples)]
    return [median(times) for times in zip(*taken, strict=True)]
