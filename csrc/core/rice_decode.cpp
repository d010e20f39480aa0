#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

struct BitReader {
  const uint8_t* payload;
  int64_t bytes, at = 0;  // at: in bits
  // The next 57 bits or more, zeros beyond the end.
  uint64_t peek() const {
    const int64_t byte = at >> 3;
    uint64_t window = 0;
    if (byte + 8 <= bytes)
      std::memcpy(&window, payload + byte, 8);
    else if (byte < bytes)
      std::memcpy(&window, payload + byte, static_cast<size_t>(bytes - byte));
    return window >> (at & 7);
  }
  // The number of ones before the next zero, which is skipped too; more than `most` is as good.
  int64_t run(int64_t most) {
    int64_t ones = 0;
    for (;;) {
      const int64_t n = __builtin_ctzll(~peek() | uint64_t{1} << 56);
      ones += n;
      at += n;
      if (n < 56 || ones > most) break;
    }
    ++at;
    return ones;
  }
};

}  // namespace

// False unless the payload is exactly the code of `kept` ones in rows*k weights. words: zeroed.
bool rice_decode(const uint8_t* ST_RESTRICT payload, int64_t bytes, uint32_t* ST_RESTRICT words,
                 int64_t rows, int64_t k, int64_t kept, int parameter) {
  const int64_t bits = 8 * bytes, words_a_row = row_words(k), most = rows * k >> parameter;
  BitReader reader{payload, bytes};
  int64_t position = -1, row_start = 0;
  uint32_t* row = words;
  for (int64_t n = 0; n < kept; ++n) {
    const int64_t quotient = reader.run(most);
    if (quotient > most || reader.at + parameter > bits) return false;
    const uint64_t low = reader.peek() & low_bits(parameter);
    reader.at += parameter;
    position += (quotient << parameter) + static_cast<int64_t>(low) + 1;
    if (position >= rows * k) return false;
    for (; position - row_start >= k; row_start += k) row += words_a_row;
    const int64_t column = position - row_start;
    row[column >> 5] |= 1u << (column & 31);
  }
  return bits - reader.at < 8 && reader.peek() == 0;
}

}  // namespace st::ST_ISA
