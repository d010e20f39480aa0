// Batched random subset-sum search, as in sparseticket/reference/subset_sum.py: numbers become
// integers on the grid of their row, so that every ISA level finds the same subset.
//
// Few elements: sums of pairs lie in colex order (by the second index, then the first), in which
// the pairs below an index are a prefix and the first hit is the canonical one. Any number: all
// sums of two halves, sorted by merging, or a dynamic programme whose sums are bits.
#include <omp.h>

#include <cmath>
#include <cstring>

#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

constexpr int kGridBits = 23, kSmallestExponent = -900;
constexpr double kLimit = 1 << 30;               // of targets and radii, in grid units
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
constexpr int64_t kDpBits = 64 * kSubsetDpWords;
constexpr int kDpTries = 8;
constexpr int64_t kMaxN = kSubsetMaxN, kMaxPairs = kMaxN * (kMaxN - 1) / 2;
constexpr int64_t kBlock = 64;  // sums tested at once: so many beyond the last may be read

struct Row {
  int64_t n;
  double scale;  // grid units in 1
  bool exact;    // every element lies on the grid
  bool paired;   // pairs holds this row's sums
  int32_t a[kMaxN + kBlock];
  int32_t pairs[kMaxPairs + kBlock];
};

inline int64_t pairs_below(int64_t n) { return n * (n - 1) / 2; }
inline uint64_t bit(int64_t i) { return uint64_t{1} << i; }

// ---------------------------------------------------------------- windows of sums
// A sum lies in [low, low + width] if sum - low, as an unsigned number, is at most width.

#if defined(__AVX512F__)
inline uint32_t hits(const int32_t* p, uint32_t low, uint32_t width) {
  const __m512i x = _mm512_add_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(-low));
  return _mm512_cmple_epu32_mask(x, _mm512_set1_epi32(static_cast<int>(width)));
}
inline bool block_hits(const int32_t* p, uint32_t low, uint32_t width) {
  const __m512i shift = _mm512_set1_epi32(-low);
  const auto at = [&](int i) { return _mm512_add_epi32(_mm512_loadu_si512(p + 16 * i), shift); };
  const __m512i least =
      _mm512_min_epu32(_mm512_min_epu32(at(0), at(1)), _mm512_min_epu32(at(2), at(3)));
  return _mm512_cmple_epu32_mask(least, _mm512_set1_epi32(static_cast<int>(width))) != 0;
}
#elif defined(__AVX2__)
inline __m256i offsets(const int32_t* p, __m256i shift) {
  return _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), shift);
}
inline uint32_t within(__m256i x, uint32_t width) {
  const __m256i inside =
      _mm256_cmpeq_epi32(_mm256_min_epu32(x, _mm256_set1_epi32(static_cast<int>(width))), x);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(inside)));
}
inline uint32_t hits(const int32_t* p, uint32_t low, uint32_t width) {
  const __m256i shift = _mm256_set1_epi32(static_cast<int>(-low));
  return within(offsets(p, shift), width) | within(offsets(p + 8, shift), width) << 8;
}
inline bool block_hits(const int32_t* p, uint32_t low, uint32_t width) {
  const __m256i shift = _mm256_set1_epi32(static_cast<int>(-low));
  __m256i least = offsets(p, shift);
  for (int i = 8; i < kBlock; i += 8) least = _mm256_min_epu32(least, offsets(p + i, shift));
  return within(least, width) != 0;
}
#else
inline uint32_t hits(const int32_t* p, uint32_t low, uint32_t width) {
  uint32_t found = 0;
  for (int i = 0; i < 16; ++i)
    found |= static_cast<uint32_t>(static_cast<uint32_t>(p[i]) - low <= width) << i;
  return found;
}
inline bool block_hits(const int32_t* p, uint32_t low, uint32_t width) {
  int found = 0;
  for (int i = 0; i < kBlock; ++i) found |= static_cast<uint32_t>(p[i]) - low <= width;
  return found;
}
#endif

