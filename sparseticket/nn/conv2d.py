"""``nn.Conv2d`` under a mask."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops

from ._sparse import SparseModule

__all__ = ["SparseConv2d"]


class SparseConv2d(SparseModule, nn.Conv2d):
    """``nn.Conv2d`` under a mask: trainable weights, frozen random weights, or no weights at all.

    torch's constructor with every stride, padding (``same`` and ``valid`` too), dilation, groups
    and padding mode; then the keyword-only arguments of :class:`~sparseticket.nn.SparseLinear`.

    Input ``[N, C, H, W]`` or ``[C, H, W]``, either memory format, in the dtype of the weights.
    """

    _BASE = nn.Conv2d
    _OPS: ClassVar = {
        "masked": ops.masked_conv2d,
        "scored": ops.popup_conv2d,
        "ticket": ops.ticket_conv2d,
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        **ours: Any,
    ) -> None:
        make = partial(
            nn.Conv2d,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            dtype=dtype,
        )
        self._construct(make, device, **ours)

    def _geometry(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        left, right, top, bottom = pads = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.padding_mode != "zeros" or (left, top) != (right, bottom):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, pads, mode=mode), (0, 0)
        return x, (self.stride, padding, self.dilation, self.groups)

    def _derived(self) -> torch.Tensor:
        seed, layer, *_ = self.recipe.arguments()
        return ops.sign_words(seed, layer, self.weight_shape, device=self.mask_words.device)

    def _ticket_arguments(self, geometry: tuple) -> tuple:
        return self.weight_shape, *geometry, self.codes

    def _sample_shape(self) -> tuple[int, int, int]:
        extent = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return (self.in_channels, *extent)

    def _plain(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=False,
            padding_mode=self.padding_mode,
            device="meta",
        )
