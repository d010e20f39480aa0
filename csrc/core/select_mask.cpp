// Exact top-k: bracket the threshold from a sample (or the last one), count and collect in one
// pass, finish by radix select on the few keys inside the bracket, then pack the mask in a second
// pass. Keys are uint32 in the order of the scores, 0 = not eligible.
#include "core.h"
#include "simd.h"

namespace st::ST_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kNoKey = 0xFFFFFFFFu;
constexpr int64_t kBlock = 1024;
constexpr uint32_t kHintWidth = 1u << 15;  // ulps around the last threshold tried first

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

template <bool abs>
inline uint32_t key_of(float score) {
  if (abs) return (bits_of(score) & 0x7FFFFFFFu) + 1;
  // -0 ranks as +0. Integers only: an addition would flush denormals where the thread asks for it.
  const uint32_t bits = bits_of(score) == 0x80000000u ? 0 : bits_of(score);
  return (bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u)) + 1;
}

template <bool abs>
inline float score_of(uint32_t key) {
  const uint32_t bits = key - 1;
  const uint32_t out = abs ? bits : bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
  float score;
  std::memcpy(&score, &out, 4);
  return score;
}

// Keys of elements [first, first + n) of a tensor, n <= kBlock. Returns whether a NaN is among
// them.
template <bool abs>
inline bool load_keys(const Scores& scores, int64_t first, int64_t n, uint32_t* ST_RESTRICT keys) {
  const float* const ST_RESTRICT p = scores.data + first;
  uint32_t nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = key_of<abs>(p[i]);
    nan |= (bits_of(p[i]) & 0x7FFFFFFFu) > kInfinity;
  }
  if (scores.eligible)
    for (int64_t i = 0; i < n; ++i) keys[i] = scores.eligible[first + i] ? keys[i] : 0;
  return nan != 0;
}

inline int64_t numel(const Scores& s) { return s.layout.rows * columns_of(s.layout); }

// Blocks of one tensor, in order; visit(keys, n).
template <bool abs, typename Visit>
inline bool each_block(const Scores& scores, int64_t begin, int64_t end, const Visit& visit) {
  uint32_t keys[kBlock];
  bool nan = false;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    nan |= load_keys<abs>(scores, first, n, keys);
    for (int64_t i = n; i % 16; ++i) keys[i] = 0;
    visit(keys, n);
  }
  return nan;
}

struct Nth {
  uint32_t key;            // the rank-th largest, rank counted from 1
  int64_t greater, equal;  // eligible keys above it, and equal to it
};

// Walk a histogram from the top to the bin that holds the rank-th largest; rank becomes its rank
// there.
inline int64_t find_bin(const int64_t* ST_RESTRICT counts, int64_t& rank, int64_t& greater) {
  int64_t bin = kSelectBins - 1;
  for (; bin > 0 && counts[bin] < rank; --bin) rank -= counts[bin], greater += counts[bin];
  return bin;
}

// Radix select, 11 + 11 + 10 bits from the top. sweep(prefix_shift, prefix, shift, mask) fills
// counts.
template <typename Sweep>
inline Nth radix(int64_t rank, int64_t* ST_RESTRICT counts, const Sweep& sweep) {
  uint32_t prefix = 0;
  int64_t greater = 0;
  const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
  for (int pass = 0; pass < 3; ++pass) {
    sweep(shifts[pass] + widths[pass], prefix, shifts[pass], (1u << widths[pass]) - 1);
    const int64_t bin = find_bin(counts, rank, greater);
    prefix = (prefix << widths[pass]) | static_cast<uint32_t>(bin);
    if (pass == 2) return {prefix, greater, counts[bin]};
  }
  return {};
}

inline bool in_prefix(uint32_t key, int prefix_shift, uint32_t prefix) {
  return prefix_shift == 32 || key >> prefix_shift == prefix;
}

Nth nth_of_array(const uint32_t* ST_RESTRICT keys, int64_t n, int64_t rank,
                 int64_t* ST_RESTRICT counts) {
  return radix(rank, counts, [&](int prefix_shift, uint32_t prefix, int shift, uint32_t mask) {
    for (int64_t i = 0; i < kSelectBins; ++i) counts[i] = 0;
    for (int64_t i = 0; i < n; ++i)
      counts[keys[i] >> shift & mask] += in_prefix(keys[i], prefix_shift, prefix);
  });
}

struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int thread, int nthreads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t begin = blocks * thread / nthreads * kBlock, end = blocks * (thread + 1) / nthreads;
  return {begin, end * kBlock < n ? end * kBlock : n};
}

