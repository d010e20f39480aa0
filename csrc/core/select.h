// Exact top-k in one pass: a bracket of keys that should hold the threshold comes from a sample or
// from the last selection; the pass writes the mask bits above it and lists the few words that have
// candidates inside it, with their keys; the rank left is found among those, and the words patched.
// A bracket of one key needs no keys: its candidates are ties. If the rank fell outside, the counts
// say on which side, and another bracket is tried.
#pragma once

#include "score_keys.h"

namespace st {
namespace {

constexpr int32_t kHintWidth = 1 << 15;  // keys around the last threshold tried first
constexpr int64_t kAhead = 2048;     // scores fetched early: the hardware stops at ends of pages
constexpr int kSampledBrackets = 2;  // then bisection, which no input can defeat

struct Bracket {
  int32_t lo, hi;  // inclusive
};

struct Nth {
  int32_t key;             // the rank-th largest, rank counted from 1
  int64_t greater, equal;  // eligible keys above it, and equal to it
};

inline int64_t units_of(const Layout& layout) { return layout.rows * (row_words(layout) / 2); }
inline bool in_order(const Scores& s) { return s.canonical || s.layout.taps == 1; }

struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int thread, int nthreads) {
  return {n * thread / nthreads, n * (thread + 1) / nthreads};
}
inline int64_t units_in(const Scores* scores, int64_t count) {
  int64_t units = 0;
  for (int64_t t = 0; t < count; ++t) units += units_of(scores[t].layout);
  return units;
}

// visit(row, unit, first element, elements) for stretches of at most `most` of a tensor's units
// [begin, end); one ends with its row where the row does not fill its last unit, or `by_row`.
template <typename Visit>
inline void each_run(const Layout& layout, int64_t begin, int64_t end, bool by_row, int64_t most,
                     const Visit& visit) {
  const int64_t columns = columns_of(layout), units = row_words(layout) / 2;
  by_row |= columns % 64 != 0;
  for (int64_t unit = begin; unit < end;) {
    const int64_t row = unit / units, row_end = by_row ? row * units + units : end;
    const int64_t stop = row_end < end ? row_end : end;
    const int64_t next = stop - unit < most ? stop : unit + most;
    const int64_t first = row * columns + (unit - row * units) * 64;
    const int64_t left = by_row ? (row + 1) * columns - first : (next - unit) * 64;
    visit(row, unit, first, left < (next - unit) * 64 ? left : (next - unit) * 64);
    unit = next;
  }
}

// visit(tensor, begin, end) for a thread's units of a list.
template <typename Visit>
inline void each_part(const Scores* scores, int64_t count, Range range, const Visit& visit) {
  int64_t before = 0;
  for (int64_t t = 0; t < count; before += units_of(scores[t++].layout)) {
    const int64_t units = units_of(scores[t].layout);
    const int64_t begin = range.begin - before, end = range.end - before;
    if (begin < units && end > 0) visit(t, begin > 0 ? begin : 0, end < units ? end : units);
  }
}

// ------------------------------------------------ the pass
// What one thread makes of its units.
struct Emitter {
  Bracket bracket;
  SelectUnit* units;
  int32_t *keys, *keys_end;
  int64_t above, inside;
  Lanes largest;
  bool collect, overflow;
};

inline Emitter emitter(Bracket bracket, const SelectScratch& scratch, int64_t first_unit,
                       int thread) {
  int32_t* const keys = scratch.keys + thread * (scratch.room + kSelectSlack);
  return {bracket,    scratch.units + first_unit, keys, keys + scratch.room, 0, 0,
          no_lanes(), bracket.lo < bracket.hi,    false};
}

// Up to 64 scores as lanes, zeros past the end.
inline void load_scores(const float* p, int64_t n, Lanes (&bits)[4]) {
  if (n >= 64) {
    for (int i = 0; i < 4; ++i) bits[i] = load_lanes(p + 16 * i);
    return;
  }
  uint32_t padded[64] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * 4);
  for (int i = 0; i < 4; ++i) bits[i] = load_lanes(padded + 16 * i);
}

