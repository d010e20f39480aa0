// Sixty-four weights at a time between bits and what stands for them in memory: bytes, masked
// elements, signed constants; and the bits themselves between canonical and memory order.
#pragma once

#include <cstdint>
#include <cstring>

#include "core.h"

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace st {
namespace {

inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

inline uint64_t unit_at(const uint32_t* words) {
  return static_cast<uint64_t>(words[1]) << 32 | words[0];
}

// The 64 bits of a row that start at any bit; beyond the row's words they are 0.
inline uint64_t bits_from(const uint32_t* ST_RESTRICT row, int64_t words_a_row, int64_t first) {
  const int64_t w = first >> 6 << 1, shift = first & 63;
  const uint64_t low = unit_at(row + w) >> shift;
  return shift == 0 || w + 2 >= words_a_row ? low : low | unit_at(row + w + 2) << (64 - shift);
}

inline void store_unit(uint32_t* words, uint64_t bits) {
  words[0] = static_cast<uint32_t>(bits);
  words[1] = static_cast<uint32_t>(bits >> 32);
}
inline void or_unit(uint32_t* words, uint64_t bits) {
  words[0] |= static_cast<uint32_t>(bits);
  words[1] |= static_cast<uint32_t>(bits >> 32);
}
// Sets the ones of `bits` from any bit of a row on; none of them lies beyond the row.
inline void put_bits(uint32_t* ST_RESTRICT row, int64_t first, uint64_t bits) {
  const int64_t w = first >> 6 << 1, shift = first & 63;
  or_unit(row + w, bits << shift);
  if (const uint64_t over = shift ? bits >> (64 - shift) : 0) or_unit(row + w + 2, over);
}

#if defined(__BMI2__)
inline uint64_t extract(uint64_t from, uint64_t places) { return _pext_u64(from, places); }
inline uint64_t deposit(uint64_t bits, uint64_t places) { return _pdep_u64(bits, places); }
#else
inline uint64_t extract(uint64_t from, uint64_t places) {
  uint64_t out = 0;
  for (int i = 0; places; places &= places - 1, ++i)
    out |= (from >> __builtin_ctzll(places) & 1) << i;
  return out;
}
inline uint64_t deposit(uint64_t bits, uint64_t places) {
  uint64_t out = 0;
  for (; places; places &= places - 1, bits >>= 1) out |= (bits & 1) << __builtin_ctzll(places);
  return out;
}
#endif

// The bits of a row in memory order are walked in blocks of up to kBlockUnits units. With a few
// taps a block is 64 channels, so that each tap has one unit of it in canonical order.
constexpr int64_t kBlockUnits = 64;
inline int64_t block_size(const Layout& layout) {
  return 64 * (layout.taps > 1 && layout.taps < kBlockUnits ? layout.taps : kBlockUnits);
}
inline int64_t canonical_column(const Layout& layout, int64_t at) {
  return at % layout.taps * layout.channels + at / layout.taps;
}

// Every taps-th bit: shifted by i, the places in a memory unit of the tap that its bit i is of.
inline uint64_t every(int64_t taps) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < 64; i += taps) bits |= uint64_t{1} << i;
  return bits;
}

// The units of a block from the bits of each tap, and back. kTaps is the number of taps where the
// compiler may know it (3x3 kernels: every place is then a constant), else 0.
template <int kTaps>
inline void deposit_taps(uint64_t* ST_RESTRICT bits, int64_t taps, int64_t units,
                         uint64_t* ST_RESTRICT memory) {
  if (kTaps) taps = kTaps;
  const uint64_t all = every(taps);
  int64_t s = 0;  // the tap of the unit's lowest bit
#pragma GCC unroll 9
  for (int64_t j = 0; j < (kTaps ? kTaps : units); ++j) {
    if (j == units) break;
    uint64_t unit = 0;
#pragma GCC unroll 9
    for (int64_t i = 0; i < taps; ++i) {
      const uint64_t places = all << i;
      unit |= deposit(bits[s], places);
      bits[s] = bits[s] >> 1 >> (__builtin_popcountll(places) - 1);
      s = s + 1 == taps ? 0 : s + 1;
    }
    memory[j] = unit;
    s = (s + 64) % taps;
  }
}
template <int kTaps>
inline void extract_taps(const uint64_t* ST_RESTRICT memory, int64_t taps, int64_t units,
                         uint64_t* ST_RESTRICT bits) {
  if (kTaps) taps = kTaps;
  const uint64_t all = every(taps);
  int64_t filled[kBlockUnits] = {}, s = 0;
#pragma GCC unroll 9
  for (int64_t j = 0; j < (kTaps ? kTaps : units); ++j) {
    if (j == units) break;
#pragma GCC unroll 9
    for (int64_t i = 0; i < taps; ++i) {
      const uint64_t places = all << i;
      bits[s] |= extract(memory[j], places) << filled[s];
      filled[s] += __builtin_popcountll(places);
      s = s + 1 == taps ? 0 : s + 1;
    }
    s = (s + 64) % taps;
  }
}