// The first of p[0 .. n) in the window, or -1. What lies beyond n is read, but cannot come first.
inline int64_t first_hit(const int32_t* p, int64_t n, uint32_t low, uint32_t width) {
  int64_t at = 0;
  for (; at + 32 < n; at += kBlock)
    if (block_hits(p + at, low, width)) break;
  for (; at < n; at += 16)
    if (const uint32_t found = hits(p + at, low, width)) {
      at += __builtin_ctz(found);
      return at < n ? at : -1;
    }
  return -1;
}

// ---------------------------------------------------------------- the grid
inline int64_t exponent_of(double largest) {  // ceil(log2(largest))
  if (largest == 0) return 0;
  uint64_t bits;
  std::memcpy(&bits, &largest, 8);
  const int64_t e = static_cast<int64_t>(bits >> 52) - 1023 + ((bits & low_bits(52)) != 0);
  return e < kSmallestExponent ? kSmallestExponent : e;
}

inline double power_of_two(int64_t e) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double out;
  std::memcpy(&out, &bits, 8);
  return out;
}

inline uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7FFFFFFFu;
}
inline uint64_t magnitude(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits & low_bits(63);
}

// False if an element is infinite or no number.
template <typename T>
bool snap(const T* ST_RESTRICT p, int64_t n, Row& row) {
  decltype(magnitude(T())) most = 0;  // bits of a magnitude: ordered as the numbers are
  for (int64_t i = 0; i < n; ++i) most = magnitude(p[i]) > most ? magnitude(p[i]) : most;
  T largest;
  std::memcpy(&largest, &most, sizeof(T));
  if (!std::isfinite(largest)) return false;
  row.n = n;
  row.paired = false;
  row.scale = power_of_two(kGridBits - exponent_of(static_cast<double>(largest)));
  int off = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(p[i]) * row.scale, rounded = (x + kRounder) - kRounder;
    row.a[i] = static_cast<int32_t>(rounded);
    off |= rounded != x;
  }
  row.exact = !off;
  return true;
}

void make_pairs(Row& row) {
  if (row.paired) return;
  row.paired = true;
  for (int64_t j = 1; j < row.n; ++j)
    for (int64_t i = 0; i < j; i += 16)  // what is written past j the next sums overwrite
      for (int64_t l = i; l < i + 16; ++l) row.pairs[pairs_below(j) + l] = row.a[l] + row.a[j];
}

inline uint64_t pair_mask(int64_t place) {
  const int64_t j = static_cast<int64_t>((1 + std::sqrt(8.0 * static_cast<double>(place) + 1)) / 2);
  return bit(j) | bit(place - pairs_below(j));
}

inline int64_t sum_of(uint64_t mask, const int32_t* a) {
  int64_t sum = 0;
  for (; mask; mask &= mask - 1) sum += a[__builtin_ctzll(mask)];
  return sum;
}

// ---------------------------------------------------------------- few elements
// Walks the subsets of up to max_card elements in canonical order, a run of sums at a time:
// visit(sums, how many, what their other elements sum to, those as a mask, whether sums are pairs)
// returns true to stop.
template <typename Visit>
inline bool walk(Row& row, int max_card, const Visit& visit) {
  const int64_t n = row.n;
  const int32_t* a = row.a;
  if (visit(a, n, 0, uint64_t{0}, false)) return true;
  if (max_card < 2) return false;
  for (int64_t j = 1; j < n; ++j)
    if (visit(a, j, a[j], bit(j), false)) return true;
  if (max_card < 3) return false;
  make_pairs(row);
  for (int64_t c = 2; c < n; ++c)
    if (visit(row.pairs, pairs_below(c), a[c], bit(c), true)) return true;
  if (max_card < 4) return false;
  for (int64_t d = 3; d < n; ++d)
    for (int64_t c = 2; c < d; ++c)
      if (visit(row.pairs, pairs_below(c), a[c] + a[d], bit(c) | bit(d), true)) return true;
  return false;
}

// Whether such a subset has a sum in the window; the first one.
inline bool few(Row& row, uint32_t low, uint32_t width, int max_card, uint64_t* mask) {
  *mask = 0;
  if (0 - low <= width) return true;
  return walk(row, max_card,
              [&](const int32_t* sums, int64_t n, int32_t rest, uint64_t others, bool pairs) {
                const int64_t at = first_hit(sums, n, low - static_cast<uint32_t>(rest), width);
                if (at < 0) return false;
                *mask = others | (pairs ? pair_mask(at) : bit(at));
                return true;
              });
}

