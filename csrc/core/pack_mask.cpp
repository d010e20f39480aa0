#include "core.h"

namespace st::ST_ISA {
namespace {

// Bits of n <= 32 bytes: 1 where a byte is not 0. (torch stores bools as 0 and 1, but a view of
// other bytes as bool may hold anything.)
uint32_t gather(const uint8_t* ST_RESTRICT mask, int64_t n) {
  uint32_t bits = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, mask + i, 8);
    bytes |= bytes >> 4 & 0x0F0F0F0F0F0F0F0Fu;
    bytes |= bytes >> 2 & 0x0303030303030303u;
    bytes |= bytes >> 1;
    bytes &= 0x0101010101010101u;
    // The product moves the low bit of byte i to bit 56 + i.
    bits |= static_cast<uint32_t>(bytes * 0x0102040810204080u >> 56) << i;
  }
  for (; i < n; ++i) bits |= static_cast<uint32_t>(mask[i] != 0) << i;
  return bits;
}

}  // namespace

void pack_mask(const uint8_t* ST_RESTRICT mask, uint32_t* ST_RESTRICT words, Layout layout,
               int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    const uint8_t* const in = mask + row * columns;
    uint32_t* const out = words + row * words_a_row;
    int64_t tap = 0, channel = 0;
    for (int64_t w = 0; w < words_a_row; ++w) {
      const int64_t left = columns - 32 * w, n = left < 0 ? 0 : left < 32 ? left : 32;
      if (layout.taps == 1) {
        out[w] = n > 0 ? gather(in + 32 * w, n) : 0;
        continue;
      }
      uint32_t bits = 0;
      for (int64_t i = 0; i < n; ++i) {
        bits |= static_cast<uint32_t>(in[channel * layout.taps + tap] != 0) << i;
        if (++channel == layout.channels) channel = 0, ++tap;
      }
      out[w] = bits;
    }
  }
}

}  // namespace st::ST_ISA