// Radix select over the tensors themselves: three passes, for inputs a bracket cannot hold.
template <bool abs>
Nth nth_of_scores(const Scores* scores, int64_t count, int64_t rank, int64_t* ST_RESTRICT counts,
                  int nthreads) {
  return radix(rank, counts, [&](int prefix_shift, uint32_t prefix, int shift, uint32_t mask) {
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
    for (int thread = 0; thread < nthreads; ++thread) {
      int64_t* const mine = counts + thread * kSelectBins;
      for (int64_t i = 0; i < kSelectBins; ++i) mine[i] = 0;
      for (int64_t t = 0; t < count; ++t) {
        const Range range = share(numel(scores[t]), thread, nthreads);
        each_block<abs>(scores[t], range.begin, range.end, [&](const uint32_t* keys, int64_t n) {
          for (int64_t i = 0; i < n; ++i)
            mine[keys[i] >> shift & mask] +=
                keys[i] != 0 && in_prefix(keys[i], prefix_shift, prefix);
        });
      }
    }
    for (int thread = 1; thread < nthreads; ++thread)
      for (int64_t i = 0; i < kSelectBins; ++i) counts[i] += counts[thread * kSelectBins + i];
  });
}

struct Bracket {
  uint32_t lo, hi;  // inclusive
};

// Fixed pseudo-random positions, one in every stretch of the whole list.
template <bool abs>
int64_t sample(const Scores* scores, int64_t count, uint32_t* ST_RESTRICT samples) {
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) total += numel(scores[t]);
  const int64_t wanted = total < 131072 ? 1024 : total < (1 << 22) ? 4096 : kSelectSamples;
  const int64_t stretch = total / wanted > 1 ? total / wanted : 1;
  int64_t taken = 0, tensor = 0, before = 0;
  uint64_t jitter = 0x9E3779B97F4A7C15u;
  for (int64_t first = 0; first < total && taken < kSelectSamples; first += stretch) {
    jitter = jitter * 6364136223846793005u + 1442695040888963407u;
    int64_t at = first + static_cast<int64_t>((jitter >> 33) % static_cast<uint64_t>(stretch));
    at = at < total ? at : total - 1;
    while (at - before >= numel(scores[tensor])) before += numel(scores[tensor++]);
    uint32_t key;
    load_keys<abs>(scores[tensor], at - before, 1, &key);
    if (key) samples[taken++] = key;
  }
  return taken;
}

// Keys that hold the kept-th largest but for a chance of 6e-5 (4 sigma of the sample's rank).
template <bool abs>
Bracket sampled_bracket(const Scores* scores, int64_t count, int64_t eligible, int64_t kept,
                        SelectScratch scratch) {
  const int64_t m = sample<abs>(scores, count, scratch.samples);
  const double p = static_cast<double>(kept) / static_cast<double>(eligible);
  const double centre = p * static_cast<double>(m), spread = 16.0 * centre * (1.0 - p);
  int64_t radius = 2;
  while (static_cast<double>(radius - 2) * static_cast<double>(radius - 2) < spread) ++radius;
  const int64_t above = static_cast<int64_t>(centre) - radius;
  const int64_t below = static_cast<int64_t>(centre) + radius;
  const auto at = [&](int64_t rank) {
    return nth_of_array(scratch.samples, m, rank, scratch.counts).key;
  };
  return {below > m ? 1 : at(below), above < 1 ? kNoKey : at(above)};
}

// Count keys above the bracket and collect those inside; false if the bracket does not hold the
// rank or its keys overflow the scratch.
template <bool abs>
bool nth_in_bracket(const Scores* scores, int64_t count, int64_t rank, Bracket bracket,
                    SelectScratch scratch, int nthreads, Nth* found, bool* nan) {
  const int64_t room = scratch.capacity / nthreads;
  int64_t above = 0, overflow = 0, nans = 0;
#pragma omp parallel for num_threads(nthreads) schedule(static, 1) \
    reduction(+ : above, overflow, nans)
  for (int thread = 0; thread < nthreads; ++thread) {
    uint32_t* const mine = scratch.candidates + thread * room;
    int64_t taken = 0, over = 0;
    const uint32_t width = bracket.hi - bracket.lo;
    for (int64_t t = 0; t < count; ++t) {
      const Range range = share(numel(scores[t]), thread, nthreads);
      nans +=
          each_block<abs>(scores[t], range.begin, range.end, [&](const uint32_t* keys, int64_t n) {
            if (room - taken < n) {  // too many ties for a bracket
              overflow += 1;
              return;
            }
            uint32_t greater = 0;
            for (int64_t i = 0; i < n; ++i) greater += keys[i] > bracket.hi;
            over += greater;
            for (int64_t i = 0; i < n;
                 i += 16)  // load_keys pads the block with keys that are not eligible
              for (uint32_t bits = in_range(keys + i, bracket.lo, width); bits; bits &= bits - 1)
                mine[taken++] = keys[i + __builtin_ctz(bits)];
          });
    }
    scratch.counts[thread * kSelectBins] = taken;
    above += over;
  }
  *nan |= nans != 0;
  if (overflow) return false;
  int64_t inside = 0;
  for (int thread = 0; thread < nthreads; ++thread) {
    const int64_t taken = scratch.counts[thread * kSelectBins];
    const uint32_t* const mine = scratch.candidates + thread * room;
    for (int64_t i = 0; i < taken; ++i) scratch.candidates[inside++] = mine[i];
  }
  if (above >= rank || above + inside < rank) return false;
  *found = nth_of_array(scratch.candidates, inside, rank - above, scratch.counts);
  found->greater += above;
  return true;
}

