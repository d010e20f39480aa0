"""Training steps of whole networks on a GPU, ours beside the same dense network: images a second.

The loss is computed on synthetic images in channels-last bf16 autocast; a step is forward,
backward, optimizer and, in a search, the selection of every layer's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import sparseticket as st
from bench.gpu_cases import GpuCase, SortedMask
from sparseticket.train.models import build_model

__all__ = ["networks"]

_SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


class _Density:
    """Every layer ``masked`` at one density, by magnitude."""

    def __init__(self, density: float) -> None:
        self.density = density

    def plan(self, name, module):
        return {"density": self.density, "form": "masked"}


class _Hidden(nn.Module):
    """A layer in the published way: scores beside frozen weights, a sort in every forward pass."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.kept = layer.requires_grad_(False), layer.weight.numel() // 2
        self.scores = nn.Parameter(torch.randn_like(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight * SortedMask.apply(self.scores.abs().contiguous(), self.kept)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight)
        return self.layer._conv_forward(x, weight, None)


def _hide(model: nn.Module) -> None:
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d):
                setattr(owner, name, _Hidden(child))


def networks(device, small: bool) -> Iterator[GpuCase]:
    name, shape, classes, batch = "resnet50", (3, 224, 224), 1000, 256
    if small:
        name, shape, classes, batch = "resnet20", (3, 8, 8), 10, 2
    dtype = torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(classes, (batch,), device=device)

    def model() -> nn.Module:
        made = build_model(name, in_shape=shape, num_classes=classes).train()
        return made.to(device, memory_format=torch.channels_last)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()

        return run

    def dense():
        net = model()
        return step(net, torch.optim.SGD(net.parameters(), fused=True, **_SGD))

    def popup():
        net = model()
        st.sparsify_(net, st.EdgePopup(density=0.5))
        return step(net, st.PopupSGD(net, **_SGD))

    def hidden():
        net = model()
        _hide(net)
        trained = [p for p in net.parameters() if p.requires_grad]
        return step(net, torch.optim.SGD(trained, fused=True, **_SGD))

    def masked():
        net = model()
        st.sparsify_(net, _Density(0.1))
        return step(net, st.MaskedSGD(net, shadow=dtype, **_SGD))

    title = f"{name} batch {batch}, a step"
    made = {"dense": dense(), "hidden-networks": hidden(), "ours": popup()}
    yield GpuCase(f"edge-popup {title}", made, 1, graph=False, bar=">= 0.95x")
    made = {"dense": made["dense"], "ours": masked()}
    yield GpuCase(f"masked keep .1 {title}", made, 1, graph=False, bar=">= 1.0x")
