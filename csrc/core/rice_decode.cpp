#include "core.h"

namespace st::ST_ISA {

// False unless the payload is exactly the code of `kept` ones in rows*k weights. words: zeroed.
bool rice_decode(const uint8_t* ST_RESTRICT payload, int64_t bytes, uint32_t* ST_RESTRICT words,
                 int64_t rows, int64_t k, int64_t kept, int parameter) {
  const int64_t bits = 8 * bytes, words_a_row = row_words(k);
  const auto bit = [payload](int64_t i) { return (payload[i >> 3] >> (i & 7)) & 1; };
  int64_t at = 0, position = -1, row = 0;
  for (int64_t n = 0; n < kept; ++n) {
    int64_t quotient = 0;
    while (at < bits && bit(at)) ++at, ++quotient;
    ++at;
    if (at + parameter > bits) return false;
    int64_t low = 0;
    for (int i = 0; i < parameter; ++i, ++at) low |= static_cast<int64_t>(bit(at)) << i;
    position += (quotient << parameter) + low + 1;
    if (position >= rows * k) return false;
    while (position >= (row + 1) * k) ++row;
    const int64_t column = position - row * k;
    words[row * words_a_row + (column >> 5)] |= 1u << (column & 31);
  }
  if (bits - at >= 8) return false;
  for (; at < bits; ++at)
    if (bit(at)) return false;
  return true;
}

}  // namespace st::ST_ISA