// Words of n scores. `eligible` has a bit for every score that may be kept, or is null.
template <bool abs>
void emit(const float* p, int64_t n, const uint32_t* eligible, uint32_t* words, Emitter& e) {
  Emitter local = e;  // in registers
  for (; n > 0; n -= 64, p += 64, words += 2) {
    Lanes bits[4], keys[4];
    for (int i = 0; i < 4; ++i) __builtin_prefetch(p + kAhead + 16 * i, 0, 2);
    load_scores(p, n, bits);
    uint64_t definite = 0, short_of = 0;
    for (int i = 0; i < 4; ++i) {
      keys[i] = keys_of<abs>(bits[i]);
      local.largest = larger(local.largest, abs ? keys[i] : magnitude(keys[i]));
      definite |= static_cast<uint64_t>(above(keys[i], local.bracket.hi)) << (16 * i);
      short_of |= static_cast<uint64_t>(below(keys[i], local.bracket.lo)) << (16 * i);
    }
    uint64_t may = first_bits(n);
    if (eligible) {
      may &= load_unit(eligible);
      eligible += 2;
    }
    definite &= may;
    store_unit(words, definite);
    local.above += __builtin_popcountll(definite);
    const uint64_t inside = may & ~(definite | short_of);
    if (!inside) continue;
    local.inside += __builtin_popcountll(inside);
    *local.units++ = {words, inside};
    if (!local.collect) continue;
    for (int i = 0; i < 4; ++i)
      local.keys = append(keys[i], inside >> (16 * i) & 0xFFFF, local.keys);
    local.overflow |= local.keys > local.keys_end;
    local.collect &= !local.overflow;
  }
  e = local;
}

inline SelectPart part_of(const Emitter& e, const SelectScratch& scratch, int64_t first_unit) {
  return {e.above,    e.inside, e.units - (scratch.units + first_unit), holds_nan(e.largest),
          e.overflow, nullptr};
}

// For contiguous convolutions the pass works in memory order, so `within` has to be put in that
// order: into the words, which the pass then overwrites.
void order_within(const Scores& s, int nthreads) {
  if (!s.within || in_order(s)) return;
  const int64_t words = row_words(s.layout);
#pragma omp parallel for num_threads(nthreads) schedule(static)
  for (int64_t row = 0; row < s.layout.rows; ++row)
    reorder_row<false>(s.within + row * words, s.words + row * words, s.layout);
}

template <bool abs>
SelectPart pass_part(const Scores* scores, int64_t count, Range range, Bracket bracket,
                     const SelectScratch& scratch, int thread) {
  Emitter e = emitter(bracket, scratch, range.begin, thread);
  each_part(scores, count, range, [&](int64_t t, int64_t begin, int64_t end) {
    const Scores s = scores[t];
    const uint32_t* const eligible = s.within && !in_order(s) ? s.words : s.within;
    each_run(s.layout, begin, end, false, units_of(s.layout),
             [&](int64_t, int64_t unit, int64_t first, int64_t n) {
               emit<abs>(s.data + first, n, eligible ? eligible + 2 * unit : nullptr,
                         s.words + 2 * unit, e);
             });
  });
  return part_of(e, scratch, range.begin);
}

template <bool abs>
void pass(const Scores* scores, int64_t count, Bracket bracket, const SelectScratch& scratch,
          int nthreads) {
  for (int64_t t = 0; t < count; ++t) order_within(scores[t], nthreads);
  const int64_t units = units_in(scores, count);
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
  for (int thread = 0; thread < nthreads; ++thread)
    scratch.parts[thread] =
        pass_part<abs>(scores, count, share(units, thread, nthreads), bracket, scratch, thread);
}

inline SelectPart total_of(const SelectPart* parts, int nthreads) {
  SelectPart total{};
  for (int i = 0; i < nthreads; ++i) {
    total.above += parts[i].above;
    total.inside += parts[i].inside;
    total.nan |= parts[i].nan;
    total.overflow |= parts[i].overflow;
  }
  return total;
}

