"""Exact top-k masks of many tensors, in one read of the scores where the last threshold helps.

A group (one tensor, or all of them) has a band of keys that should hold its threshold: around the
last one, or from a sample. One pass writes the bits above the band and marks the candidates inside
it; the few candidates are gathered and ranked by counting, the bits patched, and ties granted in
index order. Where the band did not hold the threshold, or held too much, the counting goes over the
scores themselves and a second pass follows. All of this is decided on the device.

Work is cut into chunks of 64-weight units of one tensor, in the order of the packed words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import philox_words, population
from .table import aligned, device_table
from .tuning import Sizes, shipped, targets_of, tuned
from .variants import Variant

__all__ = ["VARIANTS", "select_mask", "select_sizes"]

_LEAST_KEY = tl.constexpr(-(2**31))
_LARGEST_KEY = tl.constexpr(2**31 - 1)
_INFINITY = tl.constexpr(0x7F800000)
_BELOW_ALL = tl.constexpr(-2139095041)  # the key of -inf where signs count
_HINT_WIDTH = tl.constexpr(1 << 16)  # keys on either side of the last threshold: 0.8 %
_SAMPLE = 16384
_SAMPLE_SIGMAS = tl.constexpr(5.0)  # a sampled band misses once in a million
_ROOM = tl.constexpr(8)  # a chunk has room for one candidate in 8 scores
# Triton 3.6 counts by ballots, which 2048 bins make dear; and more scores a thread would spill.
_NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
_COUNTING = "select_mask count" + ("" if _NEW else ", Triton 3.6")

# A group's record, int32: the band, what the pass counted, what was found.
_RECORD = tl.constexpr(8)
_LO, _HI, _ABOVE, _INSIDE = (tl.constexpr(i) for i in range(4))
_FLAGS = tl.constexpr(4)  # 1: a NaN; 2: a chunk with too many candidates
# A level of the counting, int32: lowest key and width of its range, rank within it.
_LEVEL = tl.constexpr(4)


# ------------------------------------------------ keys
@triton.jit
def _key_of(score, ABS: tl.constexpr):
    """int32 that orders as the scores do; NaN anywhere outside."""
    if ABS:
        return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 is +0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _rank_key(score, ABS: tl.constexpr):
    """``_key_of`` with NaN ranked as -inf."""
    key = _key_of(score, ABS)
    return tl.where(score != score, -1 if ABS else _BELOW_ALL, key)


@triton.jit
def _bits_of(key, ABS: tl.constexpr):
    """fp32 bits of the score of a ``_rank_key``."""
    if ABS:
        return tl.where(key < 0, -8388608, key)  # the bits of -inf
    return key ^ ((key >> 31) & 0x7FFFFFFF)


# ------------------------------------------------ where things are
@triton.jit
def _chunk_range(p_table, i_chunk, tensors, LANES: tl.constexpr):
    """The tensor that a chunk is in, and the chunk's number inside it."""
    o = tl.arange(0, LANES)
    first = tl.load(p_table + 4 * tensors + o, mask=o < tensors, other=2**62)
    starts = tl.where(o < tensors, (first >> 32).to(tl.int32), 2**31 - 1)
    i_tensor = tl.sum((starts <= i_chunk).to(tl.int32)) - 1
    return i_tensor, i_chunk - (tl.load(p_table + 4 * tensors + i_tensor) >> 32).to(tl.int32)


@triton.jit
def _shape_of(p_table, i_tensor, tensors):
    """rows, k, channels, taps (1 where memory order is canonical), units in a row."""
    size = tl.load(p_table + 2 * tensors + i_tensor)
    layout = tl.load(p_table + 3 * tensors + i_tensor)
    rows, k = (size >> 32).to(tl.int32), size.to(tl.int32)
    channels, taps = (layout >> 32).to(tl.int32), layout.to(tl.int32)
    return rows, k, channels, taps, (k + 63) // 64


@triton.jit
def _pointer(p_table, i_column, i_tensor, dtype: tl.constexpr, tensors):
    address = tl.load(p_table + i_column * tensors + i_tensor)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _offset_of(o_unit, o_bit, k, channels, taps, row_units):
    """Where in memory the score of bit ``o_bit`` of a unit lies, and whether there is one."""
    i_row = o_unit // row_units
    o_k = (o_unit - i_row * row_units) * 64 + o_bit
    i_tap = o_k // channels
    o_memory = tl.where(taps == 1, o_k, (o_k - i_tap * channels) * taps + i_tap)
    return i_row.to(tl.int64) * k + o_memory, o_k < k


# ------------------------------------------------ the state of a group
@triton.jit
def _verdict(p_group, kept):
    """(the pass is all that was needed but for ties, candidates are to be ranked); neither: the
    band failed."""
    lo, hi = tl.load(p_group + _LO), tl.load(p_group + _HI)
    above, inside = tl.load(p_group + _ABOVE), tl.load(p_group + _INSIDE)
    flags = tl.load(p_group + _FLAGS)
    holds = (flags & 1) == 0
    holds = holds & ((kept == 0) | ((above < kept) & (kept <= above + inside)))
    return holds & (lo == hi), holds & (lo != hi) & ((flags & 2) == 0)