// Where ties stop being kept: rows before `row` of tensor `tensor` keep them, in that row those
// with logical column <= `column`, later rows do not.
struct TieEnd {
  int64_t tensor, row, column;
};

// Memory offset in its row of torch's logical column.
inline int64_t memory_column(const Scores& s, int64_t logical) {
  if (!s.canonical || s.layout.taps == 1) return logical;
  return (logical % s.layout.taps) * s.layout.channels + logical / s.layout.taps;
}

template <bool abs>
TieEnd find_tie_end(const Scores* scores, int64_t count, uint32_t threshold, int64_t ties) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t columns = columns_of(scores[t].layout);
    for (int64_t row = 0; row < scores[t].layout.rows; ++row) {
      int64_t here = 0;
      each_block<abs>(scores[t], row * columns, (row + 1) * columns,
                      [&](const uint32_t* keys, int64_t n) {
                        for (int64_t i = 0; i < n; ++i) here += keys[i] == threshold;
                      });
      if (here < ties) {
        ties -= here;
        continue;
      }
      for (int64_t column = 0; column < columns; ++column) {
        uint32_t key;
        load_keys<abs>(scores[t], row * columns + memory_column(scores[t], column), 1, &key);
        ties -= key == threshold;
        if (ties == 0) return {t, row, column};
      }
    }
  }
  return {count, 0, 0};
}

// Bits of n <= 32 consecutive scores whose key is >= least.
template <bool abs>
inline uint32_t at_least(const float* ST_RESTRICT p, int64_t n, uint32_t least) {
#if defined(__AVX512F__)
  if (n == 32) {
    uint32_t out = 0;
    for (int half = 0; half < 2; ++half) {
      __m512i key;
      if (abs) {
        key = _mm512_and_si512(_mm512_loadu_si512(p + 16 * half), _mm512_set1_epi32(0x7FFFFFFF));
      } else {
        const __m512i raw = _mm512_loadu_si512(p + 16 * half);
        const __m512i bits = _mm512_maskz_mov_epi32(
            _mm512_cmpneq_epi32_mask(raw, _mm512_set1_epi32(INT32_MIN)), raw);
        key = _mm512_xor_si512(
            bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN)));
      }
      const uint32_t mask = _mm512_cmpge_epu32_mask(_mm512_add_epi32(key, _mm512_set1_epi32(1)),
                                                    _mm512_set1_epi32(static_cast<int>(least)));
      out |= mask << (16 * half);
    }
    return out;
  }
#elif defined(__AVX2__)
  if (n == 32) {
    // unsigned compare through a sign flip; >= least is > least - 1, and least >= 1
    const __m256i flip = _mm256_set1_epi32(INT32_MIN);
    const __m256i bound = _mm256_set1_epi32(static_cast<int>((least - 1) ^ 0x80000000u));
    uint32_t out = 0;
    for (int part = 0; part < 4; ++part) {
      __m256i key;
      if (abs) {
        key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * part)),
                               _mm256_set1_epi32(0x7FFFFFFF));
      } else {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * part));
        const __m256i bits = _mm256_andnot_si256(_mm256_cmpeq_epi32(raw, flip), raw);
        key = _mm256_xor_si256(bits, _mm256_or_si256(_mm256_srai_epi32(bits, 31), flip));
      }
      key = _mm256_xor_si256(_mm256_add_epi32(key, _mm256_set1_epi32(1)), flip);
      out |= static_cast<uint32_t>(
                 _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, bound))))
             << (8 * part);
    }
    return out;
  }
#endif
  uint32_t out = 0;
  for (int64_t i = 0; i < n; ++i) out |= static_cast<uint32_t>(key_of<abs>(p[i]) >= least) << i;
  return out;
}

