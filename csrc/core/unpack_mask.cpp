#include "core.h"

namespace st::ST_ISA {

void unpack_mask(const uint32_t* ST_RESTRICT words, uint8_t* ST_RESTRICT mask, Layout layout,
                 int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    const uint32_t* const in = words + row * words_a_row;
    uint8_t* const out = mask + row * columns;
    if (layout.taps == 1) {
      int64_t k = 0;
      for (; k + 8 <= columns; k += 8) {  // bit i of a byte to the low bit of byte i
        const uint64_t bits = (in[k >> 5] >> (k & 31)) & 0xFF;
        // The product has bit i at 8 * (7 - i) + 7, the shift puts it low in byte 7 - i.
        const uint64_t bytes =
            __builtin_bswap64((bits * 0x8040201008040201u >> 7) & 0x0101010101010101u);
        __builtin_memcpy(out + k, &bytes, 8);
      }
      for (; k < columns; ++k) out[k] = (in[k >> 5] >> (k & 31)) & 1;
      continue;
    }
    int64_t k = 0;
    for (int64_t s = 0; s < layout.taps; ++s)
      for (int64_t c = 0; c < layout.channels; ++c, ++k)
        out[c * layout.taps + s] = (in[k >> 5] >> (k & 31)) & 1;
  }
}

}  // namespace st::ST_ISA
