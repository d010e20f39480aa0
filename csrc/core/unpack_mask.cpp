#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

void unpack_row(const uint32_t* ST_RESTRICT in, const Layout& layout, uint8_t* ST_RESTRICT out) {
  const int64_t columns = columns_of(layout), block = block_size(layout);
  for (int64_t at = 0; at < columns; at += block) {
    uint64_t memory[kBlockUnits];
    memory_bits(in, layout, at, memory);
    for (int64_t i = at; i < at + block && i < columns; i += 64) {
      const uint64_t bits = memory[(i - at) >> 6];
      if (i + 64 <= columns) {
        spread_bytes(bits, out + i);
      } else {
        uint8_t bytes[64];
        spread_bytes(bits, bytes);
        std::memcpy(out + i, bytes, static_cast<size_t>(columns - i));
      }
    }
  }
}

}  // namespace

void unpack_mask(const uint32_t* ST_RESTRICT words, uint8_t* ST_RESTRICT mask, Layout layout,
                 int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row)
    unpack_row(words + row * words_a_row, layout, mask + row * columns);
}

}  // namespace st::ST_ISA