// The one of least error.
uint64_t nearest_few(Row& row, int32_t t, int max_card) {
  uint64_t mask = 0;
  int32_t least = t < 0 ? -t : t;
  walk(row, max_card,
       [&](const int32_t* sums, int64_t n, int32_t rest, uint64_t others, bool pairs) {
         const int32_t aim = t - rest;
         const auto error = [&](int64_t i) {
           return sums[i] < aim ? aim - sums[i] : sums[i] - aim;
         };
         int32_t here = least;
         for (int64_t i = 0; i < n; ++i) here = error(i) < here ? error(i) : here;
         if (here == least) return false;
         least = here;
         int64_t at = 0;
         while (error(at) != least) ++at;
         mask = others | (pairs ? pair_mask(at) : bit(at));
         return false;
       });
  return mask;
}

// ---------------------------------------------------------------- meeting in the middle
// A subset of a half is one ordered number: its sum, its size, its mask.
constexpr int kHalfBits = 26;
constexpr int64_t kBeyond = int64_t{1} << 62;  // more than any, with an element added too

inline int64_t key_of(int32_t a, int64_t i) {
  return a * (int64_t{1} << 32) + (int64_t{1} << kHalfBits) + (int64_t{1} << i);
}
inline int64_t key_sum(int64_t key) { return key >> 32; }
inline int64_t key_size(int64_t key) { return key >> kHalfBits & 63; }
inline uint64_t key_mask(int64_t key) { return static_cast<uint64_t>(key) & low_bits(kHalfBits); }

// out = the keys of `from` without and with one more element, both sorted.
void merge_with(const int64_t* ST_RESTRICT from, int64_t n, int64_t element,
                int64_t* ST_RESTRICT out) {
  int64_t i = 0, j = 0;
  for (int64_t k = 0; k < 2 * n; ++k) {
    const int64_t x = from[i], y = from[j] + element;
    const bool without = x < y;
    out[k] = without ? x : y;
    i += without;
    j += !without;
  }
  out[2 * n] = kBeyond;
}

struct Half {
  int64_t *keys, *other;
  int64_t n;
};

// Sorted subsets of a[0 .. n), one for each sum: the first, which is the canonical one.
Half half_of(const int32_t* a, int64_t n, int64_t* keys, int64_t* other) {
  keys[0] = 0;
  keys[1] = kBeyond;
  for (int64_t i = 0; i < n; ++i) {
    merge_with(keys, int64_t{1} << i, key_of(a[i], i), other);
    int64_t* const swapped = keys;
    keys = other;
    other = swapped;
  }
  int64_t distinct = 1;
  for (int64_t i = 1; i < int64_t{1} << n; ++i) {
    keys[distinct] = keys[i];
    distinct += key_sum(keys[i]) != key_sum(keys[distinct - 1]);
  }
  return {keys, other, distinct};
}

// The subset of least error: every best pair of halves lies on the way of the two pointers.
uint64_t optimum(const Row& row, int64_t t, int64_t* scratch) {
  const int64_t split = row.n / 2, room = subset_half_keys(row.n);
  const Half low = half_of(row.a, split, scratch, scratch + room);
  const Half high = half_of(row.a + split, row.n - split, low.other, scratch + 2 * room);
  int64_t least = INT64_MAX, size = 0;
  uint64_t mask = 0;
  for (int64_t i = 0, j = high.n - 1; i < low.n && j >= 0;) {
    const int64_t x = low.keys[i], y = high.keys[j];
    const int64_t sum = key_sum(x) + key_sum(y) - t, error = sum < 0 ? -sum : sum;
    if (error <= least) {
      const int64_t elements = key_size(x) + key_size(y);
      const uint64_t here = key_mask(x) | key_mask(y) << split;
      if (error < least || elements < size || (elements == size && here < mask)) {
        least = error;
        size = elements;
        mask = here;
      }
    }
    j -= sum > 0;
    i += sum <= 0;
  }
  return mask;
}

