"""``python -m bench.networks``: one training step of every network of the model list.

``dense``: forward, backward, SGD of the dense net, fused and as ``foreach``; speedups are over the
faster one. ``ours``: edge-popup with ``PopupSGD``, exact top-k of every layer included.
``hidden-networks``: the published way in plain torch, which sorts the scores of every layer in
every forward pass. ImageNet's networks are timed on 32x32 images with 1000 classes: a step of 128
images of 224x224 takes minutes on one core. At the end the rows are held against their bars.
``--part`` prints what one part of the step takes, and makes no rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import sparseticket as st
from bench import report
from bench.cases import _SortedMask
from bench.run import RESULTS, append, environment
from bench.timing import interleaved, keep_heap
from sparseticket.train.models import MODELS, build_model

__all__ = ["PARTS", "NetworkRow", "network_steps"]

PARTS = ("forward", "passes", "optimizer")  # passes: forward and backward

_SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
_IN_SHAPES = {"mlp": (1, 8, 8), "lenet300": (1, 28, 28), "fc300": (1, 28, 28)}
_IMAGENET = ("resnet18", "resnet50", "resnet101", "wide_resnet50")


@dataclass(frozen=True)
class NetworkRow:
    model: str
    batch: int
    density: float
    contender: str
    threads: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup: float  # over the faster dense step


def network_steps(
    name: str, batch: int, density: float, part: str = "step"
) -> dict[str, Callable[[], None]]:
    """Contenders by name, dense first: the whole step or one of ``PARTS``."""
    shape, classes = _IN_SHAPES.get(name, (3, 32, 32)), 1000 if name in _IMAGENET else 10
    torch.manual_seed(0)
    x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        model.train()

        def forward() -> torch.Tensor:
            return F.cross_entropy(model(x), y)

        def passes() -> None:
            optimizer.zero_grad()
            forward().backward()

        def whole() -> None:
            passes()
            optimizer.step()

        passes()  # or there are no gradients to step by
        every = {"step": whole, "forward": forward, "passes": passes, "optimizer": optimizer.step}
        return every[part]

    fused, foreach, ours, theirs = (
        build_model(name, in_shape=shape, num_classes=classes) for _ in range(4)
    )
    st.sparsify_(ours, st.EdgePopup(density=density))
    _hidden_(theirs, density)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    return {
        "dense": step(fused, torch.optim.SGD(fused.parameters(), fused=True, **_SGD)),
        "dense foreach": step(foreach, torch.optim.SGD(foreach.parameters(), foreach=True, **_SGD)),
        "ours": step(ours, st.PopupSGD(ours, **_SGD)),
        "hidden-networks": step(theirs, torch.optim.SGD(trained, fused=True, **_SGD)),
    }


class _Hidden(nn.Module):
    """A layer in the published way: scores beside frozen weights, a sort in every forward pass."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, density: float) -> None:
        super().__init__()
        self.layer, self.kept = layer.requires_grad_(False), int(density * layer.weight.numel())
        self.scores = nn.Parameter(torch.randn_like(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight * _SortedMask.apply(self.scores.abs(), self.kept)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight)
        return self.layer._conv_forward(x, weight, None)


def _hidden_(model: nn.Module, density: float) -> None:
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d):
                setattr(owner, name, _Hidden(child, density))
            elif isinstance(child, nn.BatchNorm2d):
                child.requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds a network, at least")
    parser.add_argument("--samples", type=int, default=5, help="of every contender, at least")
    parser.add_argument("--part", choices=["step", *PARTS], default="step")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_heap()
    env, rows = environment(), []
    for name in args.models:
        steps = network_steps(name, args.batch, args.density, args.part)
        timed = interleaved(steps, args.threads, args.budget, args.samples)
        dense = min(timed["dense"].p50, timed["dense foreach"].p50)
        for contender, q in timed.items():
            times = (round(1e3 * t, 3) for t in (q.p20, q.p50, q.p80))
            speedup = round(dense / q.p50, 3)
            where = (name, args.batch, args.density, contender, args.threads)
            rows.append(NetworkRow(*where, *times, speedup))
            print(
                f"{name:14} {contender:16} {rows[-1].p50_ms:10.2f} ms {speedup:6.2f}x", flush=True
            )
        if (
            args.part == "step" and not args.no_rows
        ):  # network by network, or a failure later would cost them all
            append(RESULTS / "networks.csv", rows[-len(timed) :], env)
    if args.part != "step":
        return 0
    times = report.newest(report.of_networks({**asdict(row), **env} for row in rows))
    print("\n".join(report.judge(times)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
