// Sixteen fp32 lanes on every ISA level, with one fixed order of reduction, so that a kernel is
// written once. Anonymous namespace: an object file of one level must never lend code to another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace st {
namespace {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void store_float(float v, float* p) { *p = v; }
inline void store_float(float v, bf16* p) {  // rounds to nearest even
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    p->bits = static_cast<uint16_t>((bits >> 16) | 0x40);
    return;
  }
  p->bits = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec widen(__m256i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Vec load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_first(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline Vec load_first(const bf16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline void store(Vec a, float* p) { _mm512_storeu_ps(p, a.v); }
inline void store_first(Vec a, float* p, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec keep(Vec a, uint32_t bits) {
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)};
}
inline Vec flip(Vec a, uint32_t bits) {  // change the sign where the bit is 1
  const __m512i sign = _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), INT32_MIN);
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), sign))};
}
inline float sum(Vec a) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(a.v),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

#elif defined(__AVX2__)

struct Vec {
  __m256 lo, hi;
};
inline __m256i lane_mask(uint32_t bits) {  // all ones in lane i where bit i is 1
  const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), place),
                            place);
}
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(q));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
inline Vec load_first(const float* p, int64_t n) {
  const uint32_t bits = (1u << n) - 1;
  return {_mm256_maskload_ps(p, lane_mask(bits)), _mm256_maskload_ps(p + 8, lane_mask(bits >> 8))};
}
inline Vec load_first(const bf16* p, int64_t n) {
  bf16 padded[16] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(bf16));
  return load(padded);
}
inline void store(Vec a, float* p) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_first(Vec a, float* p, int64_t n) {
  const uint32_t bits = (1u << n) - 1;
  _mm256_maskstore_ps(p, lane_mask(bits), a.lo);
  _mm256_maskstore_ps(p + 8, lane_mask(bits >> 8), a.hi);
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec keep(Vec a, uint32_t bits) {
  return {_mm256_and_ps(a.lo, _mm256_castsi256_ps(lane_mask(bits))),
          _mm256_and_ps(a.hi, _mm256_castsi256_ps(lane_mask(bits >> 8)))};
}
inline Vec flip(Vec a, uint32_t bits) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, _mm256_and_ps(sign, _mm256_castsi256_ps(lane_mask(bits)))),
          _mm256_xor_ps(a.hi, _mm256_and_ps(sign, _mm256_castsi256_ps(lane_mask(bits >> 8))))};
}
inline float sum(Vec a) {
  const __m256 half = _mm256_add_ps(a.lo, a.hi);
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

#else

struct Vec {
  float v[16];
};
inline Vec broadcast(float x) {
  Vec a;
  for (float& lane : a.v) lane = x;
  return a;
}
inline Vec zero() { return broadcast(0.0f); }
template <typename T>
inline Vec load(const T* p) {
  Vec a;
  for (int i = 0; i < 16; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  Vec a = zero();
  for (int64_t i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
inline void store(Vec a, float* p) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline void store_first(Vec a, float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Vec sub(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline Vec keep(Vec a, uint32_t bits) {
  for (int i = 0; i < 16; ++i) a.v[i] = (bits >> i) & 1 ? a.v[i] : 0.0f;
  return a;
}
inline Vec flip(Vec a, uint32_t bits) {
  for (int i = 0; i < 16; ++i) a.v[i] = (bits >> i) & 1 ? -a.v[i] : a.v[i];
  return a;
}
inline float sum(Vec a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}

#endif

}  // namespace
}  // namespace st