// ---------------------------------------------------------------- the dynamic programme
struct Coarse {
  int64_t size[kMaxN], total, words;
  const uint64_t* reach;  // [n + 1][words]: bit x of level i: elements below i have a sum x
};

inline bool reaches(const Coarse& c, int64_t level, int64_t x) {
  return x >= 0 && c.reach[level * c.words + (x >> 6)] >> (x & 63) & 1;
}

// to = from | from << distance
void shift_or(const uint64_t* ST_RESTRICT from, uint64_t* ST_RESTRICT to, int64_t words,
              int64_t distance) {
  const int64_t whole = distance >> 6, part = distance & 63;
  std::memcpy(to, from, static_cast<size_t>(8 * (whole < words ? whole : words)));
  if (whole < words) to[whole] = from[whole] | from[0] << part;
  for (int64_t w = whole + 1; w < words; ++w)
    to[w] = from[w] | from[w - whole] << part | from[w - whole - 1] >> 1 >> (63 - part);
}

// The subset behind a coarse sum: an element is taken only where it must be.
uint64_t trace(const Row& row, const Coarse& c, int64_t x) {
  uint64_t mask = 0;
  for (int64_t i = row.n - 1; i >= 0; --i) {
    const bool taken = !reaches(c, i, x);
    if (taken) x -= c.size[i];
    mask |= static_cast<uint64_t>(taken != (row.a[i] < 0)) << i;
  }
  return mask;
}

inline int64_t distance(int64_t a, int64_t b) { return a < b ? b - a : a - b; }

// A subset within the radius, else the best one seen; *error says which. Sums are that of the
// negative elements plus one of |a|.
uint64_t dynamic_programme(const Row& row, int64_t t, int64_t radius, int64_t negative,
                           uint64_t* reach, int64_t* error) {
  Coarse c;
  int64_t sum = 0, shift = 0;
  for (int64_t i = 0; i < row.n; ++i) sum += distance(row.a[i], 0);
  while ((sum >> shift) + row.n >= kDpBits) ++shift;
  const int64_t half = (int64_t{1} << shift) >> 1;
  c.total = 0;
  for (int64_t i = 0; i < row.n; ++i)
    c.total += c.size[i] = (distance(row.a[i], 0) + half) >> shift;
  c.words = (c.total >> 6) + 1;
  c.reach = reach;
  std::memset(reach, 0, static_cast<size_t>(8 * c.words));
  reach[0] = 1;
  for (int64_t i = 0; i < row.n; ++i)
    shift_or(reach + i * c.words, reach + (i + 1) * c.words, c.words, c.size[i]);
  int64_t aim = (t - negative + half) >> shift;
  aim = aim < 0 ? 0 : aim > c.total ? c.total : aim;
  uint64_t best = 0;
  *error = INT64_MAX;
  int tries = 0;
  const auto attempt = [&](int64_t x) {
    if (x > c.total || tries == kDpTries || *error <= radius || !reaches(c, row.n, x)) return;
    ++tries;
    const uint64_t mask = trace(row, c, x);
    const int64_t here = distance(sum_of(mask, row.a), t);
    if (here >= *error) return;
    *error = here;
    best = mask;
  };
  for (int64_t d = 0; d <= c.total && tries < kDpTries && *error > radius; ++d) {
    attempt(aim - d);
    if (d) attempt(aim + d);
  }
  return best;
}

// Any number of elements, after the search of few found none.
uint64_t fall_back(const Row& row, int64_t t, int64_t radius, int64_t* scratch) {
  uint64_t above = 0, below = 0;  // positive and negative elements
  for (int64_t i = 0; i < row.n; ++i) {
    above |= static_cast<uint64_t>(row.a[i] > 0) << i;
    below |= static_cast<uint64_t>(row.a[i] < 0) << i;
  }
  const int64_t negative = sum_of(below, row.a);
  if (sum_of(above, row.a) + radius < t) return above;
  if (negative - radius > t) return below;
  int64_t error;
  const uint64_t mask =
      dynamic_programme(row, t, radius, negative, reinterpret_cast<uint64_t*>(scratch), &error);
  if (error <= radius || row.n > kSubsetExactFallback) return mask;
  return optimum(row, t, scratch);
}

