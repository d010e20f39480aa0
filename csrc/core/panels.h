// Batch-inner panels: [k][lanes] slices of a batch, 64 samples wide or less at the end, so that one
// weight meets the samples in whole vectors. Packed from and unpacked to torch's layouts.
#pragma once

#include "core.h"
#include "simd.h"

namespace st {
namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kAheadFeatures = 48;  // prefetched: sixteen rows are too many for the hardware

#if defined(__AVX512F__)
inline void store(Vec a, bf16* p) {  // rounds to nearest even
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
#elif defined(__AVX2__)
inline __m256i rounded_high(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store(Vec a, bf16* p) {  // rounds to nearest even
  const __m256i packed = _mm256_packus_epi32(rounded_high(a.lo), rounded_high(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
#else
inline void store(Vec a, bf16* p) {
  for (int i = 0; i < 16; ++i) store_float(a.v[i], p + i);
}
#endif

template <typename T>
inline void store_part(Vec a, T* p, int64_t n) {  // the first n lanes
  if (n == 16) return store(a, p);
  float lanes[16];
  store(a, lanes);
  for (int64_t i = 0; i < n; ++i) store_float(lanes[i], p + i);
}

#if defined(__AVX512F__)
inline __m512 pairs(__m512 a, __m512 b, bool high) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}
inline void transpose16(Vec* m) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(m[i].v, m[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(m[i].v, m[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: column j of each 128-bit lane, rows i..i+3
    b[i] = pairs(a[i], a[i + 2], false);
    b[i + 1] = pairs(a[i], a[i + 2], true);
    b[i + 2] = pairs(a[i + 1], a[i + 3], false);
    b[i + 3] = pairs(a[i + 1], a[i + 3], true);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xDD);
    m[j].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    m[8 + j].v = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
    m[4 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    m[12 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
  }
}
#elif defined(__AVX2__)
inline __m256 pairs(__m256 a, __m256 b, bool high) {
  const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
}
inline void transpose8(__m256* m) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = pairs(a[i], a[i + 2], false);
    b[i + 1] = pairs(a[i], a[i + 2], true);
    b[i + 2] = pairs(a[i + 1], a[i + 3], false);
    b[i + 3] = pairs(a[i + 1], a[i + 3], true);
  }
  for (int j = 0; j < 4; ++j) {
    m[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    m[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}
inline void transpose16(Vec* m) {
  __m256 q[4][8];
  for (int i = 0; i < 8; ++i) {
    q[0][i] = m[i].lo, q[1][i] = m[i].hi;
    q[2][i] = m[8 + i].lo, q[3][i] = m[8 + i].hi;
  }
  for (auto& quarter : q) transpose8(quarter);
  for (int i = 0; i < 8; ++i) {
    m[i] = {q[0][i], q[2][i]};
    m[8 + i] = {q[1][i], q[3][i]};
  }
}
#else
inline void transpose16(Vec* m) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = m[i].v[j];
      m[i].v[j] = m[j].v[i];
      m[j].v[i] = t;
    }
}
#endif

// One panel of `samples` <= 16 * vectors samples, whose features lie at
// x[sample * by_sample + feature * by_feature], one of the strides being 1. Absent samples are 0.
template <typename T>
inline void pack_panel(const T* ST_RESTRICT x, int64_t by_sample, int64_t by_feature,
                       int64_t samples, int64_t first, int64_t last, float* ST_RESTRICT panel,
                       int64_t vectors) {
  const int64_t width = 16 * vectors;
  for (int64_t v = 0; v < vectors; ++v) {
    const T* const from = x + 16 * v * by_sample;
    const int64_t n = samples - 16 * v < 16 ? samples - 16 * v : 16;
    float* const to = panel + 16 * v;
    if (by_feature != 1) {
      for (int64_t k = first; k < last; ++k) {
        const T* const p = from + k * by_feature;
        store(n == 16 ? load(p) : load_first(p, n), to + k * width);
      }
      continue;
    }
    for (int64_t k = first; k < last; k += 16) {
      const int64_t features = last - k < 16 ? last - k : 16;
      Vec m[16];
      for (int64_t i = 0; i < 16; ++i) {
        const T* const p = from + i * by_sample + k;
        if (i < n) __builtin_prefetch(p + kAheadFeatures);
        m[i] = i >= n ? zero() : features == 16 ? load(p) : load_first(p, features);
      }
      transpose16(m);
      for (int64_t i = 0; i < features; ++i) store(m[i], to + (k + i) * width);
    }
  }
}

// The inverse for `rows` features that begin at y.
template <typename T>
inline void unpack_panel(const float* ST_RESTRICT panel, int64_t vectors, int64_t rows,
                         T* ST_RESTRICT y, int64_t by_sample, int64_t by_feature, int64_t samples) {
  const int64_t width = 16 * vectors;
  for (int64_t v = 0; v < vectors; ++v) {
    const float* const from = panel + 16 * v;
    T* const to = y + 16 * v * by_sample;
    const int64_t n = samples - 16 * v < 16 ? samples - 16 * v : 16;
    if (by_feature != 1) {
      for (int64_t r = 0; r < rows; ++r) store_part(load(from + r * width), to + r * by_feature, n);
      continue;
    }
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t features = rows - r < 16 ? rows - r : 16;
      Vec m[16];
      for (int64_t i = 0; i < 16; ++i) m[i] = i < features ? load(from + (r + i) * width) : zero();
      transpose16(m);
      for (int64_t i = 0; i < n; ++i) {
        __builtin_prefetch(to + i * by_sample + r + kAheadFeatures, 1);
        store_part(m[i], to + i * by_sample + r, features);
      }
    }
  }
}

struct Slice {  // the part of a batch that makes one panel
  int64_t group, first, samples, vectors;
};

inline int64_t panels_of(const Batch& batch) {
  return batch.groups * ((batch.samples + kPanel - 1) / kPanel);
}
inline Slice slice_of(const Batch& batch, int64_t panel) {
  const int64_t each = (batch.samples + kPanel - 1) / kPanel;
  const int64_t first = panel % each * kPanel;
  const int64_t samples = batch.samples - first < kPanel ? batch.samples - first : kPanel;
  return {panel / each, first, samples, (samples + 15) / 16};
}
// Strides of [groups][samples][features], or [groups][features][samples].
inline int64_t by_sample(const Batch& batch, int64_t features) {
  return batch.inner ? 1 : features;
}
inline int64_t by_feature(const Batch& batch) { return batch.inner ? batch.samples : 1; }

// One panel of a batch, packed by all threads.
template <typename T>
inline void pack_slice(const T* ST_RESTRICT x, const Batch& batch, const Slice& s, int64_t k,
                       float* ST_RESTRICT packed, int nthreads) {
  constexpr int64_t kChunk = 128;
  const int64_t chunks = (k + kChunk - 1) / kChunk, stride = by_sample(batch, k);
  const T* const from = x + s.group * batch.samples * k + s.first * stride;
#pragma omp parallel for num_threads(nthreads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kChunk, last = first + kChunk < k ? first + kChunk : k;
    pack_panel(from, stride, by_feature(batch), s.samples, first, last, packed, s.vectors);
  }
}

}  // namespace
}  // namespace st