// ------------------------------------------------ the rank among the candidates
struct Keys {
  const int32_t* data;
  int64_t count;
};
inline Keys keys_of_thread(const SelectScratch& scratch, int thread) {
  return {scratch.keys + thread * (scratch.room + kSelectSlack), scratch.parts[thread].inside};
}

// Counts in 2^shift wide bins of the keys in [lo, hi]; `all`: they all are.
inline void count_keys(Keys keys, Bracket range, int shift, bool all, int64_t* ST_RESTRICT counts) {
  for (int64_t i = 0; i < kSelectBins; ++i) counts[i] = 0;
  const auto bin = [&](int32_t key) {
    return (static_cast<uint32_t>(key) - static_cast<uint32_t>(range.lo)) >> shift;
  };
  if (all) {
    for (int64_t i = 0; i < keys.count; ++i) ++counts[bin(keys.data[i])];
    return;
  }
  for (int64_t i = 0; i < keys.count; i += 16) {
    const Lanes lanes = load_lanes(keys.data + i);
    const uint32_t outside = below(lanes, range.lo) | above(lanes, range.hi);
    uint32_t bits = ~outside & static_cast<uint32_t>(first_bits(keys.count - i)) & 0xFFFF;
    for (; bits; bits &= bits - 1) ++counts[bin(keys.data[i + __builtin_ctz(bits)])];
  }
}

// The rank-th largest of the collected keys by histograms that narrow [lo, hi].
Nth nth_of_candidates(Bracket range, int64_t rank, const SelectScratch& scratch, int nthreads) {
  int64_t greater = 0;
  for (bool all = true;; all = false) {
    const uint32_t width = static_cast<uint32_t>(range.hi) - static_cast<uint32_t>(range.lo);
    int shift = 0;
    while (width >> shift >= kSelectBins) ++shift;
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
    for (int thread = 0; thread < nthreads; ++thread)
      count_keys(keys_of_thread(scratch, thread), range, shift, all,
                 scratch.counts + thread * kSelectBins);
    for (int thread = 1; thread < nthreads; ++thread)
      for (int64_t i = 0; i < kSelectBins; ++i)
        scratch.counts[i] += scratch.counts[thread * kSelectBins + i];
    int64_t bin = kSelectBins - 1;
    for (; bin > 0 && scratch.counts[bin] < rank; --bin) {
      rank -= scratch.counts[bin];
      greater += scratch.counts[bin];
    }
    range.lo = static_cast<int32_t>(static_cast<uint32_t>(range.lo) +
                                    (static_cast<uint32_t>(bin) << shift));
    if (shift == 0) return {range.lo, greater, scratch.counts[bin]};
    const int64_t last = range.lo + (int64_t{1} << shift) - 1;
    range.hi = last < range.hi ? static_cast<int32_t>(last) : range.hi;
  }
}

// ------------------------------------------------ the words with candidates
// Add the candidates above the threshold and the first `ties` of those equal to it; returns the
// first words of which a tie was left out.
inline uint32_t* patch_part(const SelectUnit* units, int64_t count, const int32_t* keys,
                            bool one_key, int32_t threshold, int64_t ties) {
  uint32_t* refused = nullptr;
  for (int64_t u = 0; u < count; ++u) {
    const uint64_t places = units[u].candidates;
    const int n = __builtin_popcountll(places);
    uint64_t chosen = 0, equal = first_bits(n);
    if (!one_key) {
      uint64_t lower = 0;
      for (int i = 0; i < n; i += 16) {
        const Lanes lanes = load_lanes(keys + i);
        chosen |= static_cast<uint64_t>(above(lanes, threshold)) << i;
        lower |= static_cast<uint64_t>(below(lanes, threshold)) << i;
      }
      keys += n;
      chosen &= equal;
      equal &= ~(chosen | lower);
    }
    const int64_t tied = __builtin_popcountll(equal);
    if (tied > ties) {
      refused = refused ? refused : units[u].words;
      equal = spread_bits(first_bits(ties), equal);
    }
    ties -= tied < ties ? tied : ties;
    const uint64_t bits = spread_bits(chosen | equal, places);
    if (bits) store_unit(units[u].words, load_unit(units[u].words) | bits);
  }
  return refused;
}

