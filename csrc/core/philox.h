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

// out[2i], out[2i+1] = the two words of counter (first + i, high); plain: in plain bit order.
template <bool plain>
inline void philox_run(uint64_t first, int64_t n, uint32_t key, uint32_t high, uint32_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i multiplier = _mm512_set1_epi64(kPhiloxMultiplier);
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (; i + 8 <= n; i += 8) {
    // 64-bit lanes hold 32-bit values; vpmuludq reads the low halves only, so the high ones are
    // free.
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + i)), lane);
    __m512i c1 = _mm512_set1_epi64(high);
    uint32_t bumped = key;
    for (int r = 0; r < kPhiloxRounds; ++r, bumped += kPhiloxWeyl) {
      const __m512i product = _mm512_mul_epu32(c0, multiplier);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), c1, _mm512_set1_epi64(bumped),
                                     0x96);
      c1 = product;
    }
    __m512i word = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
    if (plain) {
      const __m512i t = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi32(word, 15), word),
                                         _mm512_set1_epi32(0xAAAA));
      word = _mm512_ternarylogic_epi32(word, t, _mm512_slli_epi32(t, 15), 0x96);
      word = _mm512_rol_epi32(word, 16);
    }
    _mm512_storeu_si512(out + 2 * i, word);
  }
#elif defined(__AVX2__)
  const __m256i multiplier = _mm256_set1_epi64x(kPhiloxMultiplier);
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  for (; i + 4 <= n; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + i)), lane);
    __m256i c1 = _mm256_set1_epi64x(high);
    uint32_t bumped = key;
    for (int r = 0; r < kPhiloxRounds; ++r, bumped += kPhiloxWeyl) {
      const __m256i product = _mm256_mul_epu32(c0, multiplier);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product, 32), c1),
                            _mm256_set1_epi64x(bumped));
      c1 = product;
    }
    __m256i word = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    if (plain) {
      const __m256i t = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi32(word, 15), word),
                                         _mm256_set1_epi32(0xAAAA));
      word = _mm256_xor_si256(word, _mm256_xor_si256(t, _mm256_slli_epi32(t, 15)));
      word = _mm256_or_si256(_mm256_slli_epi32(word, 16), _mm256_srli_epi32(word, 16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i), word);
  }
#endif
  for (; i < n; ++i) philox_one<plain>(first + i, key, high, out + 2 * i);
}

}  // namespace
}  // namespace st
