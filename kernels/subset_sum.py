"""Subset sums on a grid: the first subset of few elements in a window, and the least error.

Rows of integers ``q[R, n + 1]`` end in a 0, which stands for "no element"; so do elements that do
not count: a subset with one of them ties with the smaller one without it. The subsets of up to two
elements are one list in canonical order, pairs in colex order, so that the pairs below an index are
a prefix; subsets of three and four are walked as such a prefix beside one or two outer elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .variants import Variant

__all__ = ["LEAST_MAX", "VARIANTS", "few", "least"]

LEAST_MAX = 16  # elements whose every subset is tried
_FEW = {"BT": 8, "BP": 128}
_NONE = tl.constexpr(2**31 - 1)
_PLACES = tl.constexpr(4096)  # more than the list is long


@triton.jit
def _few(
    p_q, p_row, p_low, p_width, p_pairs, p_outer, p_out, targets, width, places, outers, first,
    BT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The first hit of each target, outer * 4096 + place, or the largest int32.

    ``p_pairs``: ``[2, places]``, elements of the list; ``p_outer``: ``[3, outers]``, two elements
    and how many places from ``first`` on go with them.
    """
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < targets
    p_a = p_q + tl.load(p_row + o_t, mask=m_t, other=0) * width
    low = tl.load(p_low + o_t, mask=m_t, other=0)
    room = tl.load(p_width + o_t, mask=m_t, other=0).to(tl.uint32, bitcast=True)
    found = tl.where(m_t, _NONE, 0)
    i_outer = 0
    while (i_outer < outers) & (tl.max(found) == _NONE):
        c, d = tl.load(p_outer + i_outer), tl.load(p_outer + outers + i_outer)
        count = tl.load(p_outer + 2 * outers + i_outer)
        from_here = low - tl.load(p_a + c, mask=m_t, other=0) - tl.load(p_a + d, mask=m_t, other=0)
        best = found
        for start in range(0, count, BP):
            o_p = start + tl.arange(0, BP)
            m_p = o_p < count
            i = tl.load(p_pairs + first + o_p, mask=m_p, other=0)[None, :]
            j = tl.load(p_pairs + places + first + o_p, mask=m_p, other=0)[None, :]
            m = m_t[:, None] & m_p[None, :]
            total = tl.load(p_a[:, None] + i, mask=m, other=0)
            total += tl.load(p_a[:, None] + j, mask=m, other=0)
            off = (total - from_here[:, None]).to(tl.uint32, bitcast=True)
            place = tl.where(m & (off <= room[:, None]), i_outer * _PLACES + o_p[None, :], _NONE)
            best = tl.minimum(best, tl.min(place, axis=1))
        found = best
        i_outer += 1
    tl.store(p_out + o_t, found, mask=m_t)


