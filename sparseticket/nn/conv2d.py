"""``nn.Conv2d`` under a mask, and what all convolutions share."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sparseticket import ops
from sparseticket.ops.masked_conv2d import FUSED_DENSITY, check_conv, dense_conv

from ._sparse import SparseModule

__all__ = ["SparseConv", "SparseConv2d"]


class SparseConv(SparseModule):
    """Mixin before ``nn.Conv2d`` or ``nn.Conv1d``. Both run the ops of two dimensions: one of one
    dimension is an image of height 1 (:mod:`~sparseticket.nn.conv1d`)."""

    _OPS: ClassVar = {
        "masked": ops.masked_conv2d,
        "scored": ops.popup_conv2d,
        "ticket": ops.ticket_conv2d,
        "compressed": ops.sparse_conv2d,
    }

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)

    def _pads_apart(self) -> bool:
        """Whether the padding is more than the op can do."""
        pads = self._reversed_padding_repeated_twice
        return self.padding_mode != "zeros" or pads[::2] != pads[1::2]

    def _image_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width that the op sees."""
        raise NotImplementedError

    # The compressed form's derived data ---------------------------------------------------------

    def _arguments(self, x: torch.Tensor) -> tuple:
        arguments = super()._arguments(x)
        if self.form != "compressed":
            return arguments
        *arguments, taps, flip = arguments
        fits = self._image == (*arguments[0].shape[-2:], arguments[0].dtype)
        return (*arguments, taps if fits else None, flip, self._code if fits else 0)

    def _set_pattern(self) -> None:
        """``pattern`` and machine code are for one image size: they wait for an eager forward."""
        super()._set_pattern()
        self._image = self._last_image = None
        self._keep_code(0)

    def _make_pattern(self, transposed: bool) -> torch.Tensor | None:
        if not transposed or max(self.stride) > 1:  # strided input gradients are dense
            return None
        return ops.conv2d_flip(self.mask_words, self._call_shape, self.groups, self.values.numel())

    def _derive(self, x: torch.Tensor) -> None:
        if x.requires_grad and self.pattern_t is None and torch.is_grad_enabled():
            self.pattern_t = self._make_pattern(transposed=True)
        image = (*self._image_size(x), x.dtype)
        # A new size must come twice in a row, or alternating ones would derive at every call.
        if image != self._image and (self._image is None or image == self._last_image):
            self._fit(x)
            self._image = image
        if image != self._last_image:  # setting an attribute of a module is slow
            self._last_image = image

    def _fit(self, x: torch.Tensor) -> None:
        """Derive machine code, or else ``pattern``, for this image size, if a kernel wants it."""
        self._keep_code(0)
        self.pattern = None
        if x.device.type != "cpu" or not self.explain(x).kernel.startswith("sparse"):
            return
        x, geometry = self._geometry(x)
        place = (self._call_shape, tuple(x.shape[-2:]), *geometry)
        batch = x.shape[0] if x.ndim == 4 else 1
        self._keep_code(ops.compile_conv2d(self.mask_words, *place, batch))
        if not self._code:
            self.pattern = ops.conv2d_taps(self.mask_words, *place)

    def _keep_code(self, code: int) -> None:
        """Hold machine code, to be freed with this module or when other code replaces it."""
        if free := vars(self).get("_free_code"):
            free()
        self._code = code
        self._free_code = weakref.finalize(self, ops.release_code, code) if code else None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # a handle means nothing elsewhere, and has one owner
        for name in ("_code", "_free_code"):
            state.pop(name, None)
        return state

    def _derived(self) -> torch.Tensor:
        seed, layer, *_ = self.recipe.arguments()
        return ops.sign_words(seed, layer, self.weight_shape, device=self.mask_words.device)

    def _ticket_arguments(self, geometry: tuple) -> tuple:
        return self._call_shape, *geometry, self.codes

    def _torch_call(self, x, weight, bias, *geometry) -> torch.Tensor:
        check_conv("popup_conv2d", x, weight.shape, self._buffers["mask_words"], bias, *geometry)
        return dense_conv(x, weight, bias, *geometry)

    @property
    def _torch_is_faster(self) -> bool:
        layerwise = self.options.scope == "layer"  # or the layer's own density is not known
        return layerwise and self.options.density > FUSED_DENSITY

    def _sample_shape(self) -> tuple[int, ...]:
        extent = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return (self.in_channels, *extent)


class SparseConv2d(SparseConv, nn.Conv2d):
    """``nn.Conv2d`` under a mask: trainable weights, frozen random weights, or no weights at all.

    torch's constructor with every stride, padding (``same`` and ``valid`` too), dilation, groups
    and padding mode; then the keyword-only arguments of :class:`~sparseticket.nn.SparseLinear`.

    Input ``[N, C, H, W]`` or ``[C, H, W]``, either memory format, in the dtype of the weights.
    """

    _BASE = nn.Conv2d

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
        if self._pads_apart():
            return self._padded(x), (self.stride, (0, 0), self.dilation, self.groups)
        left, _, top, _ = self._reversed_padding_repeated_twice
        return x, (self.stride, (top, left), self.dilation, self.groups)

    def _image_size(self, x: torch.Tensor) -> tuple[int, int]:
        if not self._pads_apart():
            return tuple(x.shape[-2:])
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
