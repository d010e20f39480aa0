"""The networks of the ticket papers as plain torch modules, without biases.

``MODELS`` maps a name to its builder; ``build_model`` checks the arguments and sets the weights.
Module names are part of the contract: a seed regenerates a layer's weights by its qualified name.
ResNets carry torchvision's names: its checkpoints load but for ``fc.bias``, which is absent here.

| name | source |
|---|---|
| mlp | flatten-256-256-classes, ours (the digits recipe) |
| fc300 | flatten-300-300-classes, the permuted-MNIST net of Wortsman et al., NeurIPS 2020 |
| lenet300 | LeNet-300-100 of LeCun et al., 1998; FC of Ramanujan et al., CVPR 2020 |
| conv2 conv4 conv6 conv8 | VGG-like of Frankle & Carbin, ICLR 2019; conv8 as in Ramanujan 2020 |
| cresnet18 | ResNet-18 with a 3x3 stem and no max-pool, widths 64-512 (Ramanujan et al., 2020) |
| resnet20 | He et al., CVPR 2016, section 4.2, but with 1x1 convolution shortcuts and batch norm |
| resnet18 resnet50 resnet101 | He et al., 2016; the stride of a bottleneck is on its 3x3 layer |
| vit | 2 blocks of width 64 on 4x4 patches, see :mod:`~sparseticket.train.transformers` |
| wide_resnet50 | Zagoruyko & Komodakis, BMVC 2016: WRN-50-2, inner bottleneck width doubled |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import fx, nn

from .transformers import VisionTransformer

__all__ = ["MODELS", "build_model"]

Shape = tuple[int, int, int]


def build_model(name: str, *, in_shape: Shape, num_classes: int) -> nn.Module:
    """The model ``name``: images ``[N, *in_shape]`` (C, H, W) to logits ``[N, num_classes]``.

    Weights are drawn from torch's generator, Kaiming normal with fan-in for ReLU: the nets without
    batch norm train from it at any depth. Batch norms are affine (gamma 1, beta 0).
    """
    if name not in MODELS:
        raise ValueError(f"build_model: name: got {name!r}, known: {', '.join(MODELS)}")
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"build_model: in_shape: got {in_shape}, need positive (C, H, W)")
    if num_classes < 1:
        raise ValueError(f"build_model: num_classes: got {num_classes}, need at least 1")
    model = MODELS[name](in_shape, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _fully_connected(widths: Sequence[int]) -> OrderedDict[str, nn.Module]:
    """Layers ``fc1``, ``relu_fc1``, ``fc2``, ... through ``widths``, no ReLU after the last."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, len(widths)):
        layers[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i], bias=False)
        if i < len(widths) - 1:
            layers[f"relu_fc{i}"] = nn.ReLU()
    return layers


def _mlp(hidden: Sequence[int], in_shape: Shape, num_classes: int) -> nn.Module:
    channels, height, width = in_shape
    widths = [channels * height * width, *hidden, num_classes]
    return nn.Sequential(OrderedDict(flatten=nn.Flatten()) | _fully_connected(widths))


