#include "core.h"
#include "direct_conv.h"
#include "philox.h"

namespace st::ST_ISA {

void ticket_conv2d(const float* ST_RESTRICT x, const uint32_t* ST_RESTRICT words,
                   const uint32_t* ST_RESTRICT signs, const float* ST_RESTRICT bias,
                   float* ST_RESTRICT y, Conv conv, float sigma, uint32_t key, uint32_t high,
                   float* ST_RESTRICT planes, Tap* ST_RESTRICT taps, int nthreads) {
  const int64_t columns = conv.channels / conv.groups * conv.kernel_h * conv.kernel_w;
  const int64_t words_a_row = row_words(columns);
  const auto decode = [&](int64_t row, Tap* out) {
    int64_t live = 0;
    for (int64_t w = 0; w < words_a_row; w += 2) {
      uint32_t made[2];
      if (!signs) philox_run<true>(row * (words_a_row / 2) + w / 2, 1, key, high, made);
      const uint32_t* const negative = signs ? signs + row * words_a_row + w : made;
      for (int half = 0; half < 2; ++half)
        for (uint32_t word = words[row * words_a_row + w + half] & weight_bits(columns, w + half);
             word; word &= word - 1) {
          const int bit = __builtin_ctz(word);
          const float weight = (negative[half] >> bit) & 1 ? -sigma : sigma;
          out[live++] = {tap_offset(conv, 32 * (w + half) + bit), weight};
        }
    }
    return live;
  };
  direct_conv(x, bias, y, conv, planes, taps, decode, nthreads);
}

}  // namespace st::ST_ISA
