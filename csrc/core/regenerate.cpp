#include "core.h"
#include "philox.h"
#include "simd.h"

namespace st::ST_ISA {
namespace {

constexpr int64_t kChunkUnits = 16;  // 64-weight units made at a time: 4 KiB of values, in L1
constexpr int64_t kChunk = 64 * kChunkUnits;

// values[0 .. 64*units) of the units starting at `unit`. Each value has one rounding, a product,
// so that no contraction or ISA level can change it.
void make_values(float* ST_RESTRICT values, int64_t unit, int64_t units, Dist dist, float scale,
                 const float* ST_RESTRICT table, uint32_t key, uint32_t high) {
  if (dist == Dist::signed_constant) {
    uint32_t signs[2 * kChunkUnits];
    philox_run<true>(unit, units, key, high, signs);
    const Vec constant = broadcast(scale);
    for (int64_t i = 0; i < 4 * units; ++i)
      store_first(flip(constant, signs[i >> 1] >> (16 * (i & 1)) & 0xFFFF), values + 16 * i, 16);
    return;
  }
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

template <typename T>
void rows(T* ST_RESTRICT out, const uint32_t* ST_RESTRICT words, const float* ST_RESTRICT table,
          const Layout& layout, Dist dist, float scale, uint32_t key, uint32_t high, int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    float values[kChunk];
    T* const to = out + row * columns;
    for (int64_t first = 0; first < columns; first += kChunk) {
      const int64_t n = columns - first < kChunk ? columns - first : kChunk;
      make_values(values, row * (words_a_row / 2) + first / 64, (n + 63) / 64, dist, scale, table,
                  key, high);
      if (words) {
        const uint32_t* const bits = words + row * words_a_row + first / 32;
        for (int64_t i = 0; i < (n + 15) / 16; ++i)
          store_first(keep(load(values + 16 * i), bits[i >> 1] >> (16 * (i & 1)) & 0xFFFF),
                      values + 16 * i, 16);
      }
      if (layout.taps == 1) {
        for (int64_t i = 0; i < n; ++i) store_float(values[i], to + first + i);
        continue;
      }
      int64_t s = first / layout.channels, c = first % layout.channels;
      for (int64_t i = 0; i < n; ++i) {
        store_float(values[i], to + c * layout.taps + s);
        if (++c == layout.channels) c = 0, ++s;
      }
    }
  }
}

}  // namespace

void regenerate(void* ST_RESTRICT out, Dtype dtype, const uint32_t* ST_RESTRICT words,
                const float* ST_RESTRICT table, Layout layout, Dist dist, float scale, uint32_t key,
                uint32_t high, int nthreads) {
  if (dtype == Dtype::f32)
    rows(static_cast<float*>(out), words, table, layout, dist, scale, key, high, nthreads);
  else
    rows(static_cast<bf16*>(out), words, table, layout, dist, scale, key, high, nthreads);
}

}  // namespace st::ST_ISA
