"""Generators as plain torch modules, without biases: latents ``[N, latent]`` to pictures
``[N, C, H, W]`` in [-1, 1].

Module names are part of the contract: a seed regenerates a layer's weights by its qualified name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["GENERATORS", "build_generator"]

Shape = tuple[int, int, int]


def build_generator(name: str, *, in_shape: Shape, latent: int, width: int) -> nn.Module:
    """The generator ``name`` of ``GENERATORS`` for pictures of ``in_shape`` (C, H, W).

    Weights are Kaiming normal with fan-in for ReLU, drawn from torch's generator; batch norms are
    affine (gamma 1, beta 0).
    """
    if name not in GENERATORS:
        raise ValueError(f"generator: got {name!r}, known: {', '.join(GENERATORS)}")
    for key, value in (("latent", latent), ("width", width)):
        if value < 1:
            raise ValueError(f"{key}: got {value}, need at least 1")
    model = GENERATORS[name](in_shape, latent, width)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _mlp(in_shape: Shape, latent: int, width: int) -> nn.Module:
    """latent-width-width-pixels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = latent
    for i in (1, 2):
        layers[f"fc{i}"] = nn.Linear(inputs, width, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm1d(width)
        layers[f"relu{i}"] = nn.ReLU()
        inputs = width
    pixels = int(torch.Size(in_shape).numel())
    layers["fc3"] = nn.Linear(width, pixels, bias=False)
    layers["tanh"] = nn.Tanh()
    layers["unflatten"] = nn.Unflatten(1, in_shape)
    return nn.Sequential(layers)


def _conv(in_shape: Shape, latent: int, width: int) -> nn.Module:
    """A linear layer, two 4x4 transposed convolutions of stride 2, a 3x3 convolution (DCGAN's way
    up; Radford et al., ICLR 2016)."""
    channels, height, breadth = in_shape
    if height % 4 or breadth % 4:
        raise ValueError(f"generator: conv doubles twice, {height}x{breadth} is no multiple of 4")
    start = (width, height // 4, breadth // 4)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["fc"] = nn.Linear(latent, int(torch.Size(start).numel()), bias=False)
    layers["unflatten"] = nn.Unflatten(1, start)
    layers["norm0"] = nn.BatchNorm2d(width)
    layers["relu0"] = nn.ReLU()
    for i in (1, 2):
        out = max(width >> i, 1)
        inputs = max(width >> (i - 1), 1)
        layers[f"up{i}"] = nn.ConvTranspose2d(inputs, out, 4, stride=2, padding=1, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(out)
        layers[f"relu{i}"] = nn.ReLU()
    layers["conv"] = nn.Conv2d(out, channels, 3, padding=1, bias=False)
    layers["tanh"] = nn.Tanh()
    return nn.Sequential(layers)


GENERATORS: dict[str, Callable[[Shape, int, int], nn.Module]] = {"mlp": _mlp, "conv": _conv}
