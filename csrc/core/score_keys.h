// Scores as ordered integers, sixteen at a time, and the bit moves of selection. A key is the score
// as sign and magnitude in two's complement: signed order is the order of the scores, -0 is +0.
// Integers only, because arithmetic would flush denormals where the thread asks for it.
#pragma once

#include "core.h"
#include "simd.h"

namespace st {
namespace {

constexpr int32_t kInfinityKey = 0x7F800000;
constexpr int32_t kLowestKey = INT32_MIN, kHighestKey = INT32_MAX;

template <bool abs>
inline int32_t key_of_bits(uint32_t bits) {
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFFu);
  return abs || bits < 0x80000000u ? magnitude : -magnitude;
}
template <bool abs>
inline int32_t key_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return key_of_bits<abs>(bits);
}
inline uint32_t bits_of_key(int32_t key) {
  return key < 0 ? 0x80000000u | static_cast<uint32_t>(-key) : static_cast<uint32_t>(key);
}

// Lanes: sixteen int32. Comparisons give one bit a lane; append() writes the chosen lanes in order,
// needs room for sixteen and returns the new end.
#if defined(__AVX512F__)

struct Lanes {
  __m512i v;
};
inline Lanes load_lanes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Lanes magnitude(Lanes a) { return {_mm512_abs_epi32(a.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_epu32(a.v, b.v)}; }
template <bool abs>
inline Lanes keys_of(Lanes bits) {
  const __m512i value = _mm512_and_si512(bits.v, _mm512_set1_epi32(INT32_MAX));
  if (abs) return {value};
  const __m512i sign = _mm512_srai_epi32(bits.v, 31);
  return {_mm512_sub_epi32(_mm512_xor_si512(value, sign), sign)};
}
inline uint32_t above(Lanes a, int32_t bound) {
  return _mm512_cmpgt_epi32_mask(a.v, _mm512_set1_epi32(bound));
}
inline uint32_t below(Lanes a, int32_t bound) {
  return _mm512_cmplt_epi32_mask(a.v, _mm512_set1_epi32(bound));
}
inline int32_t* append(Lanes a, uint32_t lanes, int32_t* out) {
  // Compress in a register: the memory form is microcoded on Zen 4.
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), a.v));
  return out + __builtin_popcount(lanes);
}

#elif defined(__AVX2__)

struct Lanes {
  __m256i lo, hi;
};
inline Lanes load_lanes(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Lanes magnitude(Lanes a) { return {_mm256_abs_epi32(a.lo), _mm256_abs_epi32(a.hi)}; }
inline Lanes larger(Lanes a, Lanes b) {
  return {_mm256_max_epu32(a.lo, b.lo), _mm256_max_epu32(a.hi, b.hi)};
}
template <bool abs>
inline __m256i keys_of_half(__m256i bits) {
  const __m256i value = _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX));
  if (abs) return value;
  const __m256i sign = _mm256_srai_epi32(bits, 31);
  return _mm256_sub_epi32(_mm256_xor_si256(value, sign), sign);
}
template <bool abs>
inline Lanes keys_of(Lanes bits) {
  return {keys_of_half<abs>(bits.lo), keys_of_half<abs>(bits.hi)};
}
inline uint32_t lane_bits(__m256i lo, __m256i hi) {
  const auto bits = [](__m256i v) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v)));
  };
  return bits(lo) | bits(hi) << 8;
}
inline uint32_t above(Lanes a, int32_t bound) {
  const __m256i b = _mm256_set1_epi32(bound);
  return lane_bits(_mm256_cmpgt_epi32(a.lo, b), _mm256_cmpgt_epi32(a.hi, b));
}
inline uint32_t below(Lanes a, int32_t bound) {
  const __m256i b = _mm256_set1_epi32(bound);
  return lane_bits(_mm256_cmpgt_epi32(b, a.lo), _mm256_cmpgt_epi32(b, a.hi));
}
inline int32_t* append_half(__m256i a, uint32_t lanes, int32_t* out) {
  // The chosen lanes' numbers, a byte each, packed to the front.
  const uint64_t bytes = _pdep_u64(lanes, 0x0101010101010101u) * 0xFF;
  const uint64_t order = _pext_u64(0x0706050403020100u, bytes);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(order)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(a, index));
  return out + __builtin_popcount(lanes);
}
inline int32_t* append(Lanes a, uint32_t lanes, int32_t* out) {
  return append_half(a.hi, lanes >> 8, append_half(a.lo, lanes & 0xFF, out));
}

#else