// ---------------------------------------------------------------- one target
// Grid units that a sum of `card` elements may be off. Rounding moves it and the target by up to
// half a unit an element: unless all lie on the grid, that much is kept back.
inline int32_t radius_of(double eps, double scale, bool exact, int64_t card) {
  const double units = eps * scale < kLimit ? eps * scale : kLimit;
  const int64_t left = static_cast<int64_t>(units) - (exact ? 0 : (card + 2) / 2);
  return static_cast<int32_t>(left < 0 ? 0 : left);
}

inline uint64_t solve(Row& row, double target, double eps, const SubsetSum& s, int64_t* scratch) {
  const double x = target * row.scale;
  const double cut = x < -kLimit ? -kLimit : x > kLimit ? kLimit : x;
  const double rounded = (cut + kRounder) - kRounder;
  const int32_t t = static_cast<int32_t>(rounded);
  if (s.min_error) return optimum(row, t, scratch);
  const bool exact = row.exact && rounded == x;
  const uint32_t radius = static_cast<uint32_t>(radius_of(eps, row.scale, exact, s.max_card));
  uint64_t mask;
  if (few(row, static_cast<uint32_t>(t) - radius, 2 * radius, s.max_card, &mask)) return mask;
  if (!s.fallback) return nearest_few(row, t, s.max_card);
  return fall_back(row, t, radius_of(eps, row.scale, exact, row.n), scratch);
}

// A row's targets [from, to). False: not all of them are finite.
template <typename T>
bool solve_row(const SubsetSum& s, int64_t r, int64_t from, int64_t to, Row& row,
               int64_t* scratch) {
  const T* base = static_cast<const T*>(s.base) + r * s.n;
  bool finite = true;
  for (int64_t i = r * s.shared + from; i < r * s.shared + to; ++i) {
    const double target = static_cast<double>(static_cast<const T*>(s.target)[i]);
    if (!std::isfinite(target)) {
      finite = false;
      continue;
    }
    const double eps = s.eps[s.one_eps ? 0 : i];
    const uint64_t mask = solve(row, target, eps, s, scratch);
    double value = 0;
    for (uint64_t left = mask; left; left &= left - 1)
      value += static_cast<double>(base[__builtin_ctzll(left)]);
    s.mask[i] = static_cast<int64_t>(mask);
    s.value[i] = value;
    s.error[i] = std::fabs(value - target);
    s.status[i] = s.error[i] > eps;
  }
  return finite;
}

constexpr int64_t kTargets = 512;  // of a row that one task solves

template <typename T>
Finite solve_all(const SubsetSum& s, int64_t* scratch, int nthreads) {
  const int64_t parts = (s.shared + kTargets - 1) / kTargets;
  const int64_t room = subset_scratch(s.n, s.min_error, s.fallback);
  const int64_t chunk = s.shared >= kTargets ? 1 : kTargets / (s.shared + 1);
  bool base_finite = true, target_finite = true;
#pragma omp parallel num_threads(nthreads) reduction(&& : base_finite, target_finite)
  {
    Row row{};
    int64_t* const own = scratch + room * omp_get_thread_num();
#pragma omp for schedule(dynamic, chunk)
    for (int64_t task = 0; task < s.rows * parts; ++task) {
      const int64_t r = task / parts, from = task % parts * kTargets;
      const int64_t to = from + kTargets < s.shared ? from + kTargets : s.shared;
      const int64_t n = s.lengths ? s.lengths[r] : s.n;
      if (snap(static_cast<const T*>(s.base) + r * s.n, n, row))
        target_finite = solve_row<T>(s, r, from, to, row, own) && target_finite;
      else
        base_finite = false;
    }
  }
  return {base_finite, target_finite};
}

}  // namespace

Finite subset_sum(SubsetSum problem, int64_t* ST_RESTRICT scratch, int nthreads) {
  return problem.doubles ? solve_all<double>(problem, scratch, nthreads)
                         : solve_all<float>(problem, scratch, nthreads);
}

}  // namespace st::ST_ISA