@triton.jit
def _shift_of(width, BINS: tl.constexpr):
    """log2 of the width of a bin that cuts ``width + 1`` keys (uint32) into ``BINS``."""
    shift = 0
    for i in tl.static_range(32):
        shift = tl.where((width >> i) >= BINS, i + 1, shift)
    return shift


@triton.jit
def _narrow(p_level, p_counts, BINS: tl.constexpr):
    """The next level: lowest key, width and rank after one counting."""
    lo, width, rank = tl.load(p_level), tl.load(p_level + 1), tl.load(p_level + 2)
    width = width.to(tl.uint32, bitcast=True)
    shift = _shift_of(width, BINS)
    o = tl.arange(0, BINS)
    counts = tl.load(p_counts + o)
    total = tl.sum(counts)
    rank = tl.minimum(rank, total)  # fewer may be chosen than were asked for
    greater = total - tl.cumsum(counts)
    i_bin = tl.sum((greater >= rank).to(tl.int32))
    i_bin = tl.minimum(i_bin, BINS - 1)
    rank = tl.where(rank > 0, rank - tl.sum(tl.where(o == i_bin, greater, 0)), 0)
    step = i_bin.to(tl.uint32) << shift
    left = (tl.full([], 1, tl.uint32) << shift) - 1
    width = tl.minimum(width - step, left)
    return lo + step.to(tl.int32, bitcast=True), width.to(tl.int32, bitcast=True), rank


@triton.jit
def _write_level(p_level, lo, width, rank):
    tl.store(p_level, lo)
    tl.store(p_level + 1, width)
    tl.store(p_level + 2, rank)


@triton.jit
def _kept_of(p_table, i_group, tensors):
    return tl.load(p_table + 4 * tensors + i_group).to(tl.int32)


# ------------------------------------------------ 1. bands
@triton.jit
def _nth_key(keys, rank):
    """The rank-th largest (from 1), bit by bit."""
    found = tl.full([], 0, tl.uint32)
    for i in range(32):
        bit = tl.full([], 2147483648, tl.uint32) >> i
        enough = tl.sum((keys >= (found | bit)).to(tl.int32)) >= rank
        found = tl.where(enough, found | bit, found)
    return (found ^ 2147483648).to(tl.int32, bitcast=True)


@triton.jit
def _sampled_keys(p_table, i_first, count, total, tensors, ABS: tl.constexpr, SAMPLE: tl.constexpr):
    """Keys, as uint32 that order alike, of one score in each of SAMPLE equal parts of a group."""
    o = tl.arange(0, SAMPLE)
    begin = o.to(tl.int64) * total // SAMPLE
    width = (o.to(tl.int64) + 1) * total // SAMPLE - begin
    random, _ = philox_words(0, 0, o)  # any fixed place would do, but for periodic scores
    place = begin + random.to(tl.int64) * width // 4294967296
    keys = tl.full([SAMPLE], _LEAST_KEY, tl.int32)
    before = tl.full([], 0, tl.int64)
    for i in range(count):
        size = tl.load(p_table + 2 * tensors + i_first + i)
        n = (size >> 32) * (size & 0xFFFFFFFF)
        p_scores = _pointer(p_table, 0, i_first + i, tl.float32, tensors)
        m_here = (place >= before) & (place < before + n)
        score = tl.load(p_scores + (place - before), mask=m_here, other=0.0)
        keys = tl.where(m_here, _rank_key(score, ABS), keys)
        before += n
    return keys.to(tl.uint32, bitcast=True) ^ 2147483648


