// Philox-2x32-7 (Salmon et al., SC 2011) over runs of consecutive counters, vectorised per ISA.
// The contract is sparseticket/reference/philox.py; only integers enter.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace st {
namespace {

constexpr uint32_t kPhiloxMultiplier = 0xD256D193u;
constexpr uint32_t kPhiloxWeyl = 0x9E3779B9u;
constexpr int kPhiloxRounds = 7;

// A generator word in plain bit order: rot16(interleave(word)), see reference/philox.py.
inline uint32_t plain_order(uint32_t x) {
  const uint32_t t = ((x >> 15) ^ x) & 0xAAAAu;
  x ^= t ^ (t << 15);
  return (x << 16) | (x >> 16);
}

template <bool plain>
inline void philox_one(uint64_t counter, uint32_t key, uint32_t high, uint32_t* out) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = high;
  for (int i = 0; i < kPhiloxRounds; ++i, key += kPhiloxWeyl) {
    const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier) * c0;
    c0 = static_cast<uint32_t>(product >> 32) ^ key ^ c1;
    c1 = static_cast<uint32_t>(product);
  }
  out[0] = plain ? plain_order(c0) : c0;
  out[1] = plain ? plain_order(c1) : c1;
}

// Counters in the low halves of 64-bit lanes: the multiplication reads those only, so that the high
// ones are free.
#if defined(__AVX512F__)

inline void philox_rounds(__m512i& c0, __m512i& c1, uint32_t key) {
  const __m512i multiplier = _mm512_set1_epi64(kPhiloxMultiplier);
  for (int r = 0; r < kPhiloxRounds; ++r, key += kPhiloxWeyl) {
    const __m512i product = _mm512_mul_epu32(c0, multiplier);
    c0 =
        _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), c1, _mm512_set1_epi64(key), 0x96);
    c1 = product;
  }
}
// The low halves of `even` and `odd` in turn.
inline __m512i low_halves(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}
inline __m512i plain_order(__m512i word) {
  const __m512i t = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi32(word, 15), word),
                                     _mm512_set1_epi32(0xAAAA));
  word = _mm512_ternarylogic_epi32(word, t, _mm512_slli_epi32(t, 15), 0x96);
  return _mm512_rol_epi32(word, 16);
}

#elif defined(__AVX2__)

inline void philox_rounds(__m256i& c0, __m256i& c1, uint32_t key) {
  const __m256i multiplier = _mm256_set1_epi64x(kPhiloxMultiplier);
  for (int r = 0; r < kPhiloxRounds; ++r, key += kPhiloxWeyl) {
    const __m256i product = _mm256_mul_epu32(c0, multiplier);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product, 32), c1),
                          _mm256_set1_epi64x(key));
    c1 = product;
  }
}
inline __m256i low_halves(__m256i even, __m256i odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline __m256i plain_order(__m256i word) {
  const __m256i t = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi32(word, 15), word),
                                     _mm256_set1_epi32(0xAAAA));
  word = _mm256_xor_si256(word, _mm256_xor_si256(t, _mm256_slli_epi32(t, 15)));
  return _mm256_or_si256(_mm256_slli_epi32(word, 16), _mm256_srli_epi32(word, 16));
}

#endif

// out[2i], out[2i+1] = the two words of counter (first + i, high); plain: in plain bit order.
template <bool plain>
inline void philox_run(uint64_t first, int64_t n, uint32_t key, uint32_t high, uint32_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (; i + 8 <= n; i += 8) {
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + i)), lane);
    __m512i c1 = _mm512_set1_epi64(high);
    philox_rounds(c0, c1, key);
    const __m512i word = low_halves(c0, c1);
    _mm512_storeu_si512(out + 2 * i, plain ? plain_order(word) : word);
  }
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  for (; i + 4 <= n; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + i)), lane);
    __m256i c1 = _mm256_set1_epi64x(high);
    philox_rounds(c0, c1, key);
    const __m256i word = low_halves(c0, c1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i), plain ? plain_order(word) : word);
  }
#endif
  for (; i < n; ++i) philox_one<plain>(first + i, key, high, out + 2 * i);
}

// out[i], out[16 + i] = the two words of counter (first + i * step, high), in plain bit order, for
// sixteen counters.
inline void philox_rows(uint64_t first, uint64_t step, uint32_t key, uint32_t high, uint32_t* out) {
#if defined(__AVX512F__)
  const __m512i stride = _mm512_set1_epi64(static_cast<int64_t>(step));
  const __m512i lane = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  __m512i even = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)),
                                  _mm512_mul_epu32(lane, stride));
  __m512i odd = _mm512_add_epi64(even, stride);
  __m512i even1 = _mm512_set1_epi64(high), odd1 = even1;
  philox_rounds(even, even1, key);
  philox_rounds(odd, odd1, key);
  _mm512_storeu_si512(out, plain_order(low_halves(even, odd)));
  _mm512_storeu_si512(out + 16, plain_order(low_halves(even1, odd1)));
#elif defined(__AVX2__)
  const __m256i stride = _mm256_set1_epi64x(static_cast<int64_t>(step));
  for (int half = 0; half < 16; half += 8) {
    const __m256i lane = _mm256_setr_epi64x(half, half + 2, half + 4, half + 6);
    __m256i even = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)),
                                    _mm256_mul_epu32(lane, stride));
    __m256i odd = _mm256_add_epi64(even, stride);
    __m256i even1 = _mm256_set1_epi64x(high), odd1 = even1;
    philox_rounds(even, even1, key);
    philox_rounds(odd, odd1, key);
    __m256i* const to = reinterpret_cast<__m256i*>(out + half);
    _mm256_storeu_si256(to, plain_order(low_halves(even, odd)));
    _mm256_storeu_si256(to + 2, plain_order(low_halves(even1, odd1)));
  }
#else
  for (uint64_t i = 0; i < 16; ++i) {
    uint32_t words[2];
    philox_one<true>(first + i * step, key, high, words);
    out[i] = words[0], out[16 + i] = words[1];
  }
#endif
}

}  // namespace
}  // namespace st
