#include "core.h"

namespace st::ST_ISA {
namespace {

struct BitWriter {
  uint8_t* payload;  // zeroed by the caller; null: count only
  int64_t bits = 0;
  void ones(int64_t n) {
    if (payload)
      for (int64_t i = bits; i < bits + n; ++i)
        payload[i >> 3] = static_cast<uint8_t>(payload[i >> 3] | 1u << (i & 7));
    bits += n;
  }
  void low_bits(int64_t value, int n) {
    if (payload)
      for (int i = 0; i < n; ++i)
        payload[(bits + i) >> 3] =
            static_cast<uint8_t>(payload[(bits + i) >> 3] | ((value >> i) & 1) << ((bits + i) & 7));
    bits += n;
  }
};

}  // namespace

// Bits written; the format is told in reference/rice_encode.py.
int64_t rice_encode(const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int parameter,
                    uint8_t* ST_RESTRICT payload) {
  BitWriter writer{payload};
  const int64_t words_a_row = row_words(k);
  int64_t previous = -1;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t w = 0; w < words_a_row; ++w)
      for (uint32_t word = words[row * words_a_row + w] & weight_bits(k, w); word;
           word &= word - 1) {
        const int64_t position = row * k + 32 * w + __builtin_ctz(word);
        const int64_t gap = position - previous - 1;
        previous = position;
        writer.ones(gap >> parameter);
        writer.bits += 1;  // the zero that ends the unary part
        writer.low_bits(gap, parameter);
      }
  return writer.bits;
}

}  // namespace st::ST_ISA
