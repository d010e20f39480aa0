#include "sparse_pattern.h"

#include "live_bits.h"

namespace st::ST_ISA {
namespace {

template <typename Index>
void list_columns(const uint32_t* ST_RESTRICT words, const Pattern& p, uint32_t* ST_RESTRICT starts,
                  Index* ST_RESTRICT columns) {
  uint32_t at = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    starts[row] = at;
    for_live(words + row * row_words(p.k), p.k,
             [&](int64_t column) { columns[at++] = static_cast<Index>(column); });
  }
  starts[p.rows] = at;
}

// The same of the transposed matrix: words are those of [p.k, p.rows].
template <typename Index>
void list_transposed(const uint32_t* ST_RESTRICT words, const Pattern& p,
                     uint32_t* ST_RESTRICT starts, Index* ST_RESTRICT columns,
                     uint32_t* ST_RESTRICT order) {
  for (int64_t row = 0; row <= p.rows; ++row) starts[row] = 0;
  const int64_t words_a_row = row_words(p.rows);
  for (int64_t o = 0; o < p.k; ++o)
    for_live(words + o * words_a_row, p.rows, [&](int64_t row) { ++starts[row + 1]; });
  for (int64_t row = 0; row < p.rows; ++row) starts[row + 1] += starts[row];
  uint32_t at = 0;
  for (int64_t o = 0; o < p.k; ++o)
    for_live(words + o * words_a_row, p.rows, [&](int64_t row) {
      const uint32_t place = starts[row]++;
      columns[place] = static_cast<Index>(o);
      order[place] = at++;
    });
  for (int64_t row = p.rows; row > 0; --row) starts[row] = starts[row - 1];
  starts[0] = 0;
}

// Stable counting sort, the longest first.
void sort_segments(Segment* ST_RESTRICT segments, int64_t n, Segment* ST_RESTRICT copy,
                   int32_t* ST_RESTRICT places, int64_t longest) {
  for (int64_t c = 0; c <= longest; ++c) places[c] = 0;
  for (int64_t i = 0; i < n; ++i) {
    copy[i] = segments[i];
    ++places[copy[i].count];
  }
  int32_t at = 0;
  for (int64_t c = longest; c >= 0; --c) {
    const int32_t many = places[c];
    places[c] = at;
    at += many;
  }
  for (int64_t i = 0; i < n; ++i) segments[places[copy[i].count]++] = copy[i];
}

template <typename Index>
void cut_segments(const Pattern& p, const uint32_t* ST_RESTRICT starts,
                  const Index* ST_RESTRICT columns, Segment* ST_RESTRICT segments,
                  int32_t* ST_RESTRICT places) {
  Segment copy[kStrip];
  for (int64_t first = 0; first < p.rows; first += kStrip) {
    const int64_t n = p.rows - first < kStrip ? p.rows - first : kStrip;
    Segment* const strip = segments + first * p.blocks;
    for (int64_t r = 0; r < n; ++r) {
      uint32_t at = starts[first + r];
      const uint32_t end = starts[first + r + 1];
      for (int64_t b = 0; b < p.blocks; ++b) {
        const uint32_t start = at;
        while (at < end && columns[at] < (b + 1) * p.block) ++at;
        strip[b * n + r] = {start, static_cast<uint16_t>(at - start), static_cast<uint16_t>(r)};
      }
    }
    const int64_t longest = p.k < p.block ? p.k : p.block;
    for (int64_t b = 0; b < p.blocks; ++b) sort_segments(strip + b * n, n, copy, places, longest);
  }
}

template <typename Index>
void build(const uint32_t* ST_RESTRICT words, const Pattern& p, bool transposed,
           uint32_t* ST_RESTRICT pattern, int32_t* ST_RESTRICT places) {
  uint32_t* const starts = pattern + 16;
  Index* const columns = reinterpret_cast<Index*>(pattern + p.columns);
  if (transposed)
    list_transposed(words, p, starts, columns, pattern + p.order);
  else
    list_columns(words, p, starts, columns);
  cut_segments(p, starts, columns, reinterpret_cast<Segment*>(pattern + p.segments), places);
}

}  // namespace

// rows, k: of the pattern; a transposed one is made from the words of [k, rows]. places: scratch of
// kLongestBlock + 1. kept must be the number of live weights.
void sparse_pattern(const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int64_t kept,
                    bool transposed, uint32_t* ST_RESTRICT pattern, int32_t* ST_RESTRICT places) {
  const Pattern p = pattern_of(rows, k, kept);
  const int64_t header[] = {rows, k, kept, transposed};
  for (int64_t i = 0; i < p.words_of(transposed); ++i) pattern[i] = 0;
  for (int i = 0; i < 4; ++i) pattern[i] = static_cast<uint32_t>(header[i]);
  if (p.wide())
    build<uint32_t>(words, p, transposed, pattern, places);
  else
    build<uint16_t>(words, p, transposed, pattern, places);
}

}  // namespace st::ST_ISA
