from __future__ import annotations

import torch

from sparseticket import prng
from sparseticket.reference import ticket_codes as _reference

from ._dispatch import C, cap, check_words, define, nthreads

__all__ = ["check_codes", "planes_of", "ticket_codes", "ticket_codes_cpu"]

codes_shape = _reference.codes_shape


def planes_of(words, signs):
    """Capsules of a layer's planes as the kernels take them, None for what is not there."""
    return [None if t is None else cap(t.contiguous()) for t in (words, signs)]


def check_codes(op: str, codes: torch.Tensor, rows: int, k: int, name: str) -> None:
    expected = codes_shape(rows, k)
    if codes.dtype != torch.int32 or tuple(codes.shape) != expected:
        raise ValueError(
            f"{op}: {name}: got {codes.dtype} {tuple(codes.shape)}, need int32 {expected}, what "
            f"ticket_codes makes for a [{rows}, {k}] matrix"
        )


def _rows(words, k, seed, signs):
    prng.check_seed(seed)
    if words is None and signs is None:
        raise ValueError("ticket_codes: words: got None, which needs the layer's signs")
    rows = (signs if words is None else words).shape[0]
    for name, plane in (("words", words), ("signs", signs)):
        if plane is not None:
            check_words("ticket_codes", plane, rows, k, name)
    return rows


def _cpu(words, k, seed, layer, signs=None, transposed=False):
    _rows(words, k, seed, signs)
    return ticket_codes_cpu(words, k, seed, layer, signs, transposed)


def ticket_codes_cpu(words, k, seed, layer, signs, transposed):
    """The op's body for checked arguments."""
    plane = signs if words is None else words
    rows = plane.shape[0]
    codes = plane.new_empty(codes_shape(k, rows) if transposed else codes_shape(rows, k))
    key, high = prng.stream_key(seed, layer, "sign")
    C.ticket_codes(*planes_of(words, signs), cap(codes), rows, k, transposed, key, high, nthreads())
    return codes


def _meta(words, k, seed, layer, signs=None, transposed=False):
    rows = _rows(words, k, seed, signs)
    shape = codes_shape(k, rows) if transposed else codes_shape(rows, k)
    return (signs if words is None else words).new_empty(shape)


ticket_codes = define(
    "ticket_codes(Tensor? words, SymInt k, int seed, int layer, Tensor? signs=None,"
    " bool transposed=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.ticket_codes,
    meta=_meta,
)
