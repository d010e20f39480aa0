// The derived tensor that tells kernels where the live weights of a matrix [rows, k] lie: int32
// words whose places depend on rows, k and the number of live weights only.
//
//   header    rows, k, kept, transposed
//   starts    [rows + 1]: where the values of a row begin
//   segments  [strip][block][row of the strip]: the values of one row within one block of columns,
//             in each strip and block the longest first, so that loop counts change rarely
//   columns   [kept]: 16 bits each, 32 if k > 65536
//   order     [kept], of a transposed pattern: which canonical value stands here
//
// Values stay in canonical order: a segment is a contiguous run of them.
#pragma once

#include "core.h"

namespace st {
namespace {

struct Segment {
  uint32_t start;
  uint16_t count, row;  // row within the strip
};

constexpr int64_t kStrip = 256;           // rows whose values stay in the second-level cache
constexpr int64_t kLongestBlock = 32768;  // counts are 16 bits

struct Pattern {
  int64_t rows, k, kept;
  int64_t block;  // columns that share a slice of the batch panel small enough for L1
  int64_t blocks, strips;
  int64_t segments, columns, order, words;  // offsets, and the end without order

  bool wide() const { return k > 65536; }
  int64_t words_of(bool transposed) const { return transposed ? order + kept : words; }
};

inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

inline int64_t block_for(int64_t rows, int64_t k, int64_t kept) {
  const double a_row = static_cast<double>(kept) / static_cast<double>(rows > 0 ? rows : 1);
  const double density = a_row / static_cast<double>(k > 0 ? k : 1);
  // Less than about a dozen values a segment cost more to start than L1 gives back.
  const int64_t block = density >= 0.15    ? 128
                        : density >= 0.075 ? 192
                        : density >= 0.03  ? 256
                                           : kLongestBlock;
  return k < block + block / 2 ? (k > 0 && k < kLongestBlock ? k : block) : block;
}

inline Pattern pattern_of(int64_t rows, int64_t k, int64_t kept) {
  Pattern p{};
  p.rows = rows, p.k = k, p.kept = kept;
  p.block = block_for(rows, k, kept);
  p.blocks = (k + p.block - 1) / p.block;
  p.strips = (rows + kStrip - 1) / kStrip;
  p.segments = 16 + padded16(rows + 1);
  p.columns = p.segments + padded16(2 * rows * p.blocks);
  p.order = p.columns + padded16(p.wide() ? kept : (kept + 1) / 2);
  p.words = p.order;
  return p;
}

// Scratch of sparse_linear: values in the pattern's order, a packed panel, a strip of sums each.
inline int64_t sparse_linear_floats(const Pattern& p, int nthreads) {
  return padded16(p.kept) + 64 * p.k + nthreads * kStrip * 64;
}
// Scratch of sparse_linear_dw: sums in float32 and a packed panel of either side.
inline int64_t sparse_linear_dw_floats(const Pattern& p) {
  return padded16(p.kept) + 64 * (p.k + p.rows);
}

}  // namespace
}  // namespace st
