#include <omp.h>

#include "bits.h"
#include "core.h"
#include "philox.h"
#include "simd.h"

namespace st::ST_ISA {
namespace {

constexpr int64_t kChunkUnits = 16;  // 64-weight units made at a time: 4 KiB of values, in L1
constexpr int64_t kChunk = 64 * kChunkUnits;

inline uint32_t bits_of(float v, uint32_t) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline uint16_t bits_of(float v, uint16_t) {
  bf16 rounded;
  store_float(v, &rounded);
  return rounded.bits;
}

// One row of +-scale from its sign words and, unless null, its mask words: one write of each
// element, the bits put in memory order before.
template <typename T>
void constant_row(const uint32_t* ST_RESTRICT signs, const uint32_t* ST_RESTRICT words,
                  const Layout& layout, float scale, T* ST_RESTRICT out) {
  const T plus = bits_of(scale, T{}), minus = bits_of(-scale, T{});
  const int64_t columns = columns_of(layout), block = block_size(layout);
  for (int64_t at = 0; at < columns; at += block) {
    uint64_t negative[kBlockUnits], kept[kBlockUnits];
    memory_bits(signs, layout, at, negative);
    if (words) memory_bits(words, layout, at, kept);
    for (int64_t i = at; i < at + block && i < columns; i += 64) {
      const int64_t j = (i - at) >> 6;
      const uint64_t here = words ? kept[j] : ~uint64_t{0};
      if (i + 64 <= columns) {
        constant_unit(negative[j], here, plus, minus, out + i);
      } else {
        T values[64];
        constant_unit(negative[j], here, plus, minus, values);
        std::memcpy(out + i, values, static_cast<size_t>(columns - i) * sizeof(T));
      }
    }
  }
}

// signs: kSignWords or the words of a row, whichever is more, for each thread. Short rows are made
// many at a time, since the generator runs over consecutive units.
template <typename T>
void constant(T* ST_RESTRICT out, const uint32_t* ST_RESTRICT words, uint32_t* ST_RESTRICT signs,
              const Layout& layout, float scale, uint32_t key, uint32_t high, int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  if (words_a_row == 0) return;
  const int64_t scratch = regenerate_sign_words(layout), together = scratch / words_a_row;
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < layout.rows; first += together) {
    uint32_t* const mine = signs + omp_get_thread_num() * scratch;
    const int64_t n = layout.rows - first < together ? layout.rows - first : together;
    philox_run<true>(first * words_a_row / 2, n * words_a_row / 2, key, high, mine);
    for (int64_t row = first; row < first + n; ++row)
      constant_row(mine + (row - first) * words_a_row, words ? words + row * words_a_row : nullptr,
                   layout, scale, out + row * columns);
  }
}

// values[0 .. 64*units) of the units starting at `unit`. Each value has one rounding, a product,
// so that no contraction or ISA level can change it.
void make_values(float* ST_RESTRICT values, int64_t unit, int64_t units, Dist dist, float scale,
                 const float* ST_RESTRICT table, uint32_t key, uint32_t high) {
  uint32_t words[kChunk];
  philox_run<false>(32 * unit, 32 * units, key, high, words);
  if (dist == Dist::uniform) {
    for (int64_t i = 0; i < 64 * units; ++i) {
      const int32_t centred = static_cast<int32_t>(2 * (words[i] >> 8) + 1) - (1 << 24);
      values[i] = static_cast<float>(centred) * 0x1p-24f * scale;
    }
  } else {
    for (int64_t i = 0; i < 64 * units; ++i) values[i] = table[words[i] >> 16] * scale;
  }
}

// Canonical columns [first, first + n) of a row to their places in memory order.
template <typename T>
void place_values(const float* ST_RESTRICT values, int64_t first, int64_t n, const Layout& layout,
                  T* ST_RESTRICT row) {
  for (int64_t done = 0; done < n;) {
    const int64_t s = (first + done) / layout.channels, c = (first + done) % layout.channels;
    const int64_t left = layout.channels - c, run = left < n - done ? left : n - done;
    T* const to = row + c * layout.taps + s;
    for (int64_t i = 0; i < run; ++i) store_float(values[done + i], to + i * layout.taps);
    done += run;
  }
}

template <typename T>
void drawn(T* ST_RESTRICT out, const uint32_t* ST_RESTRICT words, const float* ST_RESTRICT table,
           const Layout& layout, Dist dist, float scale, uint32_t key, uint32_t high,
           int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    float values[kChunk];
    for (int64_t first = 0; first < columns; first += kChunk) {
      const int64_t n = columns - first < kChunk ? columns - first : kChunk;
      make_values(values, row * (words_a_row / 2) + first / 64, (n + 63) / 64, dist, scale, table,
                  key, high);
      if (words)
        for (int64_t i = 0; i < n; i += 16)
          store_first(keep(load(values + i),
                           words[row * words_a_row + ((first + i) >> 5)] >> (i & 16) & 0xFFFF),
                      values + i, 16);
      place_values(values, first, n, layout, out + row * columns);
    }
  }
}

}  // namespace

void regenerate(void* ST_RESTRICT out, Dtype dtype, const uint32_t* ST_RESTRICT words,
                const float* ST_RESTRICT table, Layout layout, Dist dist, float scale, uint32_t key,
                uint32_t high, uint32_t* ST_RESTRICT signs, int nthreads) {
  if (dist == Dist::signed_constant && dtype == Dtype::f32)
    constant(static_cast<uint32_t*>(out), words, signs, layout, scale, key, high, nthreads);
  else if (dist == Dist::signed_constant)
    constant(static_cast<uint16_t*>(out), words, signs, layout, scale, key, high, nthreads);
  else if (dtype == Dtype::f32)
    drawn(static_cast<float*>(out), words, table, layout, dist, scale, key, high, nthreads);
  else
    drawn(static_cast<bf16*>(out), words, table, layout, dist, scale, key, high, nthreads);
}

}  // namespace st::ST_ISA
