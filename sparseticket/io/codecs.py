"""How a packed mask is written to a file: a bitmap, or Rice-coded gaps where that is smaller.

Both run over the canonical [O, K] order without row padding, LSB first. A bitmap is ceil(O*K/8)
bytes; the Rice code (``ops/rice_encode``) stores the zeros before each kept weight. At equal size
the bitmap wins: it can be read at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..formats import canonical_shape, words_shape
from ..ops.rice_encode import rice_bits

__all__ = ["CODECS", "decode_mask", "encode_mask"]

CODECS = ("bitmap", "rice")
_MAX_PARAMETER = 30


def encode_mask(words: Tensor, shape: Sequence[int]) -> tuple[str, int, Tensor]:
    """``(codec, parameter, payload)`` of the mask ``words`` of a weight of this shape.

    ``parameter`` is Rice's (0 for a bitmap), ``payload`` a 1-D uint8 tensor.
    """
    if words.dtype != torch.int32 or tuple(words.shape) != words_shape(shape):
        raise ValueError(
            f"encode_mask: words: got {words.dtype} {tuple(words.shape)}, need int32 "
            f"{words_shape(shape)} for a weight of shape {tuple(shape)}"
        )
    words = words.detach().cpu().contiguous()
    rows, k = canonical_shape(shape)
    kept = int(ops.mask_ops(words, None, "popcount"))
    parameter, bits = _best_parameter(words, k, kept, rows * k)
    if (bits + 7) // 8 < (rows * k + 7) // 8:
        return "rice", parameter, ops.rice_encode(words, k, parameter)
    return "bitmap", 0, _to_bitmap(words, k)


def decode_mask(
    codec: str, parameter: int, payload: Tensor, shape: Sequence[int], kept: int
) -> Tensor:
    """Packed words of an encoded mask; ValueError unless it holds exactly ``kept`` ones."""
    if codec not in CODECS:
        raise ValueError(f"decode_mask: codec: got {codec!r}, known: {', '.join(CODECS)}")
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise ValueError(
            f"decode_mask: payload: got {payload.dtype} {tuple(payload.shape)}, need 1-D uint8"
        )
    rows, k = canonical_shape(shape)
    if not 0 <= kept <= rows * k:
        raise ValueError(f"decode_mask: kept: got {kept}, need 0..{rows * k}")
    payload = payload.cpu().contiguous()
    if codec == "rice":
        return ops.rice_decode(payload, rows, k, kept, parameter)
    return _from_bitmap(payload, rows, k, kept)


def _best_parameter(words: Tensor, k: int, kept: int, n: int) -> tuple[int, int]:
    """The Rice parameter of the shortest code, and the length of that code in bits."""
    if kept == 0:
        return 0, 0
    # bits(b) = sum(1 + b + (gap >> b)) is convex in b, so walking downhill ends at the minimum
    mean_gap = (n - kept) / kept
    best = min(max(round(math.log2(max(mean_gap * math.log(2), 1))), 0), _MAX_PARAMETER)
    bits = rice_bits(words, k, best)
    for step in (1, -1):
        while 0 <= best + step <= _MAX_PARAMETER:
            shorter = rice_bits(words, k, best + step)
            if shorter >= bits:
                break
            best, bits = best + step, shorter
    return best, bits


def _to_bitmap(words: Tensor, k: int) -> Tensor:
    rows = np.ascontiguousarray(words.numpy(), dtype="<i4").view(np.uint8)
    bits = np.unpackbits(rows, axis=1, bitorder="little")[:, :k]
    return torch.from_numpy(np.packbits(bits.reshape(-1), bitorder="little"))


def _from_bitmap(payload: Tensor, rows: int, k: int, kept: int) -> Tensor:
    n = rows * k
    if len(payload) != (n + 7) // 8:
        raise ValueError(
            f"decode_mask: payload: got {len(payload)} bytes, a bitmap of {n} weights has "
            f"{(n + 7) // 8}"
        )
    bits = np.unpackbits(payload.numpy(), bitorder="little")
    if bits[n:].any() or bits.sum(dtype=np.int64) != kept:
        raise ValueError(f"decode_mask: payload: is not a bitmap of {kept} ones in {rows}x{k}")
    padded = np.zeros((rows, 64 * ((k + 63) // 64)), np.uint8)
    padded[:, :k] = bits[:n].reshape(rows, k)
    packed = np.packbits(padded, axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32))
