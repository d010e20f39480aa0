from __future__ import annotations

import torch

from sparseticket.reference import sparse_pattern as _reference

from ._dispatch import C, cap, check_words, define

__all__ = ["sparse_pattern"]


def _cpu(words, k, kept, transposed=False):
    pattern = _meta(words, k, kept, transposed)
    C.sparse_pattern(cap(words.contiguous()), cap(pattern), words.shape[0], k, kept, transposed)
    return pattern


def _meta(words, k, kept, transposed=False):
    check_words("sparse_pattern", words, words.shape[0], k)
    if not 0 <= kept <= words.shape[0] * k:
        raise ValueError(f"sparse_pattern: kept: got {kept}, need the number of live weights")
    shape = (k, words.shape[0]) if transposed else (words.shape[0], k)
    size = C.pattern_words(*shape, int(kept), transposed)
    return torch.empty(size, dtype=torch.int32, device=words.device)


sparse_pattern = define(
    "sparse_pattern(Tensor words, SymInt k, SymInt kept, bool transposed=False) -> Tensor",
    cpu=_cpu,
    reference=_reference.sparse_pattern,
    meta=_meta,
)
