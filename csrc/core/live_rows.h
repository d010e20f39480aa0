// Walks over the live weights of masked rows, for many columns of activations at once.
//
// Activations come in panels [panel][K][kPanel]: kPanel batch rows side by side, so that one live
// weight is one broadcast and kPanel / 16 multiply-adds, and dropped weights cost only their bits.
// Weights are decoded into lists of kRows rows, which pass over kColumns columns of a panel at a
// time: that part of it stays in the L1 cache.
#pragma once

#include "bits.h"
#include "core.h"
#include "simd.h"

namespace st {
namespace {

constexpr int64_t kPanel = kMaskedLinearPanel;
constexpr int kVectors = kPanel / 16;
constexpr int64_t kRows = kMaskedLinearRows;
constexpr int64_t kColumns = kMaskedLinearColumns;

// Appends the live ones of n <= 16 weights; whole vectors may be written. Returns their number.
template <typename T>
inline int64_t append_live(const T* ST_RESTRICT weight, int64_t n, uint32_t column, uint32_t bits,
                           uint32_t* ST_RESTRICT columns, float* ST_RESTRICT values) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 live = static_cast<__mmask16>(bits);
  const Vec w = n == 16 ? load(weight) : load_first(weight, n);
  const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(column)));
  _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(live, at));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(live, w.v));
#elif defined(__AVX2__)
  const Vec w = n == 16 ? load(weight) : load_first(weight, n);
  for (uint32_t half = 0; half < 2; ++half) {
    // The live lanes' numbers, packed into the low bytes: a permutation that moves them to front.
    const uint64_t each = _pdep_u64(bits >> (8 * half) & 0xFF, 0x0101010101010101u) * 0xFF;
    const uint64_t lanes = _pext_u64(0x0706050403020100u, each);
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
    const int first = static_cast<int>(column + 8 * half);
    const int64_t to = half ? __builtin_popcount(bits & 0xFF) : 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + to),
                        _mm256_add_epi32(order, _mm256_set1_epi32(first)));
    _mm256_storeu_ps(values + to, _mm256_permutevar8x32_ps(half ? w.hi : w.lo, order));
  }
#else
  (void)n;
  int64_t to = 0;
  for (uint32_t left = bits; left; left &= left - 1, ++to) {
    const int i = __builtin_ctz(left);
    columns[to] = column + static_cast<uint32_t>(i);
    values[to] = to_float(weight[i]);
  }
#endif
  return __builtin_popcount(bits);
}

// Lists of the live weights of kRows rows, of kSpan columns each at most, counted from the first.
// ends[r][i]: where the i-th part of kColumns columns ends in the list of row r.
constexpr int64_t kSpan = 2048;
struct alignas(64) LiveBlock {
  uint32_t columns[kRows][kSpan + 16];
  float values[kRows][kSpan + 16];
  int64_t ends[kRows][kSpan / kColumns];
};

// Rows [row, row + rows), columns [first, first + n) of a weight of k columns. Whole rows, since
// memory is read fastest in long runs; those of the next block are fetched meanwhile.
template <typename T>
inline void decode_block(const T* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words, int64_t k,
                         int64_t row, int64_t rows, int64_t first, int64_t n, LiveBlock& live) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const w = weight + (row + r) * k + first;
    const uint32_t* const bits = words + (row + r) * row_words(k) + (first >> 5);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t left = n - i < 16 ? n - i : 16;
      const uint32_t here = bits[i >> 5] >> (i & 16) & static_cast<uint32_t>(low_bits(left));
      __builtin_prefetch(w + kRows * k + i, 0, 2);
      count += append_live(w + i, left, static_cast<uint32_t>(i), here, live.columns[r] + count,
                           live.values[r] + count);
      live.ends[r][i / kColumns] = count;
    }
  }
}
inline int64_t list_begin(const LiveBlock& live, int64_t r, int64_t part) {
  return part ? live.ends[r][part - 1] : 0;
}

// sums[kPanel] += a row's live weights times their columns of a panel. Two weights at a time, so
// that two chains of additions run side by side.
inline void gather_row(const uint32_t* ST_RESTRICT columns, const float* ST_RESTRICT values,
                       int64_t n, const float* ST_RESTRICT panel, float* ST_RESTRICT sums) {
  Vec even[kVectors], odd[kVectors];
  for (int v = 0; v < kVectors; ++v) even[v] = load(sums + 16 * v), odd[v] = zero();
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    const Vec a = broadcast(values[i]), b = broadcast(values[i + 1]);
    const float* const p = panel + columns[i] * kPanel;
    const float* const q = panel + columns[i + 1] * kPanel;
    for (int v = 0; v < kVectors; ++v) {
      even[v] = fma(a, load(p + 16 * v), even[v]);
      odd[v] = fma(b, load(q + 16 * v), odd[v]);
    }
  }
  if (i < n) {
    const Vec a = broadcast(values[i]);
    const float* const p = panel + columns[i] * kPanel;
    for (int v = 0; v < kVectors; ++v) even[v] = fma(a, load(p + 16 * v), even[v]);
  }
  for (int v = 0; v < kVectors; ++v) store(add(even[v], odd[v]), sums + 16 * v);
}

// The transposed step: each live column of a panel += its weight times the row's x[kPanel].
inline void scatter_row(const uint32_t* ST_RESTRICT columns, const float* ST_RESTRICT values,
                        int64_t n, const float* ST_RESTRICT x, float* ST_RESTRICT panel) {
  Vec own[kVectors];
  for (int v = 0; v < kVectors; ++v) own[v] = load(x + 16 * v);
  for (int64_t i = 0; i < n; ++i) {
    const Vec w = broadcast(values[i]);
    float* const p = panel + columns[i] * kPanel;
    for (int v = 0; v < kVectors; ++v) store(fma(w, own[v], load(p + 16 * v)), p + 16 * v);
  }
}

// x [batch, k] into panels, rows beyond the batch zero.
template <typename T>
void pack_panels(const T* ST_RESTRICT x, int64_t batch, int64_t k, float* ST_RESTRICT panels,
                 int threads) {
  const int64_t count = (batch + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t p = 0; p < count; ++p)
    for (int64_t first = 0; first < k; first += kColumns) {
      const int64_t end = k - first < kColumns ? k : first + kColumns;
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t b = p * kPanel + c;
        float* const to = panels + p * k * kPanel + c;
        for (int64_t i = first; i < end; ++i)
          to[i * kPanel] = b < batch ? to_float(x[b * k + i]) : 0.0f;
      }
    }
}

}  // namespace
}  // namespace st