inline int64_t count_equal(Keys keys, int32_t key) {
  int64_t equal = 0;
  for (int64_t i = 0; i < keys.count; i += 16) {
    const Lanes lanes = load_lanes(keys.data + i);
    const uint32_t others = below(lanes, key) | above(lanes, key);
    equal += __builtin_popcountll(~others & first_bits(keys.count - i) & 0xFFFF);
  }
  return equal;
}

// Returns the first words of which a tie was left out, in memory order.
uint32_t* patch(const Scores* scores, int64_t count, bool one_key, Nth nth, int64_t ties,
                const SelectScratch& scratch, int nthreads) {
  const int64_t units = units_in(scores, count);
  const bool partial = ties < nth.equal;
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
  for (int thread = 0; thread < nthreads; ++thread) {
    int64_t before = 0;  // ties of the threads in front
    for (int i = 0; partial && i < thread; ++i)
      before +=
          one_key ? scratch.parts[i].inside : count_equal(keys_of_thread(scratch, i), nth.key);
    scratch.parts[thread].refused = patch_part(
        scratch.units + share(units, thread, nthreads).begin, scratch.parts[thread].units,
        keys_of_thread(scratch, thread).data, one_key, nth.key, ties > before ? ties - before : 0);
  }
  for (int thread = 0; thread < nthreads; ++thread)
    if (scratch.parts[thread].refused) return scratch.parts[thread].refused;
  return nullptr;
}

// Channels-last convolutions: the pass granted ties in memory order. Only the row where they ran
// out can differ from torch's order; give the same number of them to its first logical columns.
template <bool abs>
void regrant_ties(const Scores& s, int64_t row, int32_t threshold) {
  const Layout& layout = s.layout;
  const int64_t columns = columns_of(layout), words = row * row_words(layout);
  const float* const scores = s.data + row * columns;
  const auto tied = [&](int64_t k) {
    const bool may = !s.within || (s.within[words + (k >> 5)] >> (k & 31) & 1);
    return may && key_of<abs>(scores[k]) == threshold;
  };
  int64_t granted = 0;
  for (int64_t k = 0; k < columns; ++k) {
    uint32_t& word = s.words[words + (k >> 5)];
    if (!tied(k)) continue;
    granted += word >> (k & 31) & 1;
    word &= ~(1u << (k & 31));
  }
  for (int64_t column = 0; column < columns && granted; ++column) {
    const int64_t k = (column % layout.taps) * layout.channels + column / layout.taps;
    if (!tied(k)) continue;
    s.words[words + (k >> 5)] |= 1u << (k & 31);
    --granted;
  }
}

// Contiguous convolutions: from memory order to canonical order.
void order_words(const Scores& s, const SelectScratch& scratch, int nthreads) {
  if (in_order(s)) return;
  const int64_t words = row_words(s.layout);
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
  for (int thread = 0; thread < nthreads; ++thread) {
    uint32_t* const memory = scratch.row + thread * scratch.row_words;
    const Range rows = share(s.layout.rows, thread, nthreads);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      std::memcpy(memory, s.words + row * words, static_cast<size_t>(words) * 4);
      reorder_row<true>(memory, s.words + row * words, s.layout);
    }
  }
}

// After a pass whose bracket held the rank.
template <bool abs>
Selection finish(const Scores* scores, int64_t count, int64_t kept, Bracket bracket,
                 const SelectScratch& scratch, int nthreads) {
  const SelectPart total = total_of(scratch.parts, nthreads);
  const bool one_key = bracket.lo == bracket.hi;
  Nth nth{bracket.lo, 0, total.inside};
  if (!one_key) nth = nth_of_candidates(bracket, kept - total.above, scratch, nthreads);
  const int64_t ties = kept - total.above - nth.greater;
  const uint32_t* const refused = patch(scores, count, one_key, nth, ties, scratch, nthreads);
  for (int64_t t = 0; t < count; ++t) {
    const Scores& s = scores[t];
    const int64_t words = row_words(s.layout), at = refused ? refused - s.words : -1;
    if (at >= 0 && at < s.layout.rows * words && s.canonical && s.layout.taps > 1)
      regrant_ties<abs>(s, at / words, nth.key);
    order_words(s, scratch, nthreads);
  }
  return {bits_of_key(nth.key), false};
}

