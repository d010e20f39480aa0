"""The torch module that a sparse one stands for."""

from __future__ import annotations

from torch import nn

__all__ = ["plain_layer"]


def plain_layer(like: nn.Module, bias: bool) -> nn.Module:
    """The torch module of the same call as ``like``, a subclass of it, on the meta device."""
    if isinstance(like, nn.Linear):
        return nn.Linear(like.in_features, like.out_features, bias, device="meta")
    place = {
        "kernel_size": like.kernel_size,
        "stride": like.stride,
        "padding": like.padding,
        "dilation": like.dilation,
        "groups": like.groups,
        "padding_mode": like.padding_mode,
    }
    if isinstance(like, nn.ConvTranspose2d):
        place["output_padding"] = like.output_padding
    kinds = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    base = next(kind for kind in kinds if isinstance(like, kind))
    return base(like.in_channels, like.out_channels, bias=bias, device="meta", **place)
