"""Frozen networks whose ReLU outputs a generator learns to match."""

from __future__ import annotations

import importlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..prng import kaiming_std, layer_id

__all__ = ["EXTRACTORS", "Extractor", "build_extractor", "flat", "pooled"]

Shape = tuple[int, int, int]
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LENET_FILE = "pretrained/mnist_lenet_991.pth"
_VGG_FILE = "vgg19_bn-c79401a0.pth"  # torchvision's name of it, also in torch.hub's cache


class Extractor(nn.Module):
    """A frozen ``nn.Sequential`` that shows the output of each of its ReLUs.

    Images ``[N, C, H, W]`` in [0, 1] are scaled bilinearly to ``size`` x ``size`` (None: as they
    are), one channel is repeated for a net that takes three, and (x - mean) / std is its input.
    ``classes``: its output is logits of so many classes; None if it classifies nothing.
    """

    def __init__(
        self,
        net: nn.Sequential,
        *,
        size: int | None = None,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.net, self.size, self.classes = net.eval().requires_grad_(False), size, classes
        for layer in net.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # what it shows must not be overwritten
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def train(self, mode: bool = True) -> Extractor:
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """(outputs of the ReLUs, output of the net)."""
        size = self.size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        x, shown = (images - self.mean) / self.std, []
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                shown.append(x)
        return shown, x

    def features(self, images: Tensor) -> Tensor:
        """``[N, F]``: every ReLU at every location, side by side."""
        return flat(self(images)[0])


def flat(shown: list[Tensor]) -> Tensor:
    """The outputs of the ReLUs, per location, as one vector a picture: ``[N, F]``."""
    return torch.cat([part.flatten(1) for part in shown], 1)


def pooled(shown: list[Tensor]) -> Tensor:
    """``[N, D]``: the last ReLU, averaged over locations."""
    return shown[-1] if shown[-1].ndim == 2 else shown[-1].mean((-2, -1))


def build_extractor(
    name: str, in_shape: Shape, *, file: Path | None = None, data: Path | None = None, seed: int = 0
) -> Extractor:
    """The extractor ``name`` of ``EXTRACTORS`` for images of ``in_shape`` (C, H, W).

    ``lenet`` and ``vgg19-bn`` load ``file``, or the one of its usual name under ``data``, else
    under SPARSETICKET_DATA, for VGG also in torch.hub's cache; nothing is fetched. ``random`` draws
    its weights from ``seed``. FileNotFoundError, or ValueError for a file of another network.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor: got {name!r}, known: {', '.join(EXTRACTORS)}")
    root = data if data is not None else os.environ.get("SPARSETICKET_DATA")
    return EXTRACTORS[name](in_shape, file, Path(root) if root else None, seed)


def _random(in_shape: Shape, file: Path | None, root: Path | None, seed: int) -> Extractor:
    """Three 3x3 convolutions, 16, 32 and 64 channels, Kaiming normal, the last two of stride 2."""
    layers: list[nn.Module] = []
    channels = in_shape[0]
    for i, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        number = ops.signed64(layer_id(f"extractor.{i}"))
        shape, std = tuple(conv.weight.shape), kaiming_std(9 * channels)
        drawn = ops.regenerate(seed, number, shape, "normal", std)
        conv.weight = nn.Parameter(drawn, requires_grad=False)
        layers += [conv, nn.ReLU()]
        channels = width
    return Extractor(nn.Sequential(*layers), mean=(0.5,), std=(0.5,))


def _lenet(in_shape: Shape, file: Path | None, root: Path | None, seed: int) -> Extractor:
    """LeNet-5 (6-16-120-84-10, ReLU, max-pool) for 32x32 grey images in [0, 1]."""
    if in_shape[0] != 1:
        raise ValueError(f"extractor: lenet takes grey images, got {in_shape[0]} channels")
    net = nn.Sequential(
        OrderedDict(
            c1=nn.Conv2d(1, 6, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            c3=nn.Conv2d(6, 16, 5),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            c5=nn.Conv2d(16, 120, 5),
            relu5=nn.ReLU(),
            flatten=nn.Flatten(),
            f6=nn.Linear(120, 84),
            relu6=nn.ReLU(),
            f7=nn.Linear(84, 10),
        )
    )
    path = _find("lenet", file, [root / _LENET_FILE] if root else [])
    # the checkpoint's modules stand in two groups, convnet and fc
    state = {key.partition(".")[2]: value for key, value in _read(path).items()}
    _load(net, state, path)
    return Extractor(net, size=32, classes=10)


def _vgg19_bn(in_shape: Shape, file: Path | None, root: Path | None, seed: int) -> Extractor:
    """The convolutional part of torchvision's VGG-19 with batch norm, trained on ImageNet."""
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(
            "extractor: vgg19-bn needs torchvision: pip install 'sparseticket[vision]'"
        ) from error
    folders = [root / "pretrained"] if root else []
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    path = _find("vgg19-bn", file, [folder / _VGG_FILE for folder in folders])
    vgg = models.vgg19_bn(weights=None)
    _load(vgg, _read(path), path)
    mean, std = _IMAGENET
    least = 32 if min(in_shape[1:]) < 32 else None  # five poolings
    return Extractor(vgg.features, size=least, mean=mean, std=std)


def _find(name: str, file: Path | None, usual: list[Path]) -> Path:
    candidates = usual if file is None else [file]
    for path in candidates:
        if path.is_file():
            return path
    looked = ", ".join(map(str, candidates)) or "no folder was named"
    raise FileNotFoundError(
        f"extractor: {name}: no weights found. Looked in: {looked}. Give the file with "
        "--extractor-file, or the folder of the data with --data or SPARSETICKET_DATA"
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (EOFError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a file of weights: {error}") from error


def _load(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        net.load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: weights of another network: {error}") from error


EXTRACTORS: dict[str, Callable[[Shape, Path | None, Path | None, int], Extractor]] = {
    "random": _random,
    "lenet": _lenet,
    "vgg19-bn": _vgg19_bn,
}
