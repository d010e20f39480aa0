// Sums of activations looked up instead of multiplied: what the kernels for weights in {0, +c, -c}
// share. Sixteen integer lanes, register tables indexed by a few low bits of each lane (a shift of
// the lanes walks through packed indices), and the planes of sixteen rows turned into lanes.
//
// Codes: a word holds 16 weights of a row as digits 1 + sign, in four groups of four. Bits 5g..5g+4
// are d0 + 3 d1 + 9 d2 of group g, bits 20+2g and 21+2g its d3. Words lie [chunk of 16
// columns][row], rows padded to 16. A vector of words is 16 rows for the tables in registers; a
// group is one of 81 rows of the panel tables. Relatives: BiQGEMM (arXiv 2005.09904), T-MAC (arXiv
// 2407.00088).
#pragma once

#include "core.h"
#include "philox.h"
#include "simd.h"

namespace st {
namespace {

constexpr int kGroups = 4;
constexpr uint32_t kNoWeights = 13u * 0x8421u + (0x55u << 20);  // sixteen digits 1

#if defined(__AVX512F__)

struct Ints {
  __m512i v;
};
inline Ints load_ints(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(Ints a, uint32_t* p) { _mm512_storeu_si512(p, a.v); }
inline Ints broadcast_int(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline Ints shift_right(Ints a, unsigned n) { return {_mm512_srli_epi32(a.v, n)}; }
inline Ints shift_left(Ints a, unsigned n) { return {_mm512_slli_epi32(a.v, n)}; }
// A field of bits that does not cross the middle of its lane, moved to the bottom; what is above it
// is not specified. Multipliers are free where the ports that shift are busy with permutations.
inline Ints field_at(Ints a, unsigned n) {
  const __m512i half = n < 16 ? a.v : _mm512_srli_epi32(a.v, 16);
  if (n % 16 == 0) return {half};
  return {_mm512_mulhi_epu16(half, _mm512_set1_epi16(static_cast<int16_t>(1 << (16 - n % 16))))};
}
inline Ints both(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints either(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints without(Ints a, Ints b) { return {_mm512_andnot_si512(b.v, a.v)}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints sub(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints add_where(Ints a, uint32_t bits, uint32_t x) {
  return {_mm512_mask_add_epi32(a.v, static_cast<__mmask16>(bits), a.v,
                                _mm512_set1_epi32(static_cast<int>(x)))};
}

// Eight entries by the low three bits of each lane.
struct Table8 {
  __m512i v;
};
inline Table8 table8(const uint32_t* p) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Ints pick(Table8 t, Ints index) { return {_mm512_permutexvar_epi32(index.v, t.v)}; }

// Sums over subsets of kSubset activations, by the low kSubset bits.
constexpr int kSubset = 4;
struct SubsetTable {
  __m512 v;
};
inline SubsetTable subset_table(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec pick(const SubsetTable& t, Ints index) { return {_mm512_permutexvar_ps(index.v, t.v)}; }

// The 27 signed sums of three activations (32 floats), by the low five bits.
struct TernaryTable {
  __m512 lo, hi;
};
inline TernaryTable ternary_table(const float* p) {
  return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)};
}
template <int kShift>
inline Vec pick(const TernaryTable& t, Ints codes) {
  const Ints index = kShift + 5 <= 16 ? field_at(codes, kShift) : shift_right(codes, kShift);
  return {_mm512_permutex2var_ps(t.lo, index.v, t.hi)};
}

// Sixteen entries by the low four bits.
struct PairTable {
  __m512 v;
};
inline PairTable pair_table(const float* p) { return {_mm512_loadu_ps(p)}; }
template <int kShift>
inline Vec pick(const PairTable& t, Ints codes) {
  return {_mm512_permutexvar_ps(shift_right(codes, kShift).v, t.v)};
}

// out[16 * j + i] = in[stride * i + j], of four bytes each
template <typename T>
inline void transpose_block(const T* ST_RESTRICT in, int64_t stride, T* ST_RESTRICT out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + stride * i);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
    const __m512i even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
    _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_storeu_si512(out + 16 * (4 + i), _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_storeu_si512(out + 16 * (8 + i), _mm512_shuffle_i32x4(even, even2, 0xDD));
    _mm512_storeu_si512(out + 16 * (12 + i), _mm512_shuffle_i32x4(odd, odd2, 0xDD));
  }
}

#elif defined(__AVX2__)

struct Ints {
  __m256i lo, hi;
};
inline Ints load_ints(const uint32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_ints(Ints a, uint32_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, a.hi);
}
inline Ints broadcast_int(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
inline Ints shift_right(Ints a, unsigned n) {
  return {_mm256_srli_epi32(a.lo, static_cast<int>(n)),
          _mm256_srli_epi32(a.hi, static_cast<int>(n))};
}
inline Ints shift_left(Ints a, unsigned n) {
  return {_mm256_slli_epi32(a.lo, static_cast<int>(n)),
          _mm256_slli_epi32(a.hi, static_cast<int>(n))};
}
inline Ints field_at(Ints a, unsigned n) { return shift_right(a, n); }
inline Ints both(Ints a, Ints b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline Ints either(Ints a, Ints b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
inline Ints without(Ints a, Ints b) {
  return {_mm256_andnot_si256(b.lo, a.lo), _mm256_andnot_si256(b.hi, a.hi)};
}
inline Ints add(Ints a, Ints b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline Ints sub(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline Ints add_where(Ints a, uint32_t bits, uint32_t x) {
  return add(a, both({lane_mask(bits), lane_mask(bits >> 8)}, broadcast_int(x)));
}

struct Table8 {
  __m256i v;
};
inline Table8 table8(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Ints pick(Table8 t, Ints index) {
  return {_mm256_permutevar8x32_epi32(t.v, index.lo), _mm256_permutevar8x32_epi32(t.v, index.hi)};
}

constexpr int kSubset = 3;
struct SubsetTable {
  __m256 v;
};
inline SubsetTable subset_table(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec pick(const SubsetTable& t, Ints index) {
  return {_mm256_permutevar8x32_ps(t.v, index.lo), _mm256_permutevar8x32_ps(t.v, index.hi)};
}

// Entry 26 - i is minus entry i, so those from the middle on are enough.
struct TernaryTable {
  __m256 lo, hi;
};
inline TernaryTable ternary_table(const float* p) {
  return {_mm256_loadu_ps(p + 13), _mm256_loadu_ps(p + 21)};
}
template <int kShift>
inline __m256 pick_half(const TernaryTable& t, __m256i codes) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, kShift), _mm256_set1_epi32(31));
  const __m256i from_middle = _mm256_sub_epi32(code, _mm256_set1_epi32(13));
  const __m256i index = _mm256_abs_epi32(from_middle);
  const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  const __m256 sum = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.lo, index),
                                      _mm256_permutevar8x32_ps(t.hi, index), fourth);
  const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(from_middle), _mm256_set1_ps(-0.0f));
  return _mm256_xor_ps(sum, sign);
}
template <int kShift>
inline Vec pick(const TernaryTable& t, Ints codes) {
  return {pick_half<kShift>(t, codes.lo), pick_half<kShift>(t, codes.hi)};
}

struct PairTable {
  __m256 lo, hi;
};
inline PairTable pair_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
template <int kShift>
inline __m256 pick_half(const PairTable& t, __m256i codes) {
  const __m256i index = _mm256_srli_epi32(codes, kShift);
  const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - kShift));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.lo, index),
                          _mm256_permutevar8x32_ps(t.hi, index), fourth);
}
template <int kShift>
inline Vec pick(const PairTable& t, Ints codes) {
  return {pick_half<kShift>(t, codes.lo), pick_half<kShift>(t, codes.hi)};
}

template <typename T>
inline void transpose8(const T* ST_RESTRICT in, int64_t stride, T* ST_RESTRICT out) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + stride * i));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * i),
                        _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * (4 + i)),
                        _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
  }
}
template <typename T>
inline void transpose_block(const T* ST_RESTRICT in, int64_t stride, T* ST_RESTRICT out) {
  transpose8(in, stride, out);
  transpose8(in + 8, stride, out + 128);
  transpose8(in + 8 * stride, stride, out + 8);
  transpose8(in + 8 * stride + 8, stride, out + 136);
}

