from __future__ import annotations

import torch

from sparseticket.reference import rice_decode as _reference

from ._dispatch import C, cap, define

__all__ = ["rice_decode"]


def _check(payload, rows, k, kept, parameter):
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise TypeError(
            f"rice_decode: payload: got {payload.dtype} {tuple(payload.shape)}, need 1-D uint8"
        )
    if not 0 <= parameter <= 30:
        raise ValueError(f"rice_decode: parameter: got {parameter}, need 0..30")
    if min(rows, k) < 0 or not 0 <= kept <= rows * k:
        raise ValueError(
            f"rice_decode: rows, k, kept: got {rows}, {k}, {kept}, need 0 <= kept <= rows * k"
        )


def _cpu(payload, rows, k, kept, parameter):
    _check(payload, rows, k, kept, parameter)
    words = torch.zeros(rows, 2 * ((k + 63) // 64), dtype=torch.int32)
    if not C.rice_decode(cap(payload.contiguous()), cap(words), k, kept, parameter):
        raise ValueError(f"rice_decode: payload: is not the Rice code of {kept} ones in {rows}x{k}")
    return words


def _meta(payload, rows, k, kept, parameter):
    _check(payload, rows, k, kept, parameter)
    return payload.new_empty((rows, 2 * ((k + 63) // 64)), dtype=torch.int32)


rice_decode = define(
    "rice_decode(Tensor payload, SymInt rows, SymInt k, SymInt kept, int parameter) -> Tensor",
    cpu=_cpu,
    reference=_reference.rice_decode,
    meta=_meta,
)
