from __future__ import annotations

import torch

from sparseticket.reference import mask_ops as _reference

from ._dispatch import C, cap, define, nthreads

__all__ = ["mask_ops"]

_LOGICAL = ("and", "or", "xor", "andnot")
_COUNTS = ("popcount", "hamming")


def _cpu(a, b, op):
    _check(a, b, op)
    a = a.contiguous()
    b = a if b is None else b.contiguous()
    if op in _LOGICAL:
        out = torch.empty_like(a)
        C.mask_logical(cap(a), cap(b), cap(out), _LOGICAL.index(op), nthreads())
        return out
    count = C.mask_count(cap(a), cap(b), op == "hamming", nthreads())
    return torch.tensor(count, dtype=torch.int64)


def _cuda(a, b, op):
    from sparseticket.kernels.mask_ops import mask_count, mask_logical

    a = a.contiguous()
    b = a if b is None else b.contiguous()
    if op in _LOGICAL:
        out = torch.empty_like(a)
        mask_logical(a, b, out, _LOGICAL.index(op))
        return out
    out = a.new_empty((), dtype=torch.int64)
    mask_count(a, b, out, op == "hamming")
    return out


def _meta(a, b, op):
    _check(a, b, op)
    return a.new_empty(a.shape) if op in _LOGICAL else a.new_empty((), dtype=torch.int64)


def _check(a, b, op):
    if op not in _LOGICAL + _COUNTS:
        raise ValueError(f"mask_ops: op: got {op!r}, accepted: {', '.join(_LOGICAL + _COUNTS)}")
    if (b is None) != (op == "popcount"):
        raise ValueError(f"mask_ops: b: {op} takes {'one mask' if b is not None else 'two masks'}")
    for name, words in (("a", a), ("b", b)):
        if words is not None and words.dtype != torch.int32:
            raise TypeError(f"mask_ops: {name}: got {words.dtype}, need int32 words")
    if b is not None and a.shape != b.shape:
        raise ValueError(f"mask_ops: masks differ in shape: {tuple(a.shape)}, {tuple(b.shape)}")


mask_ops = define(
    "mask_ops(Tensor a, Tensor? b, str op) -> Tensor",
    cpu=_cpu,
    reference=_reference.mask_ops,
    meta=_meta,
    cuda=_cuda,
)
