#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

// Appends bits, lowest first. Whole bytes leave the buffer after every call, eight written at a
// time; fewer than 8 bits stay.
struct BitWriter {
  uint8_t* out;
  const uint8_t* end;
  uint64_t buffer = 0;
  int64_t filled = 0, written = 0;      // bits
  bool put(uint64_t bits, int64_t n) {  // n <= 56
    if (end - out < 8) return false;
    buffer |= bits << filled;
    filled += n;
    written += n;
    std::memcpy(out, &buffer, 8);
    out += filled >> 3;
    buffer >>= filled & ~int64_t{7};
    filled &= 7;
    return true;
  }
};
struct BitCounter {
  int64_t written = 0;
  bool put(uint64_t, int64_t n) {
    written += n;
    return true;
  }
};

template <typename Sink>
int64_t encode(const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int parameter,
               Sink sink) {
  constexpr int64_t kRun = 25;  // with its end and 30 low bits at most 56
  const int64_t words_a_row = row_words(k);
  int64_t next = 0;  // the first position that is not coded yet
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t at = 0; at < k; at += 64)
      for (uint64_t unit = unit_at(words + row * words_a_row + (at >> 5)) & low_bits(k - at); unit;
           unit &= unit - 1) {
        const int64_t position = row * k + at + __builtin_ctzll(unit);
        const uint64_t gap = static_cast<uint64_t>(position - next);
        next = position + 1;
        int64_t ones = static_cast<int64_t>(gap >> parameter);
        for (; ones > kRun; ones -= kRun)
          if (!sink.put(low_bits(kRun), kRun)) return -1;
        const uint64_t low = gap & low_bits(parameter);
        if (!sink.put(low << (ones + 1) | low_bits(ones), ones + 1 + parameter)) return -1;
      }
  return sink.written;
}

}  // namespace

// Bits of the code, whose format is told in reference/rice_encode.py; payload null: count only.
// -1: the code and 8 bytes of room after it do not fit into `capacity` bytes.
int64_t rice_encode(const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int parameter,
                    uint8_t* ST_RESTRICT payload, int64_t capacity) {
  if (!payload) return encode(words, rows, k, parameter, BitCounter{});
  return encode(words, rows, k, parameter, BitWriter{payload, payload + capacity});
}

}  // namespace st::ST_ISA