// memory[0 .. units) = the row's bits in memory order from position `at`, the start of a block.
inline void memory_bits(const uint32_t* ST_RESTRICT row, const Layout& layout, int64_t at,
                        uint64_t* ST_RESTRICT memory) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(columns);
  const int64_t taps = layout.taps;
  const int64_t left = columns - at, n = left < block_size(layout) ? left : block_size(layout);
  const int64_t units = (n + 63) / 64;
  if (taps == 1) {
    for (int64_t j = 0; j < units; ++j) memory[j] = unit_at(row + (at >> 5) + 2 * j);
    return;
  }
  for (int64_t j = 0; j < units; ++j) memory[j] = 0;
  if (taps > kBlockUnits) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = canonical_column(layout, at + i);
      memory[i >> 6] |= static_cast<uint64_t>(row[k >> 5] >> (k & 31) & 1) << (i & 63);
    }
    return;
  }
  const uint64_t channels = low_bits(n / taps);
  uint64_t bits[kBlockUnits];
  for (int64_t s = 0; s < taps; ++s)
    bits[s] = bits_from(row, words_a_row, s * layout.channels + at / taps) & channels;
  if (taps == 9)
    deposit_taps<9>(bits, taps, units, memory);
  else
    deposit_taps<0>(bits, taps, units, memory);
}

// The inverse, for taps > 1: a block's bits into a zeroed row.
inline void canonical_bits(const uint64_t* ST_RESTRICT memory, const Layout& layout, int64_t at,
                           uint32_t* ST_RESTRICT row) {
  const int64_t left = columns_of(layout) - at, taps = layout.taps;
  const int64_t n = left < block_size(layout) ? left : block_size(layout);
  const int64_t units = (n + 63) / 64;
  if (taps > kBlockUnits) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = canonical_column(layout, at + i);
      row[k >> 5] |= static_cast<uint32_t>(memory[i >> 6] >> (i & 63) & 1) << (k & 31);
    }
    return;
  }
  uint64_t bits[kBlockUnits] = {};
  if (taps == 9)
    extract_taps<9>(memory, taps, units, bits);
  else
    extract_taps<0>(memory, taps, units, bits);
  for (int64_t s = 0; s < taps; ++s) put_bits(row, s * layout.channels + at / taps, bits[s]);
}

// ---------------------------------------------------------------- bytes
// Bit i: byte i is not 0. (torch stores bools as 0 and 1, but a view of other bytes as bool may
// hold anything.)
inline uint64_t nonzero_bytes(const uint8_t* p) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  const auto zeros = [](const uint8_t* q) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
  };
  return ~(static_cast<uint64_t>(zeros(p + 32)) << 32 | zeros(p));
#elif defined(__SSE2__)
  uint64_t zeros = 0;
  for (int i = 0; i < 64; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
    const int equal = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    zeros |= static_cast<uint64_t>(equal) << i;
  }
  return ~zeros;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, p + i, 8);
    // The high bit of each byte that is not 0; the product then moves that of byte i to 56 + i.
    const uint64_t low = 0x7F7F7F7F7F7F7F7Fu;
    bytes = (((bytes & low) + low) | bytes) >> 7 & 0x0101010101010101u;
    bits |= (bytes * 0x0102040810204080u >> 56) << i;
  }
  return bits;
#endif
}

// p[i] = bit i, for 64 bytes.
inline void spread_bytes(uint64_t bits, uint8_t* p) {
#if defined(__AVX512BW__)
  _mm512_storeu_si512(p, _mm512_maskz_set1_epi8(bits, 1));
#elif defined(__AVX2__)
  const __m256i place = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i byte =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  for (int i = 0; i < 2; ++i, bits >>= 32) {
    const __m256i each =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(bits))), byte);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(each, place), place);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * i),
                        _mm256_and_si256(set, _mm256_set1_epi8(1)));
  }
