"""The torch module that a sparse one stands for."""

from __future__ import annotations

from torch import nn

__all__ = ["plain_layer"]


def plain_layer(like: nn.Module, bias: bool) -> nn.Module:
    """The torch module of the same call as ``like``, a subclass of it, on the meta device."""
    if isinstance(like, nn.Linear):
        return nn.Linear(like.in_features, like.out_features, bias, device="meta")
    base = nn.Conv2d if isinstance(like, nn.Conv2d) else nn.Conv1d
    return base(
        like.in_channels,
        like.out_channels,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        like.groups,
        bias,
        like.padding_mode,
        device="meta",
    )