#else

struct Ints {
  uint32_t v[16];
};
inline Ints load_ints(const uint32_t* p) {
  Ints a;
  std::memcpy(a.v, p, sizeof(a.v));
  return a;
}
inline void store_ints(Ints a, uint32_t* p) { std::memcpy(p, a.v, sizeof(a.v)); }
inline Ints broadcast_int(uint32_t x) {
  Ints a;
  for (uint32_t& lane : a.v) lane = x;
  return a;
}
inline Ints shift_right(Ints a, unsigned n) {
  for (uint32_t& lane : a.v) lane >>= n;
  return a;
}
inline Ints shift_left(Ints a, unsigned n) {
  for (uint32_t& lane : a.v) lane <<= n;
  return a;
}
inline Ints field_at(Ints a, unsigned n) { return shift_right(a, n); }
inline Ints both(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] &= b.v[i];
  return a;
}
inline Ints either(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] |= b.v[i];
  return a;
}
inline Ints without(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] &= ~b.v[i];
  return a;
}
inline Ints add(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints sub(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Ints add_where(Ints a, uint32_t bits, uint32_t x) {
  for (int i = 0; i < 16; ++i) a.v[i] += x & -((bits >> i) & 1);
  return a;
}

struct Table8 {
  const uint32_t* p;
};
inline Table8 table8(const uint32_t* p) { return {p}; }
inline Ints pick(Table8 t, Ints index) {
  for (uint32_t& lane : index.v) lane = t.p[lane & 7];
  return index;
}

constexpr int kSubset = 4;
struct SubsetTable {
  const float* p;
};
inline SubsetTable subset_table(const float* p) { return {p}; }
inline Vec pick(const SubsetTable& t, Ints index) {
  Vec a;
  for (int i = 0; i < 16; ++i) a.v[i] = t.p[index.v[i] & 15];
  return a;
}

struct TernaryTable {
  const float* p;
};
inline TernaryTable ternary_table(const float* p) { return {p}; }
template <int kShift>
inline Vec pick(const TernaryTable& t, Ints codes) {
  Vec a;
  for (int i = 0; i < 16; ++i) a.v[i] = t.p[codes.v[i] >> kShift & 31];
  return a;
}

struct PairTable {
  const float* p;
};
inline PairTable pair_table(const float* p) { return {p}; }
template <int kShift>
inline Vec pick(const PairTable& t, Ints codes) {
  Vec a;
  for (int i = 0; i < 16; ++i) a.v[i] = t.p[codes.v[i] >> kShift & 15];
  return a;
}

template <typename T>
inline void transpose_block(const T* ST_RESTRICT in, int64_t stride, T* ST_RESTRICT out) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[16 * j + i] = in[stride * i + j];
}

#endif

// The four groups of a code word, a byte each: d0 + 3 d1 + 9 d2 + 32 d3.
inline uint32_t group_bytes(uint32_t code) {
#if defined(__BMI2__)
  return _pdep_u32(code, 0x1F1F1F1Fu) | _pdep_u32(code >> 20, 0x60606060u);
#else
  uint32_t bytes = 0;
  for (int g = 0; g < kGroups; ++g)
    bytes |= ((code >> (5 * g) & 31) | (code >> (20 + 2 * g) & 3) << 5) << (8 * g);
  return bytes;
#endif
}

// A mask and the signs of its weights, row by row. words null: every weight is kept; signs null:
// they are made from the key.
struct Planes {
  const uint32_t* words;
  const uint32_t* signs;
  int64_t rows, k;
  uint32_t key, high;
};

constexpr int64_t kTileRows = 64;  // whose words a thread reads before it goes on to the next ones

// lanes[16 * j + i]: word w + j of row + i of a plane, for sixteen words and rows; past the ends,
// 0.
inline void plane_by_lane(const uint32_t* ST_RESTRICT plane, const Planes& p, int64_t row,
                          int64_t w, uint32_t* ST_RESTRICT lanes) {
  const int64_t stride = row_words(p.k);
  const int64_t rows = p.rows - row < 16 ? p.rows - row : 16;
  const int64_t n = stride - w < 16 ? stride - w : 16;
  const uint32_t* const from = plane + row * stride + w;
  // Rows are far apart, so the processor does not see which line comes next.
  for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(from + (kTileRows + i) * stride, 0, 2);
  if (rows == 16 && n == 16) return transpose_block(from, stride, lanes);
  uint32_t block[256] = {};
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(block + 16 * i, from + i * stride, static_cast<size_t>(n) * 4);
  transpose_block(block, 16, lanes);
}

// The sign words that the generator makes for the same place; past the ends, anything.
inline void signs_by_lane(const Planes& p, int64_t row, int64_t w, uint32_t* ST_RESTRICT lanes) {
  const int64_t stride = row_words(p.k);
  for (int64_t j = 0; j < 16 && w + j < stride; j += 2)
    philox_rows(static_cast<uint64_t>((row * stride + w + j) / 2),
                static_cast<uint64_t>(stride / 2), p.key, p.high, lanes + 16 * j);
}

// Both planes; if all weights are kept, only `negative` is written.
inline void planes_by_lane(const Planes& p, int64_t row, int64_t w, uint32_t* ST_RESTRICT kept,
                           uint32_t* ST_RESTRICT negative) {
  if (p.signs)
    plane_by_lane(p.signs, p, row, w, negative);
  else
    signs_by_lane(p, row, w, negative);
  if (p.words) plane_by_lane(p.words, p, row, w, kept);
}

}  // namespace
}  // namespace st
