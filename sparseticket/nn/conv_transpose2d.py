"""``nn.ConvTranspose2d`` under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops

from ._sparse import Options, SparseModule

__all__ = ["SparseConvTranspose2d"]

# What makes the weight of each form; torch's dense convolution multiplies it.
_MAKERS = {
    "masked": "apply_mask",
    "scored": "popup_weight",
    "ticket": "regenerate",
    "compressed": "scatter_live",
}


def _call(x, weight, bias, geometry, output_padding) -> torch.Tensor:
    stride, padding, own, groups, dilation = geometry
    extra = own if output_padding is None else output_padding
    return F.conv_transpose2d(x, weight.to(x.dtype), bias, stride, padding, extra, groups, dilation)


def _masked(
    x, weight, words, bias, geometry, raw_grad=False, shadow=None, *, output_padding=None
) -> torch.Tensor:
    if shadow is not None and not torch.is_grad_enabled():
        weight = shadow
    elif raw_grad:
        weight = ops.popup_weight(weight.detach(), weight, words, "identity", True)
    else:
        weight = ops.apply_mask(weight, words)
    return _call(x, weight, bias, geometry, output_padding)


def _scored(
    x,
    weight,
    scores,
    words,
    bias,
    transform,
    seed,
    layer,
    sigma,
    geometry,
    raw_grad,
    *,
    output_padding=None,
) -> torch.Tensor:
    weight = ops.popup_weight(weight, scores, words, transform, raw_grad)
    return _call(x, weight, bias, geometry, output_padding)


def _ticket(
    x, words, bias, seed, layer, dist, sigma, shape, geometry, *, output_padding=None
) -> torch.Tensor:
    made = {"dtype": x.dtype, "device": x.device, "words": words}
    weight = ops.regenerate(seed, layer, shape, dist, sigma, **made)
    return _call(x, weight, bias, geometry, output_padding)


def _compressed(
    x, values, words, bias, shape, geometry, pattern, pattern_t, *, output_padding=None
) -> torch.Tensor:
    weight = ops.scatter_live(values, words, shape)
    return _call(x, weight, bias, geometry, output_padding)


class SparseConvTranspose2d(SparseModule, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` under a mask: trainable weights, frozen random ones, or none at all.

    torch's constructor, and ``forward(x, output_size)``; then the keyword-only arguments of
    :class:`~sparseticket.nn.SparseLinear`. The weight's own shape ``[in, out/groups, kh, kw]`` is
    what masks and random streams are laid out over: its canonical form has ``in`` rows. Fans are
    those that torch counts on it (fan-in: out/groups * kh * kw).

    Input ``[N, C, H, W]`` or ``[C, H, W]`` in the dtype of the weights. Every form makes its masked
    weight in one op and has torch convolve it: speed is that of the dense layer. ValueError for
    ``codes=True``, of which there are none for this layer.
    """

    _BASE = nn.ConvTranspose2d
    _OPS: ClassVar = {
        "masked": _masked,
        "scored": _scored,
        "ticket": _ticket,
        "compressed": _compressed,
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        **ours: Any,
    ) -> None:
        make = partial(
            nn.ConvTranspose2d,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            dtype=dtype,
        )
        self._construct(make, device, **ours)

    def forward(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        if self.form == "scored":
            self._check_fresh()
        extra = None
        if output_size is not None:
            place = (list(self.stride), list(self.padding), list(self.kernel_size))
            extra = self._output_padding(x, list(output_size), *place, 2, list(self.dilation))
        return self._OPS[self.form](*self._arguments(x), output_padding=extra)

    def _geometry(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"SparseConvTranspose2d: x: got shape {tuple(x.shape)}, need [N, C, H, W] or "
                f"[C, H, W] with C = {self.in_channels}"
            )
        geometry = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return x, (geometry,)

    def _ticket_arguments(self, geometry: tuple) -> tuple:
        return self.weight_shape, *geometry

    def _assemble(self, like: nn.Module, options: Options, *rest: Any) -> None:
        if options.codes:
            raise ValueError("SparseConvTranspose2d: codes: got True, need False: it has no codes")
        super()._assemble(like, options, *rest)

    def explain(self, x: torch.Tensor) -> ops.Choice:
        """Which kernel would run ``forward(x)``, and why."""
        reason = "transposed convolutions are torch's own, on the masked weight"
        return ops.Choice(_MAKERS[self.form], "materialised", reason)

    def _sample_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, *self.kernel_size)