template <bool abs>
void pack_row(const Scores& s, int64_t row, uint32_t least) {
  const int64_t columns = columns_of(s.layout), words_a_row = row_words(s.layout);
  const float* const p = s.data + row * columns;
  uint32_t* const out = s.words + row * words_a_row;
  const bool ordered = s.canonical || s.layout.taps == 1;
  int64_t tap = 0, channel = 0;
  for (int64_t w = 0; w < words_a_row; ++w) {
    const int64_t left = columns - 32 * w, n = left < 0 ? 0 : left < 32 ? left : 32;
    uint32_t bits = 0;
    if (ordered) {
      bits = at_least<abs>(p + 32 * w, n, least);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const float score = p[channel * s.layout.taps + tap];
        bits |= static_cast<uint32_t>(key_of<abs>(score) >= least) << i;
        if (++channel == s.layout.channels) channel = 0, ++tap;
      }
    }
    out[w] = s.within ? bits & s.within[row * words_a_row + w] : bits;
  }
}

// The row where ties end: least = threshold would keep them all; drop those past `column`.
template <bool abs>
void pack_tie_row(const Scores& s, int64_t row, uint32_t threshold, int64_t last) {
  pack_row<abs>(s, row, threshold);
  const Layout& layout = s.layout;
  for (int64_t column = last + 1; column < columns_of(layout); ++column) {
    const float score = s.data[row * columns_of(layout) + memory_column(s, column)];
    if (key_of<abs>(score) != threshold) continue;
    const int64_t k = (column % layout.taps) * layout.channels + column / layout.taps;
    s.words[row * row_words(layout) + (k >> 5)] &= ~(1u << (k & 31));
  }
}

template <bool abs>
void pack(const Scores* scores, int64_t count, uint32_t threshold, TieEnd end, int nthreads) {
  for (int64_t t = 0; t < count; ++t) {
    const int threads = threads_for(numel(scores[t]), nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < scores[t].layout.rows; ++row) {
      const bool before = t < end.tensor || (t == end.tensor && row < end.row);
      if (t == end.tensor && row == end.row)
        pack_tie_row<abs>(scores[t], row, threshold, end.column);
      else
        pack_row<abs>(scores[t], row, before || threshold == kNoKey ? threshold : threshold + 1);
    }
  }
}

template <bool abs>
bool has_nan(const Scores* scores, int64_t count) {
  bool nan = false;
  for (int64_t t = 0; t < count; ++t)
    nan |= each_block<abs>(scores[t], 0, numel(scores[t]), [](const uint32_t*, int64_t) {});
  return nan;
}

template <bool abs>
Selection select(const Scores* scores, int64_t count, int64_t eligible, int64_t kept, uint32_t hint,
                 SelectScratch scratch, int nthreads) {
  if (kept == 0) {
    const bool nan = has_nan<abs>(scores, count);
    pack<abs>(scores, count, kNoKey, {count, 0, 0}, nthreads);
    return {kInfinity, nan};
  }
  Nth nth{};
  bool nan = false, found = false;
  if (hint) {
    float last;
    std::memcpy(&last, &hint, 4);
    const uint32_t key = key_of<abs>(last);
    const Bracket near = {key > kHintWidth ? key - kHintWidth : 1,
                          key < kNoKey - kHintWidth ? key + kHintWidth : kNoKey};
    found = nth_in_bracket<abs>(scores, count, kept, near, scratch, nthreads, &nth, &nan);
  }
  if (!found) {
    const Bracket bracket = sampled_bracket<abs>(scores, count, eligible, kept, scratch);
    found = nth_in_bracket<abs>(scores, count, kept, bracket, scratch, nthreads, &nth, &nan);
  }
  if (!found) nth = nth_of_scores<abs>(scores, count, kept, scratch.counts, nthreads);
  TieEnd end{count, 0, 0};
  if (const int64_t ties = kept - nth.greater; ties < nth.equal)
    end = find_tie_end<abs>(scores, count, nth.key, ties);
  pack<abs>(scores, count, nth.key, end, nthreads);
  return {bits_of(score_of<abs>(nth.key)), nan};
}

}  // namespace

Selection select_mask(const Scores* ST_RESTRICT scores, int64_t count, int64_t eligible,
                      int64_t kept, bool abs, uint32_t hint, SelectScratch scratch, int nthreads) {
  return abs ? select<true>(scores, count, eligible, kept, hint, scratch, nthreads)
             : select<false>(scores, count, eligible, kept, hint, scratch, nthreads);
}

}  // namespace st::ST_ISA
