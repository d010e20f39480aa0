from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .layout import to_canonical
from .unpack_mask import unpack_mask

__all__ = ["conv2d_taps"]

_WINDOW_FLOATS, _SEGMENT, _TILE = 6144, 16, 128


def conv2d_taps(
    words: torch.Tensor,
    weight_shape: Sequence[int],
    image: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A mask decoded for images of ``[H, W]``, as the kernel of sparse_conv2d walks it.

    int32: H, W; the starts of segments, block of input channels by output channel, and their end;
    every tap's offset in the zero-padded planes; its place among the values. Planes are split by
    stride phase: a tap at (r, s) reads the plane of phase (r*dilation) mod stride.
    """
    outputs, channels, *kernel = weight_shape
    pairs = list(zip(image, kernel, stride, padding, dilation, strict=True))
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in pairs]
    stride = [s if n > 1 else 1 for n, s in zip(out, stride, strict=True)]
    phases = [min(s // math.gcd(s, d), k) for k, s, d in zip(kernel, stride, dilation, strict=True)]
    halo = [(k - 1) * d // s for k, s, d in zip(kernel, stride, dilation, strict=True)]
    rows, columns = (n + h for n, h in zip(out, halo, strict=True))
    plane, planes = rows * columns, phases[0] * phases[1]
    mask = to_canonical(unpack_mask(words, weight_shape))
    live = int(mask.sum())
    window = min(_TILE + halo[0] * columns, plane)
    block = max(
        _WINDOW_FLOATS // (planes * window + 1), _SEGMENT * outputs * channels // (live + 1)
    )
    block = min(block + 1, channels)
    row, k = mask.nonzero(as_tuple=True)
    tap, channel = k // channels, k % channels
    r, s = tap // kernel[1], tap % kernel[1]
    phase = r % phases[0] * phases[1] + s % phases[1]
    at = (phase * rows + r * dilation[0] // stride[0]) * columns + s * dilation[1] // stride[1]
    segment = channel // block * outputs + row
    order = segment.argsort(stable=True)
    segments = -(-channels // block) * outputs
    counts = torch.bincount(segment, minlength=segments)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    offsets = (channel * planes * plane + at)[order]
    header = starts.new_tensor(list(image))
    return torch.cat([header, starts, offsets, order]).int()
