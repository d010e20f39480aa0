#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

// Bits of up to 64 bytes.
inline uint64_t gather(const uint8_t* ST_RESTRICT mask, int64_t n) {
  if (n >= 64) return nonzero_bytes(mask);
  uint8_t padded[64] = {};
  std::memcpy(padded, mask, static_cast<size_t>(n));
  return nonzero_bytes(padded);
}

void pack_row(const uint8_t* ST_RESTRICT in, const Layout& layout, uint32_t* ST_RESTRICT out) {
  const int64_t columns = columns_of(layout), block = block_size(layout);
  if (layout.taps == 1) {
    for (int64_t at = 0; at < columns; at += 64)
      store_unit(out + (at >> 5), gather(in + at, columns - at));
    return;
  }
  std::memset(out, 0, static_cast<size_t>(4 * row_words(columns)));
  for (int64_t at = 0; at < columns; at += block) {
    uint64_t memory[kBlockUnits];
    for (int64_t i = 0; i < block && at + i < columns; i += 64)
      memory[i >> 6] = gather(in + at + i, columns - at - i);
    canonical_bits(memory, layout, at, out);
  }
}

}  // namespace

void pack_mask(const uint8_t* ST_RESTRICT mask, uint32_t* ST_RESTRICT words, Layout layout,
               int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row)
    pack_row(mask + row * columns, layout, words + row * words_a_row);
}

}  // namespace st::ST_ISA