def _conv_net(stages: Sequence[int], in_shape: Shape, num_classes: int) -> nn.Module:
    """Two 3x3 convolutions and a 2x2 max-pool per stage width, then 256-256-classes."""
    channels, height, width = in_shape
    shrink = 2 ** len(stages)
    if min(height, width) < shrink:
        raise ValueError(
            f"conv{2 * len(stages)}: got {height}x{width} images, its {len(stages)} 2x2 pools need "
            f"at least {shrink}x{shrink}; use a shallower conv net or mlp"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, features in enumerate(stages, start=1):
        for i in (2 * stage - 1, 2 * stage):
            layers[f"conv{i}"] = nn.Conv2d(channels, features, 3, padding=1, bias=False)
            layers[f"relu{i}"] = nn.ReLU()
            channels = features
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    flat = channels * (height // shrink) * (width // shrink)
    return nn.Sequential(layers | _fully_connected([flat, 256, 256, num_classes]))


def _conv_bn(channels: int, out: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.Module]:
    padding = kernel // 2
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
    return conv, nn.BatchNorm2d(out)


def _shortcut(channels: int, out: int, stride: int) -> nn.Module | None:
    """1x1 convolution + batch norm where the shape changes (option B), else None: identity."""
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(*_conv_bn(channels, out, 1, stride))


@fx.wrap
def _pool3x3(x: torch.Tensor) -> torch.Tensor:
    """3x3 max-pool of stride 2, padding 1. torch's takes six times as long as rows, then columns,
    on a CPU for contiguous images; gradients are left to it, for it has a rule for ties."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    if x.requires_grad or x.device.type != "cpu" or last:
        return F.max_pool2d(x, 3, 2, 1)
    x = F.pad(x, (1, 1, 1, 1), value=float("-inf"))
    x = torch.maximum(torch.maximum(x[..., :-2:2, :], x[..., 1:-1:2, :]), x[..., 2::2, :])
    return torch.maximum(torch.maximum(x[..., :-2:2], x[..., 1:-1:2]), x[..., 2::2])


class _StemPool(nn.MaxPool2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _pool3x3(x)


class _BasicBlock(nn.Module):
    """3x3, 3x3; ``[N, channels, H, W]`` to ``[N, width, H/stride, W/stride]``."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, width, 3, stride)
        self.conv2, self.bn2 = _conv_bn(width, width, 3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class _Bottleneck(nn.Module):
    """1x1, 3x3 (stride), 1x1; ``[N, channels, H, W]`` to ``[N, 4*width, H/stride, W/stride]``."""

    def __init__(self, channels: int, width: int, stride: int, widen: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, widen * width, 1)
        self.conv2, self.bn2 = _conv_bn(widen * width, widen * width, 3, stride)
        self.conv3, self.bn3 = _conv_bn(widen * width, 4 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class _ResNet(nn.Module):
    """Stem, stages of blocks whose width doubles and image halves, global average pool, linear."""

    def __init__(
        self,
        in_shape: Shape,
        num_classes: int,
        *,
        depths: Sequence[int],
        width: int,
        image_stem: bool,
        widen: int | None = None,
    ) -> None:
        """``widen`` is the inner width factor of bottlenecks; None builds basic blocks."""
        super().__init__()
        stem = (7, 2) if image_stem else (3, 1)
        self.conv1, self.bn1 = _conv_bn(in_shape[0], width, *stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = _StemPool(3, stride=2, padding=1) if image_stem else nn.Identity()
        block = _BasicBlock if widen is None else partial(_Bottleneck, widen=widen)
        expansion = 1 if widen is None else 4
        channels = width
        self._stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(channels, width << i, 2 if i > 0 and j == 0 else 1))
                channels = expansion * (width << i)
            self.add_module(self._stages[i], nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        return self.fc(self.avgpool(x).flatten(1))


_image_net = partial(_ResNet, width=64, image_stem=True)

MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": partial(_mlp, (256, 256)),
    "fc300": partial(_mlp, (300, 300)),
    "lenet300": partial(_mlp, (300, 100)),
    "conv2": partial(_conv_net, (64,)),
    "conv4": partial(_conv_net, (64, 128)),
    "conv6": partial(_conv_net, (64, 128, 256)),
    "conv8": partial(_conv_net, (64, 128, 256, 512)),
    "cresnet18": partial(_ResNet, depths=(2, 2, 2, 2), width=64, image_stem=False),
    "resnet20": partial(_ResNet, depths=(3, 3, 3), width=16, image_stem=False),
    "resnet18": partial(_image_net, depths=(2, 2, 2, 2)),
    "resnet50": partial(_image_net, depths=(3, 4, 6, 3), widen=1),
    "resnet101": partial(_image_net, depths=(3, 4, 23, 3), widen=1),
    "vit": VisionTransformer,
    "wide_resnet50": partial(_image_net, depths=(3, 4, 6, 3), widen=2),
}
