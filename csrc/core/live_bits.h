// Walking the set bits of packed rows: where live values lie in a dense row, and in which order.
#pragma once

#include "core.h"

namespace st {
namespace {

// Set bits that are weights, not padding, of one row.
inline int64_t live_in_row(const uint32_t* ST_RESTRICT words, int64_t k) {
  int64_t count = 0;
  for (int64_t w = 0; w < row_words(k); ++w)
    count += __builtin_popcount(words[w] & weight_bits(k, w));
  return count;
}

// starts[row]: how many live values lie before this row; starts[rows]: how many there are.
inline void row_starts(const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k,
                       int64_t* ST_RESTRICT starts) {
  starts[0] = 0;
  for (int64_t row = 0; row < rows; ++row)
    starts[row + 1] = starts[row] + live_in_row(words + row * row_words(k), k);
}

// visit(column) for every live column of a row, ascending.
template <typename Visit>
inline void for_live(const uint32_t* ST_RESTRICT words, int64_t k, const Visit& visit) {
  for (int64_t w = 0; w < row_words(k); ++w)
    for (uint32_t bits = words[w] & weight_bits(k, w); bits; bits &= bits - 1)
      visit(32 * w + __builtin_ctz(bits));
}

// Where the canonical columns of a row lie in torch's contiguous order, column after column.
struct Place {
  int64_t channels, taps, tap = 0, first = 0;  // first: canonical column of this tap's channel 0
  explicit Place(const Layout& layout) : channels(layout.channels), taps(layout.taps) {}
  int64_t of(int64_t column) {
    if (taps == 1) return column;
    while (column >= first + channels) first += channels, ++tap;
    return (column - first) * taps + tap;
  }
};

}  // namespace
}  // namespace st