#elif defined(__SSE2__)
  const __m128i place = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  for (int i = 0; i < 64; i += 16, bits >>= 16) {
    __m128i each = _mm_cvtsi32_si128(static_cast<int>(bits & 0xFFFF));
    each = _mm_unpacklo_epi8(each, each);  // each byte twice, then eight times
    each = _mm_unpacklo_epi16(each, each);
    each = _mm_unpacklo_epi32(each, each);
    const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(each, place), place);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm_and_si128(set, _mm_set1_epi8(1)));
  }
#else
  for (int i = 0; i < 8; ++i, bits >>= 8) {
    // The product has bit j at 8 * (7 - j) + 7, the shift puts it low in byte 7 - j.
    const uint64_t bytes =
        __builtin_bswap64(((bits & 0xFF) * 0x8040201008040201u >> 7) & 0x0101010101010101u);
    std::memcpy(p + 8 * i, &bytes, 8);
  }
#endif
}

// ---------------------------------------------------------------- elements
// Elements of 2, 4 or 8 bytes as unsigned integers: what a bit drops becomes +0 whatever it was.
#if defined(__AVX512BW__)
template <typename T>
inline void keep_unit(const T* in, uint64_t bits, T* out) {
  constexpr int lanes = 64 / sizeof(T);
  for (int i = 0; i < 64; i += lanes) {
    const uint64_t here = bits >> i;
    __m512i v = _mm512_loadu_si512(in + i);
    if constexpr (sizeof(T) == 2)
      v = _mm512_maskz_mov_epi16(static_cast<__mmask32>(here), v);
    else if constexpr (sizeof(T) == 4)
      v = _mm512_maskz_mov_epi32(static_cast<__mmask16>(here), v);
    else
      v = _mm512_maskz_mov_epi64(static_cast<__mmask8>(here), v);
    _mm512_storeu_si512(out + i, v);
  }
}
inline __m512i chosen(uint64_t bits, uint32_t one, uint32_t zero) {
  return _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(zero)),
                                static_cast<__mmask16>(bits), static_cast<int>(one));
}
inline __m512i chosen(uint64_t bits, uint16_t one, uint16_t zero) {
  return _mm512_mask_set1_epi16(_mm512_set1_epi16(static_cast<short>(zero)),
                                static_cast<__mmask32>(bits), static_cast<short>(one));
}
template <typename T>
inline void constant_unit(uint64_t signs, uint64_t kept, T plus, T minus, T* out) {
  constexpr int lanes = 64 / sizeof(T);
  for (int i = 0; i < 64; i += lanes) {
    const __m512i v = chosen(signs >> i, minus, plus);
    if constexpr (sizeof(T) == 2)
      _mm512_storeu_si512(out + i, _mm512_maskz_mov_epi16(static_cast<__mmask32>(kept >> i), v));
    else
      _mm512_storeu_si512(out + i, _mm512_maskz_mov_epi32(static_cast<__mmask16>(kept >> i), v));
  }
}
#else
#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <typename T>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  Vector place;
  Lanes() {
    for (int i = 0; i < count; ++i) place[i] = static_cast<T>(T{1} << i);
  }
  Vector of(uint64_t bits) const {  // all ones where the bit is 1
    return (Vector)((place & (Vector{} + static_cast<T>(bits))) == place);
  }
};
template <typename T>
inline void keep_unit(const T* in, uint64_t bits, T* out) {
  const Lanes<T> lanes;
  for (int i = 0; i < 64; i += lanes.count) {
    typename Lanes<T>::Vector v;
    std::memcpy(&v, in + i, kVectorBytes);
    v &= lanes.of(bits >> i);
    std::memcpy(out + i, &v, kVectorBytes);
  }
}
template <typename T>
inline void constant_unit(uint64_t signs, uint64_t kept, T plus, T minus, T* out) {
  const Lanes<T> lanes;
  const T flip = static_cast<T>(plus ^ minus);
  for (int i = 0; i < 64; i += lanes.count) {
    const auto v = (plus ^ (lanes.of(signs >> i) & flip)) & lanes.of(kept >> i);
    std::memcpy(out + i, &v, kVectorBytes);
  }
}
#endif

}  // namespace
}  // namespace st