@triton.jit
def _bands(
    p_table, p_hints, p_state, p_groups, p_counts, total, count,
    tensors, HINTED: tl.constexpr, WITHIN: tl.constexpr, ABS: tl.constexpr,
    SAMPLE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One program a group: its band, zeroed counters, the state of a group that keeps nothing."""
    i_group = tl.program_id(0)
    p_group = p_groups + i_group * _RECORD
    kept = _kept_of(p_table, i_group, tensors)
    size = tl.load(p_table + 2 * tensors + i_group)
    scores = tl.where(count == 1, (size >> 32) * (size & 0xFFFFFFFF), total)
    if HINTED:
        bits = tl.load(p_hints + 2 * i_group)
        key = _key_of(bits.to(tl.float32, bitcast=True), ABS)
        lo = tl.where(key > _LEAST_KEY + _HINT_WIDTH, key - _HINT_WIDTH, _LEAST_KEY)
        hi = tl.where(key < _INFINITY - _HINT_WIDTH, key + _HINT_WIDTH, _INFINITY)
    elif WITHIN:
        lo, hi = _LEAST_KEY, _LEAST_KEY  # a sample does not know who is allowed: it fails
    else:
        keys = _sampled_keys(p_table, i_group, count, scores, tensors, ABS, SAMPLE)
        share = kept.to(tl.float32) / tl.maximum(scores, 1).to(tl.float32)
        spread = _SAMPLE_SIGMAS * tl.sqrt(share * (1.0 - share) * SAMPLE) + 2.0
        few = tl.floor(share * SAMPLE - spread).to(tl.int32)
        many = tl.ceil(share * SAMPLE + spread).to(tl.int32)
        hi = tl.where(few < 1, _INFINITY, _nth_key(keys, few))
        lo = tl.where(many > SAMPLE, _LEAST_KEY, _nth_key(keys, many))
    lo = tl.where(kept == 0, _LARGEST_KEY, lo)
    hi = tl.where(kept == 0, _LARGEST_KEY, hi)
    o_entry = tl.arange(0, _RECORD)
    tl.store(p_group + o_entry, tl.where(o_entry == _LO, lo, tl.where(o_entry == _HI, hi, 0)))
    for i in range(0, COUNTS, 1024):
        o = i + tl.arange(0, 1024)
        tl.store(p_counts + i_group * COUNTS + o, tl.zeros([1024], tl.int32), mask=o < COUNTS)
    tl.store(p_state + 2 * i_group, _INFINITY)
    tl.store(p_state + 2 * i_group + 1, 0)


# ------------------------------------------------ 2. the pass
@triton.jit
def _emit_tile(
    score, allowed, m_score, m_half, p_words, p_candidates, o_half, lo, hi, largest, counts,
    ABS: tl.constexpr, EXACT: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """Words and candidate words of a ``[halves, 16]`` tile; counts: above + 65536 * inside."""
    o_bit = tl.arange(0, 16)
    if EXACT:
        key = _rank_key(score, ABS)
    else:
        key = _key_of(score, ABS)
        magnitude = key if ABS else score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, magnitude)  # 0 where nothing was loaded
    flag = tl.where(key > hi, 1, tl.where(key >= lo, 65536, 0))
    flag = tl.where(m_score, flag, 0)
    if WITHIN:
        flag = tl.where(((allowed[:, None] >> o_bit[None, :]) & 1) != 0, flag, 0)
    packed = tl.sum(flag << o_bit[None, :], axis=1)
    tl.store(p_words + o_half, packed.to(tl.int16), mask=m_half)
    tl.store(p_candidates + o_half, (packed >> 16).to(tl.int16))  # a chunk owns all of its own
    return largest, counts + flag


@triton.jit
def _emit_chunk(
    p_table, p_candidates, i_tensor, i_part, lo, hi,
    tensors, UNITS: tl.constexpr, TILE: tl.constexpr, ABS: tl.constexpr,
    EXACT: tl.constexpr, WITHIN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Words of a chunk: the bits above ``hi``, and candidates in [lo, hi]. Returns how many of
    each, and the largest magnitude seen."""
    rows, k, channels, taps, row_units = _shape_of(p_table, i_tensor, tensors)
    units = rows * row_units
    p_scores = _pointer(p_table, 0, i_tensor, tl.float32, tensors)
    p_words = _pointer(p_table, 1, i_tensor, tl.int16, tensors)
    p_within = _pointer(p_table, 5 if WITHIN else 1, i_tensor, tl.int16, tensors)
    o_bit = tl.arange(0, 16)
    largest = tl.zeros([TILE * 4, 16], tl.int32)
    counts = tl.zeros([TILE * 4, 16], tl.int32)
    i_unit = i_part * UNITS
    p_scores += i_unit.to(tl.int64) * 64
    p_words += i_unit.to(tl.int64) * 4
    p_within += i_unit.to(tl.int64) * 4
    if (not RAGGED) or (k == row_units * 64 and taps == 1):  # units follow each other in memory
        for i in range(0, UNITS, TILE):
            o_half = i * 4 + tl.arange(0, TILE * 4)
            m_half = o_half < (units - i_unit) * 4
            o_score = o_half[:, None] * 16 + o_bit[None, :]
            score = tl.load(p_scores + o_score, mask=m_half[:, None], other=0.0)
            allowed = o_half.to(tl.int16)
            if WITHIN:
                allowed = tl.load(p_within + o_half, mask=m_half, other=0)
            largest, counts = _emit_tile(
                score, allowed, m_half[:, None], m_half, p_words, p_candidates, o_half, lo, hi,
                largest, counts, ABS, EXACT, WITHIN,
            )  # fmt: skip
    else:
        p_scores -= i_unit.to(tl.int64) * 64
        for i in range(0, UNITS, TILE):
            o_half = i * 4 + tl.arange(0, TILE * 4)
            m_half = o_half < (units - i_unit) * 4
            o_in_unit = (o_half % 4 * 16)[:, None] + o_bit[None, :]
            o_unit = (i_unit + o_half // 4)[:, None]
            o_score, m_score = _offset_of(o_unit, o_in_unit, k, channels, taps, row_units)
            m_score = m_score & m_half[:, None]
            score = tl.load(p_scores + o_score, mask=m_score, other=0.0)
            allowed = o_half.to(tl.int16)
            if WITHIN:
                allowed = tl.load(p_within + o_half, mask=m_half, other=0)
            largest, counts = _emit_tile(
                score, allowed, m_score, m_half, p_words, p_candidates, o_half, lo, hi,
                largest, counts, ABS, EXACT, WITHIN,
            )  # fmt: skip
    return tl.sum(counts & 0xFFFF), tl.sum(counts >> 16), tl.max(largest)


@triton.jit
def _pass(
    p_table, p_groups, p_candidates, p_inside, LAYERS: tl.constexpr,
    tensors, LANES: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    ABS: tl.constexpr, WITHIN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program a chunk: the one read of the scores."""
    i_chunk = tl.program_id(0)
    i_tensor, i_part = _chunk_range(p_table, i_chunk, tensors, LANES)
    p_group = p_groups + (i_tensor if LAYERS else 0) * _RECORD
    above, inside, largest = _emit_chunk(
        p_table, p_candidates + i_chunk.to(tl.int64) * UNITS * 4, i_tensor, i_part,
        tl.load(p_group + _LO), tl.load(p_group + _HI),
        tensors, UNITS, TILE, ABS, False, WITHIN, RAGGED,
    )  # fmt: skip
    tl.store(p_inside + i_chunk, inside)
    tl.atomic_add(p_group + _ABOVE, above, sem="relaxed")
    tl.atomic_add(p_group + _INSIDE, inside, sem="relaxed")
    flags = tl.where(largest > _INFINITY, 1, 0)
    flags += tl.where(inside > UNITS * 64 // _ROOM, 2, 0)
    if flags != 0:
        tl.atomic_or(p_group + _FLAGS, flags, sem="relaxed")


# ------------------------------------------------ 3. the rank among the candidates
@triton.jit
def _place_of_lowest(word):
    """Number of the lowest 1 of a word that has one."""
    return population((word & -word) - 1)


@triton.jit
def _gather_chunk(
    p_table, p_candidates, p_keys, p_places, p_counts, i_tensor, i_part, lo, shift,
    tensors, UNITS: tl.constexpr, TILE: tl.constexpr, ABS: tl.constexpr,
):  # fmt: skip
    """Keys and places of a chunk's candidates, and their counts in bins."""
    _, k, channels, taps, row_units = _shape_of(p_table, i_tensor, tensors)
    p_scores = _pointer(p_table, 0, i_tensor, tl.float32, tensors)
    slot = 0
    for i in range(0, UNITS * 2, TILE * 2):
        o_word = i + tl.arange(0, TILE * 2)
        word = tl.load(p_candidates + o_word)
        many = population(word)
        o_slot = slot + tl.cumsum(many) - many
        for j in range(tl.max(many)):
            m_word = word != 0
            o_place = o_word * 32 + _place_of_lowest(word)
            o_score, m_inside = _offset_of(
                i_part * UNITS + o_place // 64, o_place % 64, k, channels, taps, row_units
            )
            key = _rank_key(tl.load(p_scores + o_score, mask=m_word & m_inside, other=0.0), ABS)
            tl.store(p_keys + o_slot + j, key, mask=m_word)
            tl.store(p_places + o_slot + j, o_place, mask=m_word)
            o_bin = ((key - lo).to(tl.uint32, bitcast=True) >> shift).to(tl.int32)
            tl.atomic_add(p_counts + o_bin, 1, mask=m_word, sem="relaxed")
            word = word & (word - 1)
        slot += tl.sum(many)


@triton.jit
def _count_scores(
    p_table, p_counts, i_tensor, i_part, lo, width, shift,
    tensors, UNITS: tl.constexpr, TILE: tl.constexpr, ABS: tl.constexpr,
    WITHIN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Counts in bins of a chunk's scores with keys in [lo, lo + width]."""
    rows, k, channels, taps, row_units = _shape_of(p_table, i_tensor, tensors)
    p_scores = _pointer(p_table, 0, i_tensor, tl.float32, tensors)
    p_within = _pointer(p_table, 5 if WITHIN else 1, i_tensor, tl.int32, tensors)
    counts = tl.zeros([BINS], tl.int32)
    for i in range(0, UNITS, TILE):
        o_place = i * 64 + tl.arange(0, TILE * 64)
        o_unit = i_part * UNITS + o_place // 64
        o_score, m_score = _offset_of(o_unit, o_place % 64, k, channels, taps, row_units)
        m_score = m_score & (o_unit < rows * row_units)
        if WITHIN:
            word = tl.load(p_within + o_unit.to(tl.int64) * 2 + o_place % 64 // 32, mask=m_score)
            m_score = m_score & (((word >> (o_place % 32)) & 1) != 0)
        key = _rank_key(tl.load(p_scores + o_score, mask=m_score, other=0.0), ABS)
        distance = (key - lo).to(tl.uint32, bitcast=True)
        m_score = m_score & (key >= lo) & (distance <= width)
        counts += tl.histogram((distance >> shift).to(tl.int32), BINS, mask=m_score)
    o = tl.arange(0, BINS)
    tl.atomic_add(p_counts + o, counts, mask=counts != 0, sem="relaxed")


@triton.jit
def _first_level(p_table, p_group, i_group, tensors, ABS: tl.constexpr, failed):
    """Level 0: the band, or every key if it failed; the rank counts from its top."""
    lowest = -1 if ABS else _BELOW_ALL
    lo = tl.where(failed, lowest, tl.load(p_group + _LO))
    hi = tl.where(failed, _INFINITY, tl.load(p_group + _HI))
    lo = tl.maximum(lo, lowest)
    rank = _kept_of(p_table, i_group, tensors) - tl.where(failed, 0, tl.load(p_group + _ABOVE))
    return lo, hi - lo, rank


@triton.jit
def _count(
    p_table, p_groups, p_levels, p_counts, p_candidates, p_inside, p_keys, p_places,
    LEVEL: tl.constexpr, LAYERS: tl.constexpr, tensors, LANES: tl.constexpr,
    UNITS: tl.constexpr, TILE: tl.constexpr, ABS: tl.constexpr, WITHIN: tl.constexpr,
    BINS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: counts of one level, of candidates or, if the band failed, of scores."""
    i_chunk = tl.program_id(0)
    i_tensor, i_part = _chunk_range(p_table, i_chunk, tensors, LANES)
    i_group = i_tensor if LAYERS else 0
    p_group = p_groups + i_group * _RECORD
    single, ranked = _verdict(p_group, _kept_of(p_table, i_group, tensors))
    if single:
        return
    p_level = p_levels + (i_group * (LEVELS + 1) + LEVEL) * _LEVEL
    p_count = p_counts + (i_group * LEVELS + LEVEL) * BINS
    if LEVEL == 0:
        lo, width, rank = _first_level(p_table, p_group, i_group, tensors, ABS, ranked == 0)
    else:
        lo, width, rank = _narrow(p_level - _LEVEL, p_count - BINS, BINS)
    if i_part == 0 and (LAYERS or i_chunk == 0):
        _write_level(p_level, lo, width, rank)
    width = width.to(tl.uint32, bitcast=True)
    shift = _shift_of(width, BINS)
    room: tl.constexpr = UNITS * 64 // _ROOM
    p_keys += i_chunk.to(tl.int64) * room
    p_places += i_chunk.to(tl.int64) * room
    if ranked:
        if LEVEL == 0:
            _gather_chunk(
                p_table, p_candidates + i_chunk.to(tl.int64) * UNITS * 2, p_keys, p_places,
                p_count, i_tensor, i_part, lo, shift, tensors, UNITS, TILE, ABS,
            )  # fmt: skip
        else:
            for i in range(0, tl.load(p_inside + i_chunk), 128):
                o = i + tl.arange(0, 128)
                m_key = o < tl.load(p_inside + i_chunk)
                key = tl.load(p_keys + o, mask=m_key, other=0)
                distance = (key - lo).to(tl.uint32, bitcast=True)
                m_key = m_key & (key >= lo) & (distance <= width)
                o_bin = (distance >> shift).to(tl.int32)
                tl.atomic_add(p_count + o_bin, 1, mask=m_key, sem="relaxed")
    else:
        _count_scores(
            p_table, p_count, i_tensor, i_part, lo, width, shift,
            tensors, UNITS, TILE, ABS, WITHIN, BINS,
        )  # fmt: skip


# ------------------------------------------------ 4. the words with candidates
@triton.jit
def _settle_chunk(
    p_words, p_candidates, p_keys, p_places, inside, threshold,
):  # fmt: skip
    """Set the candidates above the threshold; ties alone stay candidates. Returns how many."""
    ties = 0
    for i in range(0, inside, 128):
        o = i + tl.arange(0, 128)
        m_key = o < inside
        key = tl.load(p_keys + o, mask=m_key, other=0)
        place = tl.load(p_places + o, mask=m_key, other=0)
        bit = tl.full([128], 1, tl.int32) << (place % 32)
        tl.atomic_or(p_words + place // 32, bit, mask=m_key & (key > threshold), sem="relaxed")
        tl.atomic_and(
            p_candidates + place // 32, ~bit, mask=m_key & (key != threshold), sem="relaxed"
        )
        ties += tl.sum((m_key & (key == threshold)).to(tl.int32))
    return ties


@triton.jit
def _settle(
    p_table, p_groups, p_levels, p_counts, p_state, p_candidates, p_inside, p_ties, p_keys,
    p_places, LAYERS: tl.constexpr, tensors, LANES: tl.constexpr,
    UNITS: tl.constexpr, TILE: tl.constexpr, ABS: tl.constexpr, WITHIN: tl.constexpr,
    RAGGED: tl.constexpr, BINS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: bits above the threshold, ties as the only candidates, the state."""
    i_chunk = tl.program_id(0)
    i_tensor, i_part = _chunk_range(p_table, i_chunk, tensors, LANES)
    i_group = i_tensor if LAYERS else 0
    p_group = p_groups + i_group * _RECORD
    kept = _kept_of(p_table, i_group, tensors)
    single, ranked = _verdict(p_group, kept)
    p_level = p_levels + (i_group * (LEVELS + 1) + LEVELS) * _LEVEL
    threshold, rank = tl.load(p_group + _LO), kept - tl.load(p_group + _ABOVE)
    if single == 0:
        p_count = p_counts + (i_group * LEVELS + LEVELS - 1) * BINS
        threshold, _, rank = _narrow(p_level - _LEVEL, p_count, BINS)
    threshold = tl.where(rank > 0, threshold, _LARGEST_KEY)
    if i_part == 0 and (LAYERS or i_chunk == 0):
        _write_level(p_level, threshold, 0, rank)
        lowest = tl.where(rank > 0, _bits_of(threshold, ABS), _INFINITY)
        tl.store(p_state + 2 * i_group, lowest)
        tl.store(p_state + 2 * i_group + 1, tl.load(p_group + _FLAGS) & 1)
    inside = tl.load(p_inside + i_chunk)
    p_candidates += i_chunk.to(tl.int64) * UNITS * 2
    if single:
        tl.store(p_ties + i_chunk, inside)
    elif ranked:
        room: tl.constexpr = UNITS * 64 // _ROOM
        p_words = _pointer(p_table, 1, i_tensor, tl.int32, tensors)
        ties = _settle_chunk(
            p_words + (i_part * UNITS).to(tl.int64) * 2, p_candidates,
            p_keys + i_chunk.to(tl.int64) * room, p_places + i_chunk.to(tl.int64) * room,
            inside, threshold,
        )  # fmt: skip
        tl.store(p_ties + i_chunk, ties)
    else:
        p_halves = p_candidates.to(tl.pointer_type(tl.int16))
        _, ties, _ = _emit_chunk(
            p_table, p_halves, i_tensor, i_part, threshold, threshold,
            tensors, UNITS, TILE, ABS, True, WITHIN, RAGGED,
        )  # fmt: skip
        tl.store(p_ties + i_chunk, ties)


# ------------------------------------------------ 5. ties
@triton.jit
def _lowest_bits(word, quota):
    """The lowest ``quota`` ones of each word."""
    chosen = tl.zeros_like(word)
    for i in range(tl.max(quota)):
        low = word & -word
        chosen = tl.where(i < quota, chosen | low, chosen)
        word = word ^ low
    return chosen


@triton.jit
def _grant(
    p_table, p_levels, p_candidates, p_ties,
    LAYERS: tl.constexpr, tensors, LANES: tl.constexpr, UNITS: tl.constexpr,
    TILE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: the ties that are kept, the first in the order of the words."""
    i_chunk = tl.program_id(0)
    ties = tl.load(p_ties + i_chunk)
    if ties == 0:
        return
    i_tensor, i_part = _chunk_range(p_table, i_chunk, tensors, LANES)
    i_group = i_tensor if LAYERS else 0
    rank = tl.load(p_levels + (i_group * (LEVELS + 1) + LEVELS) * _LEVEL + 2)
    before = 0
    for i in range(i_chunk - i_part if LAYERS else 0, i_chunk, 1024):
        o = i + tl.arange(0, 1024)
        before += tl.sum(tl.load(p_ties + o, mask=o < i_chunk, other=0))
    rows, _, _, _, row_units = _shape_of(p_table, i_tensor, tensors)
    quota = tl.minimum(rank - before, ties)
    if quota <= 0:
        return
    p_words = _pointer(p_table, 1, i_tensor, tl.int32, tensors)
    p_words += (i_part * UNITS).to(tl.int64) * 2
    p_candidates += i_chunk.to(tl.int64) * UNITS * 2
    left = (rows * row_units - i_part * UNITS) * 2
    for i in range(0, UNITS * 2, TILE * 2):
        o_word = i + tl.arange(0, TILE * 2)
        m_word = o_word < left
        tied = tl.load(p_candidates + o_word, mask=m_word, other=0)
        many = population(tied)
        earlier = tl.cumsum(many) - many
        share = tl.minimum(tl.maximum(quota - earlier, 0), many)
        if tl.sum(share) > 0:
            part = _lowest_bits(tied, tl.where(share == many, 0, share))
            chosen = tl.where(share == many, tied, part)
            word = tl.load(p_words + o_word, mask=m_word, other=0)
            tl.store(p_words + o_word, word | chosen, mask=m_word)
        quota -= tl.sum(many)


@triton.jit
def _regrant(
    p_table, p_levels, p_candidates, p_ties,
    LAYERS: tl.constexpr, tensors, UNITS: tl.constexpr, TILE: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """One program a tensor with taps: in the row where the ties ran out, those of lowest flat index
    instead of the first in the order of the words."""
    i_tensor = tl.program_id(0)
    i_group = i_tensor if LAYERS else 0
    taps = tl.load(p_table + 6 * tensors + i_tensor).to(tl.int32)
    if taps == 1:
        return
    rows, k, _, _, row_units = _shape_of(p_table, i_tensor, tensors)
    first = (tl.load(p_table + 4 * tensors + i_tensor) >> 32).to(tl.int32)
    chunks = (rows * row_units + UNITS - 1) // UNITS
    rank = tl.load(p_levels + (i_group * (LEVELS + 1) + LEVELS) * _LEVEL + 2)
    before = 0
    for i in range(first if LAYERS else 0, first, 1024):
        o = i + tl.arange(0, 1024)
        before += tl.sum(tl.load(p_ties + o, mask=o < first, other=0))
    # the chunk where they ran out: the first that has as many as are left, or more
    i_chunk, found = first, 0
    for i in range(chunks):
        ties = tl.load(p_ties + first + i)
        here = (found == 0) & (before + ties >= rank) & (ties > 0)
        i_chunk = tl.where(here, first + i, i_chunk)
        found = tl.where(here, 1, found)
        before += tl.where(found == 0, ties, 0)
    quota = rank - before
    if found == 0 or quota <= 0:
        return
    # the row: that of the quota-th tie
    p_candidates += first.to(tl.int64) * UNITS * 2
    i_word, seen = (i_chunk - first) * UNITS * 2, 0
    place = 0
    for i in range(0, UNITS * 2, TILE * 2):
        o_word = i_word + i + tl.arange(0, TILE * 2)
        many = population(tl.load(p_candidates + o_word))
        upto = seen + tl.cumsum(many)
        place += tl.sum((upto < quota).to(tl.int32))
        seen += tl.sum(many)
    i_row = (i_word + place) // (2 * row_units)
    p_tied = p_candidates + i_row.to(tl.int64) * row_units * 2
    p_words = _pointer(p_table, 1, i_tensor, tl.int32, tensors)
    p_words += i_row.to(tl.int64) * row_units * 2
    granted = 0
    for i in range(0, row_units * 2, TILE * 2):
        o_word = i + tl.arange(0, TILE * 2)
        m_word = o_word < row_units * 2
        tied = tl.load(p_tied + o_word, mask=m_word, other=0)
        word = tl.load(p_words + o_word, mask=m_word, other=0)
        granted += tl.sum(population(tied & word))
        tl.store(p_words + o_word, word & ~tied, mask=m_word)
    tl.debug_barrier()  # the words above are changed below by other threads
    channels = k // taps
    for i in range(0, k, TILE * 64):
        o = i + tl.arange(0, TILE * 64)
        o_k = (o % taps) * channels + o // taps
        m_k = o < k
        tied = (tl.load(p_tied + o_k // 32, mask=m_k, other=0) >> (o_k % 32)) & 1
        upto = tl.cumsum(tied)
        bit = tl.full([TILE * 64], 1, tl.int32) << (o_k % 32)
        m_chosen = m_k & (tied != 0) & (upto <= granted)
        tl.atomic_or(p_words + o_k // 32, bit, mask=m_chosen, sem="relaxed")
        granted -= tl.sum(tied)


# ------------------------------------------------ launches
def select_mask(
    scores: list[torch.Tensor],
    layouts: list[tuple[int, int, int, bool]],
    words: list[torch.Tensor],
    within: list[torch.Tensor] | None,
    kept: list[int],
    state: torch.Tensor | None,
    out: torch.Tensor,
    absolute: bool,
    together: bool,
    taken: torch.Tensor | None = None,
) -> None:
    """Fill ``words`` and the int32 state ``out`` ``[groups, 2]``; nothing waits for the device.

    ``scores``: fp32 in memory order, ``layouts``: (rows, channels, taps, whether memory order is
    canonical). ``words`` start at multiples of 16 bytes. ``together``: one group of all tensors and
    one entry in ``kept``. ``state``: of an earlier selection, or None. ``within``: whole words.
    ``taken``: a number on the device to keep fewer of all together. NaN is ranked as -inf and
    flagged.
    """
    groups, tensors, device = len(kept), len(scores), out.device
    total = sum(t.numel() for t in scores)
    if total >= 2**31:
        raise ValueError(f"select_mask: scores: got {total}, kernels take fewer than 2**31")
    if not groups:
        return
    scores = [aligned(t) for t in scores]
    within = None if within is None else [aligned(w) for w in within]
    sizes, counting = select_sizes(total, device)
    chunk, bins, levels = sizes.blocks["UNITS"], counting.blocks["BINS"], _levels(counting)
    chunks = [triton.cdiv(rows * triton.cdiv(c * s, 64), chunk) for rows, c, s, _ in layouts]
    table = _table(scores, layouts, words, within, kept, chunks, device)
    if taken is not None:
        table[4 * tensors : 4 * tensors + 1].sub_(taken).clamp_(min=0)
    everything, room = sum(chunks), chunk * 64 // _ROOM.value

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    records, ranges = ints(groups, _RECORD.value), ints(groups, levels + 1, _LEVEL.value)
    counts = ints(groups, levels, bins)
    candidates = ints(everything, chunk * 2)
    inside, ties = ints(everything), ints(everything)
    keys, places = ints(everything, room), ints(everything, room)
    many = {"tensors": tensors, "LANES": triton.next_power_of_2(tensors), "LAYERS": not together}
    tile = {**sizes.blocks, "num_warps": sizes.warps}
    kind = {"ABS": absolute, "WITHIN": within is not None}
    dense = [c * s % 64 == 0 and (s == 1 or canonical) for _, c, s, canonical in layouts]
    ragged = {"RAGGED": not all(dense)}
    cuts = {"BINS": bins, "LEVELS": levels}
    _bands[(groups,)](
        table, out if state is None else state, out, records, counts, total,
        tensors if together else 1, tensors=tensors, HINTED=state is not None, **kind,
        SAMPLE=_SAMPLE, COUNTS=levels * bins, num_warps=16,
    )  # fmt: skip
    if not everything:
        return
    grid = (everything,)
    halves = candidates.view(torch.int16)
    _pass[grid](table, records, halves, inside, **many, **tile, **kind, **ragged)
    for level in range(levels):
        _count[grid](
            table, records, ranges, counts, candidates, inside, keys, places,
            LEVEL=level, **many, UNITS=chunk, TILE=counting.blocks["TILE"], **kind, **cuts,
            num_warps=counting.warps,
        )  # fmt: skip
    _settle[grid](
        table, records, ranges, counts, out, candidates, inside, ties, keys, places,
        **many, **tile, **kind, **ragged, **cuts,
    )  # fmt: skip
    _grant[grid](table, ranges, candidates, ties, **many, **tile, LEVELS=levels)
    if any(s > 1 for _, _, s, _ in layouts):
        _regrant[(tensors,)](
            table, ranges, candidates, ties, LAYERS=not together, tensors=tensors, **tile,
            LEVELS=levels,
        )  # fmt: skip


def select_sizes(scores: int, device: torch.device) -> tuple[Sizes, Sizes]:
    """Configurations of the passes over all scores, and of the counting."""
    return tuned("select_mask", scores, device), tuned(_COUNTING, scores, device)


def _levels(counting: Sizes) -> int:
    """Countings until the bins of a level are single keys."""
    return triton.cdiv(32, counting.blocks["BINS"].bit_length() - 1)


def _table(scores, layouts, words, within, kept, chunks, device) -> torch.Tensor:
    """Columns of one entry a tensor, as the kernels above index them."""
    counts = [*kept, *[0] * (len(scores) - len(kept))]  # of a group, at its first tensor
    first = [sum(chunks[:i]) for i in range(len(chunks))]
    columns = [
        [t.data_ptr() for t in scores],
        [w.data_ptr() for w in words],
        [rows << 32 | c * s for rows, c, s, _ in layouts],
        [c << 32 | (1 if canonical else s) for _, c, s, canonical in layouts],
        [start << 32 | count for start, count in zip(first, counts, strict=True)],
        [w.data_ptr() for w in within or words],
        [s for _, _, s, _ in layouts],
    ]
    return device_table([value for column in columns for value in column], device)


_POINTERS = {
    **dict.fromkeys(("p_groups", "p_levels", "p_counts", "p_candidates", "p_inside"), "*i32"),
    **dict.fromkeys(("p_ties", "p_keys", "p_places", "p_hints", "p_state"), "*i32"),
    "p_table": "*i64",
    "total": "i32",
    "count": "i32",
    "tensors": "i32",
}
_CONSTANTS = {
    "LANES": 64,
    "LAYERS": True,
    "ABS": True,
    "WITHIN": False,
    "RAGGED": False,
    "HINTED": True,
    "SAMPLE": _SAMPLE,
    "LEVEL": 0,
}


def _variant(architecture, name, kernel, sizes, warps=None, ceiling=float("inf"), **constants):
    names = kernel.arg_names
    types = {n: t for n, t in _POINTERS.items() if n in names}
    if kernel is _pass:
        types["p_candidates"] = "*i16"
    blocks = {**sizes.blocks, **_CONSTANTS, **constants}
    elements = 64 * sizes.blocks["TILE"] if ceiling < float("inf") else 0
    return Variant(
        f"select_mask {name} {architecture}",
        kernel,
        types,
        {n: v for n, v in blocks.items() if n in names},
        warps or sizes.warps,
        unit="score",
        elements=elements,
        ceiling=ceiling,
        targets=targets_of(architecture),
    )


def _variants():
    """The passes of large lists and of small ones; all else once a GPU."""
    for architecture, _, counting in shipped(_COUNTING):
        bins, levels = counting.blocks["BINS"], _levels(counting)
        cuts = {"BINS": bins, "LEVELS": levels, "COUNTS": levels * bins}
        listed = [sizes for a, _, sizes in shipped("select_mask") if a == architecture]
        many = listed[-1]

        def made(name, kernel, sizes=many, architecture=architecture, cuts=cuts, **options):
            return _variant(architecture, name, kernel, sizes, **{**cuts, **options})

        yield made("pass", _pass, ceiling=20)
        yield from (made(f"pass {s.name}", _pass, s, ceiling=20) for s in listed[:-1])
        yield made("pass signed", _pass, ceiling=20, ABS=False)
        yield made("pass ragged", _pass, RAGGED=True)
        yield made("pass within", _pass, ceiling=24, WITHIN=True)
        yield made("bands", _bands, warps=16)
        yield made("bands sampled", _bands, warps=16, HINTED=False)
        yield made("bands within", _bands, warps=16, HINTED=False, WITHIN=True)
        count = counting._replace(blocks={**many.blocks, **counting.blocks})
        yield made("count", _count, count)
        yield made("count within", _count, count, WITHIN=True)
        yield made("count next", _count, count, LEVEL=1)
        yield made("settle", _settle)
        yield made("settle within", _settle, WITHIN=True, RAGGED=True)
        yield made("grant", _grant)
        yield made("regrant", _regrant)


VARIANTS = list(_variants())
