"""``nn.Conv1d`` under a mask: a convolution over an image of height 1."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .conv2d import SparseConv

__all__ = ["SparseConv1d"]


class SparseConv1d(SparseConv, nn.Conv1d):
    """``nn.Conv1d`` under a mask: trainable weights, frozen random weights, or no weights at all.

    torch's constructor with every stride, padding (``same`` and ``valid`` too), dilation, groups
    and padding mode; then the keyword-only arguments of :class:`~sparseticket.nn.SparseLinear`.

    Input ``[N, C, L]`` or ``[C, L]`` in the dtype of the weights. Weight and scores are ``[O, C,
    k]``; the ops see ``[O, C, 1, k]``, which has the same canonical ``[O, K]`` form and so the same
    mask words, seed and random weights. Kernels are those of ``SparseConv2d``.
    """

    _BASE = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        **ours: Any,
    ) -> None:
        make = partial(
            nn.Conv1d,
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).squeeze(-2)

    def _geometry(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        if x.ndim not in (2, 3) or x.shape[-2] != self.in_channels:
            raise ValueError(
                f"SparseConv1d: x: got shape {tuple(x.shape)}, need [N, C, L] or [C, L] with "
                f"C = {self.in_channels}"
            )
        padding = (0, 0)
        if self._pads_apart():
            x = self._padded(x)
        else:
            padding = (0, self._reversed_padding_repeated_twice[0])
        return x.unsqueeze(-2), ((1, *self.stride), padding, (1, *self.dilation), self.groups)

    def _image_size(self, x: torch.Tensor) -> tuple[int, int]:
        pads = self._reversed_padding_repeated_twice
        return (1, x.shape[-1] + (sum(pads) if self._pads_apart() else 0))

    # The op's view of what is shaped as the weight --------------------------------------------

    @property
    def _call_shape(self) -> tuple[int, ...]:
        out, channels, taps = self.weight_shape
        return (out, channels, 1, taps)

    def _seen(self, name: str) -> Any:
        held = self._held(name)
        return held.unsqueeze(2) if name in ("weight", "scores") else held

    def _shadow_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        shadow = super()._shadow_in(dtype)
        return None if shadow is None else shadow.unsqueeze(2)
