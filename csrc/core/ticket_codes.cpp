#include "lookup.h"

namespace st::ST_ISA {
namespace {

constexpr int64_t kSlabWords = 128;  // of a row at a time

// What a one in bit i of a chunk adds to its code.
inline uint32_t place(int64_t i) {
  constexpr uint32_t power[4] = {1, 3, 9, 0};
  return i % 4 == 3 ? 1u << (20 + i / 4 * 2) : power[i % 4] << (i / 4 * 5);
}

// The sum of place(i) over the sixteen low bits; `sums`: of the lowest three.
inline Ints places(Table8 sums, Ints bits) {
  Ints out = pick(sums, shift_right(bits, 12));
  for (unsigned shift = 12; shift > 0; shift -= 4)
    out = add(shift_left(out, 5), pick(sums, shift_right(bits, shift - 4)));
  Ints fourth = both(shift_right(bits, 3), broadcast_int(0x1111));
  fourth = both(either(fourth, shift_right(fourth, 2)), broadcast_int(0x0505));
  fourth = both(either(fourth, shift_right(fourth, 4)), broadcast_int(0x55));
  return either(out, shift_left(fourth, 20));
}

// Sixteen rows in the lanes, a slab of their words at a time.
void pack_rows(const Planes& p, int64_t row, uint32_t* ST_RESTRICT codes) {
  static constexpr uint32_t sums[8] = {0, 1, 3, 4, 9, 10, 12, 13};
  const Table8 table = table8(sums);
  const int64_t words_a_row = row_words(p.k), chunks = code_chunks(p.k);
  const int64_t stride = code_rows(p.rows);
  const uint32_t lanes = p.rows - row < 16 ? (1u << (p.rows - row)) - 1 : 0xFFFF;
  uint32_t kept[16 * kSlabWords], negative[16 * kSlabWords];
  for (int64_t slab = 0; slab < words_a_row; slab += kSlabWords) {
    const int64_t n = words_a_row - slab < kSlabWords ? words_a_row - slab : kSlabWords;
    for (int64_t w = 0; w < n; w += 16)
      planes_by_lane(p, row, slab + w, kept + 16 * w, negative + 16 * w);
    for (int64_t w = 0; w < n; ++w) {
      const Ints real = add_where(broadcast_int(0), lanes, weight_bits(p.k, slab + w));
      const Ints live = p.words ? both(real, load_ints(kept + 16 * w)) : real;
      const Ints sign = load_ints(negative + 16 * w);
      const Ints plus = without(live, sign), minus = both(live, sign);
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t c = 2 * (slab + w) + half;
        if (c >= chunks) break;
        const unsigned shift = 16 * half;
        const Ints code =
            sub(places(table, shift_right(plus, shift)), places(table, shift_right(minus, shift)));
        store_ints(add(code, broadcast_int(kNoWeights)), codes + c * stride + row);
      }
    }
  }
}

// Sixteen columns in the lanes, sixteen rows to a code.
void pack_columns(const Planes& p, int64_t chunk, uint32_t* ST_RESTRICT codes) {
  const int64_t words_a_row = row_words(p.k), stride = code_rows(p.k);
  const int64_t row = chunk * kCodeColumns;
  const int64_t rows = p.rows - row < kCodeColumns ? p.rows - row : kCodeColumns;
  uint32_t signs[kCodeColumns * kSlabWords];
  for (int64_t slab = 0; slab < words_a_row; slab += kSlabWords) {
    const int64_t n = words_a_row - slab < kSlabWords ? words_a_row - slab : kSlabWords;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t from = (row + i) * words_a_row + slab;
      uint32_t* const to = signs + i * kSlabWords;
      if (p.signs)
        std::memcpy(to, p.signs + from, static_cast<size_t>(n) * 4);
      else
        philox_run<true>(static_cast<uint64_t>(from / 2), n / 2, p.key, p.high, to);
    }
    for (int64_t w = 0; w < n && 32 * (slab + w) < stride; ++w) {
      Ints low = broadcast_int(kNoWeights), high = low;
      const uint32_t real = weight_bits(p.k, slab + w);
      for (int64_t i = 0; i < rows; ++i) {
        const uint32_t live = p.words ? real & p.words[(row + i) * words_a_row + slab + w] : real;
        const uint32_t negative = live & signs[i * kSlabWords + w], positive = live & ~negative;
        const uint32_t one = place(i);
        low = add_where(add_where(low, positive & 0xFFFF, one), negative & 0xFFFF, -one);
        high = add_where(add_where(high, positive >> 16, one), negative >> 16, -one);
      }
      uint32_t* const to = codes + chunk * stride + 32 * (slab + w);
      store_ints(low, to);
      if (32 * (slab + w) + 16 < stride) store_ints(high, to + 16);
    }
  }
}

}  // namespace

void ticket_codes(const uint32_t* ST_RESTRICT words, const uint32_t* ST_RESTRICT signs,
                  uint32_t* ST_RESTRICT codes, int64_t rows, int64_t k, bool transposed,
                  uint32_t key, uint32_t high, int nthreads) {
  const Planes planes{words, signs, rows, k, key, high};
  const int64_t jobs = transposed ? code_chunks(rows) : code_rows(rows) / 16;
#pragma omp parallel for num_threads(threads_for(rows* k, nthreads)) schedule(static)
  for (int64_t job = 0; job < jobs; ++job) {
    if (transposed)
      pack_columns(planes, job, codes);
    else
      pack_rows(planes, 16 * job, codes);
  }
}

}  // namespace st::ST_ISA
