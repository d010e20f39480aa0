"""The torch module that a sparse one stands for."""

from __future__ import annotations

import inspect

from torch import nn

__all__ = ["plain_layer"]


def plain_layer(like: nn.Module, bias: bool) -> nn.Module:
    """The torch module of the same call as ``like``, one of ours, on the meta device."""
    accepted = inspect.signature(like._BASE).parameters
    arguments = {name: getattr(like, name) for name in accepted if hasattr(like, name)}
    arguments |= {"device": "meta", "dtype": None}
    if "bias" in accepted:
        arguments["bias"] = bias
    return like._BASE(**arguments)
