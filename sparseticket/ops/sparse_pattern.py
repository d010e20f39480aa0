from __future__ import annotations

import torch

from sparseticket.reference import sparse_pattern as _reference

from ._dispatch import C, cap, check_words, define
from .unpack_mask import unpack_mask

__all__ = ["device_pattern", "sparse_pattern"]

# On CUDA: up to this density and batch, walking over the live weights beats a dense product.
LIST_DENSITY, LIST_ROWS = 0.1, 4


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


def device_pattern(words: torch.Tensor, k: int, kept: int) -> torch.Tensor | None:
    """What ``sparse_linear`` and its gradients take as ``pattern`` on CUDA; waits for the device.

    ``[1, n]``: the list of live blocks of kernels/blocks.py, where the mask consists of blocks of
    32, 64 or 128; ``[n]``: that of live weights, where few live; None for anything else.
    """
    from sparseticket.kernels.blocks import BLOCKS

    rows = words.shape[0]
    if not 0 < kept < rows * k:
        return None
    mask = unpack_mask(words, (rows, k))
    for block in BLOCKS:
        if rows % block or k % block or kept % block**2:
            continue
        full = mask.view(rows // block, block, k // block, block).all(3).all(1)
        if int(full.sum()) * block**2 == kept:
            return _block_list(full)[None]
    if kept <= LIST_DENSITY * rows * k:
        return _reference.sparse_pattern(words, k, kept)
    return None


def _block_list(full: torch.Tensor) -> torch.Tensor:
    """The sections of kernels/blocks.py, from which blocks live."""
    order = (full.flatten().cumsum(0) - 1).view(full.shape)
    rows, columns = full.nonzero().t()
    columns_t, rows_t = full.t().nonzero().t()
    starts = [torch.cat([s.new_zeros(1), s.cumsum(0)]) for s in (full.sum(1), full.sum(0))]
    places = order[rows_t, columns_t]
    return torch.cat([starts[0], columns, rows, starts[1], rows_t, places]).int()