@triton.jit
def _least(
    p_q, p_row, p_aim, p_out, targets, width, n,
    BT: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The subset of least error, then size, then mask: one int64 minimum of all three. Rows have
    ``n`` elements, or LOW if that is more."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < targets
    p_a = p_q + tl.load(p_row + o_t, mask=m_t, other=0) * width
    aim = tl.load(p_aim + o_t, mask=m_t, other=0)
    o_low = tl.arange(0, 1 << LOW)
    sums, size = tl.zeros((BT, 1 << LOW), tl.int32), tl.zeros((1 << LOW,), tl.int32)
    for i in tl.static_range(LOW):
        taken = (o_low >> i) & 1
        a = tl.load(p_a + i, mask=m_t, other=0)
        sums += taken[None, :] * a[:, None]
        size += taken
    tail = ((size << 26) | o_low).to(tl.int64)[None, :]
    best = tl.full((BT,), 2**62, tl.int64)
    high_bits = tl.maximum(n - LOW, 0)
    for high in range(1 << high_bits):
        rest, more = aim, 0
        for j in range(high_bits):
            one = (high >> j) & 1
            rest -= one * tl.load(p_a + LOW + j, mask=m_t, other=0)
            more += one
        error = tl.abs(sums - rest[:, None]).to(tl.int64)
        here = tl.min((error << 32) + tail, axis=1) + ((more << 26) | (high << LOW))
        best = tl.minimum(best, here)
    tl.store(p_out + o_t, best & ((1 << 26) - 1), mask=m_t)


def few(
    q: torch.Tensor, row: torch.Tensor, low: torch.Tensor, width: torch.Tensor, max_card: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the canonical subsets of up to ``max_card`` elements with sums in
    [low, low + width], and the indices of the targets that have none. ``q``: int32 ``[R, n + 1]``;
    ``row``: int64, ``low``, ``width``: int32, of every target, the width as unsigned."""
    n = q.shape[1] - 1
    pairs = _list(n, max_card > 1, q.device)
    mask = torch.zeros_like(row)
    left = torch.arange(len(row), device=q.device)
    for first, outer in _stages(n, max_card):
        if not len(left) or not outer:
            continue
        outer = torch.tensor(outer, dtype=torch.int32, device=q.device).t().contiguous()
        key = torch.empty_like(left, dtype=torch.int32)
        _few[(triton.cdiv(len(left), _FEW["BT"]),)](
            *(q, row[left], low[left], width[left], pairs, outer, key),
            *(len(left), n + 1, pairs.shape[1], outer.shape[1], first),
            **_FEW,
        )
        hit = key != _NONE.value
        at, place = key[hit] // _PLACES.value, first + key[hit] % _PLACES.value
        for i in (outer[0][at], outer[1][at], pairs[0][place], pairs[1][place]):
            mask[left[hit]] |= torch.where(i < n, torch.ones_like(mask[left[hit]]) << i.long(), 0)
        left = left[~hit]
    return mask, left


def _list(n: int, pairs: bool, device: torch.device) -> torch.Tensor:
    """Elements of all subsets of up to one or two elements; ``n`` is none."""
    empty, single = torch.tensor([[n], [n]]), torch.stack([torch.arange(n), torch.full((n,), n)])
    both = torch.tril_indices(n, n, -1).flip(0)[:, : n * (n - 1) // 2 if pairs else 0]
    return torch.cat([empty, single, both], 1).int().to(device)


def _stages(n: int, max_card: int):
    """Where the list begins, and (element, element, length of its prefix)."""
    yield 0, [(n, n, 1 + n + (n * (n - 1) // 2 if max_card > 1 else 0))]
    if max_card > 2:
        yield 1 + n, [(c, n, c * (c - 1) // 2) for c in range(2, n)]
    if max_card > 3:
        yield 1 + n, [(c, d, c * (c - 1) // 2) for d in range(3, n) for c in range(2, d)]


def least(q: torch.Tensor, row: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """Masks of the subsets of up to LEAST_MAX elements whose sums are nearest to ``aim``, int32."""
    n, mask = q.shape[1] - 1, torch.empty_like(row)
    q = torch.nn.functional.pad(q, (0, max(0, _LEAST["LOW"] - n)))
    if len(row):
        _least[(triton.cdiv(len(row), _LEAST["BT"]),)](
            q, row, aim, mask, len(row), q.shape[1], n, **_LEAST
        )
    return mask


_LEAST = {"BT": 4, "LOW": 8}
_TYPES = {"p_q": "*i32", "p_row": "*i64", "targets": "i32", "width": "i32"}
VARIANTS = [
    Variant(
        "subset_sum few",
        _few,
        {
            **_TYPES,
            **dict.fromkeys(["p_low", "p_width", "p_pairs", "p_outer", "p_out"], "*i32"),
            **dict.fromkeys(["places", "outers", "first"], "i32"),
        },
        _FEW,
        unit="sum",
        elements=_FEW["BT"] * _FEW["BP"],
        ceiling=22.0,
    ),
    Variant(
        "subset_sum least",
        _least,
        {**_TYPES, "p_aim": "*i32", "p_out": "*i64", "n": "i32"},
        _LEAST,
        unit="subset",
        elements=_LEAST["BT"] << _LEAST["LOW"],
        ceiling=5.0,
    ),
]
