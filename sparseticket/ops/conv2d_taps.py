from __future__ import annotations

import torch

from sparseticket.formats import canonical_shape
from sparseticket.reference import conv2d_taps as _reference

from ._dispatch import C, cap, check_words, define

__all__ = ["conv2d_taps", "output_size"]


def output_size(image, weight_shape, stride, padding, dilation):
    """``[H, W]`` of a convolution's output."""
    return [
        (image[i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]


def _check(words, weight_shape, image, stride, padding, dilation, groups):
    check_words("conv2d_taps", words, *canonical_shape(weight_shape))
    if len(image) != 2:
        raise ValueError(f"conv2d_taps: image: got {tuple(image)}, need [H, W]")
    if min(output_size(image, weight_shape, stride, padding, dilation)) <= 0:
        raise ValueError(
            f"conv2d_taps: image: got {tuple(image)}, smaller than the kernel of "
            f"{tuple(weight_shape)}, padding {tuple(padding)}, dilation {tuple(dilation)}"
        )


def _cpu(words, weight_shape, image, stride, padding, dilation, groups):
    _check(words, weight_shape, image, stride, padding, dilation, groups)
    x = (1, weight_shape[1] * groups, *image)
    y = (1, weight_shape[0], *output_size(image, weight_shape, stride, padding, dilation))
    geometry = (*weight_shape[2:], *stride, *padding, *dilation, groups)
    words = words.contiguous()
    size = C.conv2d_taps(cap(words), None, x, y, geometry)
    taps = torch.empty(size, dtype=torch.int32)
    C.conv2d_taps(cap(words), cap(taps), x, y, geometry)
    return taps


def _meta(words, weight_shape, image, stride, padding, dilation, groups):
    _check(words, weight_shape, image, stride, padding, dilation, groups)
    if words.device.type == "meta":
        raise NotImplementedError(
            "conv2d_taps: words: the taps of a meta tensor have no known size"
        )
    return words.new_empty(torch.library.get_ctx().new_dynamic_size())


conv2d_taps = define(
    "conv2d_taps(Tensor words, SymInt[] weight_shape, SymInt[] image, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    cpu=_cpu,
    reference=_reference.conv2d_taps,
    meta=_meta,
    check=_check,
)