struct Lanes {
  int32_t v[16];
};
inline Lanes load_lanes(const void* p) {
  Lanes a;
  std::memcpy(a.v, p, 64);
  return a;
}
inline Lanes magnitude(Lanes a) {
  for (int32_t& lane : a.v) lane = lane < 0 ? -lane : lane;
  return a;
}
inline Lanes larger(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
template <bool abs>
inline Lanes keys_of(Lanes bits) {
  for (int32_t& lane : bits.v) {
    const int32_t value = lane & INT32_MAX, sign = abs ? 0 : lane >> 31;
    lane = (value ^ sign) - sign;
  }
  return bits;
}
inline uint32_t above(Lanes a, int32_t bound) {
  uint32_t out = 0;
  for (int i = 0; i < 16; ++i) out |= static_cast<uint32_t>(a.v[i] > bound) << i;
  return out;
}
inline uint32_t below(Lanes a, int32_t bound) {
  uint32_t out = 0;
  for (int i = 0; i < 16; ++i) out |= static_cast<uint32_t>(a.v[i] < bound) << i;
  return out;
}
inline int32_t* append(Lanes a, uint32_t lanes, int32_t* out) {
  for (; lanes; lanes &= lanes - 1) *out++ = a.v[__builtin_ctz(lanes)];
  return out;
}

#endif

inline Lanes no_lanes() {
  const int32_t zeros[16] = {};
  return load_lanes(zeros);
}
inline bool holds_nan(Lanes magnitudes) { return above(magnitudes, kInfinityKey) != 0; }

// Bits of `value`, lowest first, to the places of `mask`; and back.
inline uint64_t spread_bits(uint64_t value, uint64_t mask) {
#if defined(__BMI2__)
  return _pdep_u64(value, mask);
#else
  uint64_t out = 0;
  for (; mask; mask &= mask - 1, value >>= 1) out |= (value & 1) * (mask & -mask);
  return out;
#endif
}
inline uint64_t gather_bits(uint64_t value, uint64_t mask) {
#if defined(__BMI2__)
  return _pext_u64(value, mask);
#else
  uint64_t out = 0;
  for (int at = 0; mask; mask &= mask - 1, ++at)
    out |= static_cast<uint64_t>((value & (mask & -mask)) != 0) << at;
  return out;
#endif
}

inline uint64_t first_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// Units: words in pairs, which need not be aligned to 8 bytes.
inline uint64_t load_unit(const uint32_t* p) {
  uint64_t unit;
  std::memcpy(&unit, p, 8);
  return unit;
}
inline void store_unit(uint32_t* p, uint64_t unit) { std::memcpy(p, &unit, 8); }

// Any 64 bits of a row of `units` units, and their place in one; bits past its end are 0.
inline uint64_t bits_at(const uint32_t* row, int64_t units, int64_t first) {
  const int64_t unit = first >> 6, shift = first & 63;
  const uint64_t low = load_unit(row + 2 * unit) >> shift;
  return shift && unit + 1 < units ? low | load_unit(row + 2 * unit + 2) << (64 - shift) : low;
}
inline void add_bits(uint32_t* row, int64_t units, int64_t first, uint64_t bits) {
  const int64_t unit = first >> 6, shift = first & 63;
  uint32_t* const p = row + 2 * unit;
  store_unit(p, load_unit(p) | bits << shift);
  if (shift && unit + 1 < units) store_unit(p + 2, load_unit(p + 2) | bits >> (64 - shift));
}

// One row of a contiguous convolution weight: bit c * taps + s in memory order, s * channels + c in
// canonical order. Sixty-four channels are exactly `taps` units of the memory order, in which a
// tap's bits lie `taps` apart. kTaps: the number of taps where the compiler may know it, else 0.
template <int kTaps, bool to_canonical>
void reorder_taps(const uint32_t* ST_RESTRICT in, uint32_t* ST_RESTRICT out, const Layout& layout) {
  const int64_t taps = kTaps ? kTaps : layout.taps, channels = layout.channels;
  const int64_t units = row_words(layout) / 2;
  for (int64_t u = 0; u < units; ++u) store_unit(out + 2 * u, 0);
  uint64_t every = 0;  // each taps-th bit
  for (int64_t b = 0; b < 64; b += taps) every |= 1ull << b;
  for (int64_t first = 0; first < channels; first += 64) {
    const int64_t base = first / 64 * taps, present = channels - first;
    const int64_t here = units - base < taps ? units - base : taps;
#pragma GCC unroll 9
    for (int64_t s = 0; s < taps; ++s) {
      const int64_t place = s * channels + first;
      uint64_t bits = to_canonical ? 0 : bits_at(in, units, place) & first_bits(present);
#pragma GCC unroll 9
      for (int64_t u = 0; u < (kTaps ? kTaps : here); ++u) {
        // The first channel whose bit of this tap is not before the unit, and its place there.
        const int64_t channel = 64 * u > s ? (64 * u - s + taps - 1) / taps : 0;
        const int64_t offset = channel * taps + s - 64 * u;
        if (u >= here || offset >= 64 || channel >= 64) continue;
        uint32_t* const to = out + 2 * (base + u);
        const uint64_t mask = every << offset;
        if (to_canonical)
          bits |= gather_bits(load_unit(in + 2 * (base + u)), mask) << channel;
        else
          store_unit(to, load_unit(to) | spread_bits(bits >> channel, mask));
      }
      if (to_canonical) add_bits(out, units, place, bits);
    }
  }
}

template <bool to_canonical>
inline void reorder_row(const uint32_t* ST_RESTRICT in, uint32_t* ST_RESTRICT out,
                        const Layout& layout) {
  if (layout.taps == 9)
    reorder_taps<9, to_canonical>(in, out, layout);
  else
    reorder_taps<0, to_canonical>(in, out, layout);
}

}  // namespace
}  // namespace st