// ------------------------------------------------ brackets
// What earlier passes and a sorted sample say about where the threshold is.
struct Search {
  const int32_t* samples;  // ascending
  int64_t sampled;
  int64_t eligible, kept, room;
  int32_t lowest, highest;  // it lies in this window
};

inline int64_t samples_below(const Search& search, int64_t key) {
  int64_t begin = 0, end = search.sampled;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (search.samples[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// Three sigma of the sample's rank around it: misses with a chance of 0.3 %, then four times as
// wide. One key alone if all of them were sampled, or if so many are equal that candidates would
// not fit.
Bracket sampled_bracket(const Search& search, int attempt) {
  const int64_t m = search.sampled;
  if (m == search.eligible) {
    const int32_t key = search.samples[m - search.kept];
    return {key, key};
  }
  const double part = static_cast<double>(search.kept) / static_cast<double>(search.eligible);
  const double centre = part * static_cast<double>(m), spread = 9.0 * centre * (1.0 - part);
  int64_t radius = 2;
  while (static_cast<double>(radius - 2) * static_cast<double>(radius - 2) < spread) ++radius;
  radius <<= 2 * attempt;
  const int64_t middle = m - static_cast<int64_t>(centre);  // index in ascending order
  int32_t lo = middle < radius ? kLowestKey : search.samples[middle - radius];
  int32_t hi = middle + radius >= m ? kHighestKey : search.samples[middle + radius];
  lo = lo > search.lowest ? lo : search.lowest;
  hi = hi < search.highest ? hi : search.highest;
  if (lo > hi) return {search.lowest, search.highest};
  const int64_t first = samples_below(search, lo);
  const int64_t last = samples_below(search, int64_t{hi} + 1);
  if (last - first <= 1 || (last - first) * (search.eligible / m) <= search.room) return {lo, hi};
  const int64_t at = middle < first ? first : middle < last ? middle : last - 1;
  return {search.samples[at], search.samples[at]};
}

inline bool may_keep(const Scores& s, int64_t element) {
  const int64_t columns = columns_of(s.layout), row = element / columns;
  int64_t k = element - row * columns;
  if (!in_order(s)) k = k % s.layout.taps * s.layout.channels + k / s.layout.taps;
  return s.within[row * row_words(s.layout) + (k >> 5)] >> (k & 31) & 1;
}

// Fixed pseudo-random positions, one in every stretch of the whole list, four neighbours at each
// (what a sample costs is the cache miss); every score if there are few. Returns how many were
// eligible.
template <bool abs>
int64_t sample(const Scores* scores, int64_t count, int32_t* ST_RESTRICT samples) {
  const auto elements = [](const Scores& s) { return s.layout.rows * columns_of(s.layout); };
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) total += elements(scores[t]);
  const int64_t wanted = total <= 4096       ? total
                         : total < 131072    ? 1024
                         : total < (1 << 22) ? 4096
                         : total < (1 << 25) ? 16384
                                             : kSelectSamples;
  const int64_t run = total <= 4096 ? 1 : 4, runs = wanted / run;
  const int64_t stretch = (total << 24) / runs;  // 40.24 bits
  int64_t taken = 0, tensor = 0, before = 0, after = elements(scores[0]);
  uint64_t jitter = 0x9E3779B97F4A7C15u;
  for (int64_t i = 0; i < runs; ++i) {
    jitter = jitter * 6364136223846793005u + 1442695040888963407u;
    const int64_t offset = static_cast<int64_t>(jitter >> 40) * (stretch >> 24);
    const int64_t at = (i * stretch + offset) >> 24;
    while (at >= after) {
      before = after;
      after += elements(scores[++tensor]);
    }
    const Scores& s = scores[tensor];
    for (int64_t j = at; j < at + run && j < after; ++j)
      if (!s.within || may_keep(s, j - before)) samples[taken++] = key_of<abs>(s.data[j - before]);
  }
  return taken;
}

// Radix sort, 11 bits at a time, between the two halves of the scratch; returns the sorted half.
const int32_t* sort_samples(const SelectScratch& scratch, int64_t n) {
  int32_t *from = scratch.samples, *to = scratch.samples + kSelectSamples;
  for (int shift = 0; shift < 32; shift += 11) {
    const auto digit = [&](int32_t key) {
      return (static_cast<uint32_t>(key) ^ 0x80000000u) >> shift & (kSelectBins - 1);
    };
    for (int64_t i = 0; i < kSelectBins; ++i) scratch.counts[i] = 0;
    for (int64_t i = 0; i < n; ++i) ++scratch.counts[digit(from[i])];
    int64_t before = 0;
    for (int64_t i = 0; i < kSelectBins; ++i) {
      const int64_t here = scratch.counts[i];
      scratch.counts[i] = before;
      before += here;
    }
    for (int64_t i = 0; i < n; ++i) to[scratch.counts[digit(from[i])]++] = from[i];
    int32_t* const sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

inline Bracket hinted_bracket(uint32_t hint, bool abs) {
  const int64_t key = abs ? key_of_bits<true>(hint) : key_of_bits<false>(hint);
  const int64_t lo = key - kHintWidth, hi = key + kHintWidth;
  return {lo < kLowestKey ? kLowestKey : static_cast<int32_t>(lo),
          hi > kHighestKey ? kHighestKey : static_cast<int32_t>(hi)};
}

// What a finished pass means: done, or the window is narrower.
enum class Verdict { nan, held, missed, crowded };

inline Verdict judge(const SelectPart& total, int64_t kept, Bracket bracket, Search& search) {
  if (total.nan) return Verdict::nan;
  if (kept <= total.above) {
    search.lowest = bracket.hi + 1;
    return Verdict::missed;
  }
  if (kept > total.above + total.inside) {
    search.highest = bracket.lo - 1;
    return Verdict::missed;
  }
  search.lowest = bracket.lo;
  search.highest = bracket.hi;
  return total.overflow ? Verdict::crowded : Verdict::held;
}

template <bool abs>
Selection select_list(const Scores* scores, int64_t count, int64_t eligible, int64_t kept,
                      uint32_t hint, const SelectScratch& scratch, int nthreads) {
  if (kept == 0) {
    pass<abs>(scores, count, {kHighestKey, kHighestKey}, scratch, nthreads);
    return {kInfinityKey, total_of(scratch.parts, nthreads).nan};
  }
  Search search{nullptr, 0, eligible, kept, scratch.room, kLowestKey, kHighestKey};
  bool hinted = hint != 0;
  for (int attempt = 0;; ++attempt) {
    Bracket bracket;
    if (hinted) {
      bracket = hinted_bracket(hint, abs);
    } else if (attempt < kSampledBrackets) {
      if (!search.samples) {
        search.sampled = sample<abs>(scores, count, scratch.samples);
        search.samples = sort_samples(scratch, search.sampled);
      }
      bracket = sampled_bracket(search, attempt);
    } else {
      const int64_t width = int64_t{search.highest} - search.lowest;
      bracket = {static_cast<int32_t>(search.lowest + (width + 1) / 2), search.highest};
    }
    pass<abs>(scores, count, bracket, scratch, nthreads);
    const Verdict verdict = judge(total_of(scratch.parts, nthreads), kept, bracket, search);
    if (verdict == Verdict::nan) return {0, true};
    if (verdict == Verdict::held)
      return finish<abs>(scores, count, kept, bracket, scratch, nthreads);
    if (hinted)
      attempt = -1;
    else if (verdict == Verdict::crowded)
      attempt = kSampledBrackets;
    hinted = false;
  }
}

}  // namespace
}  // namespace st
