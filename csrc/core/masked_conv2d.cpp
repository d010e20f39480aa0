#include "core.h"
#include "direct_conv.h"

namespace st::ST_ISA {

void masked_conv2d(const float* ST_RESTRICT x, const float* ST_RESTRICT weight,
                   const uint32_t* ST_RESTRICT words, const float* ST_RESTRICT bias,
                   float* ST_RESTRICT y, Conv conv, float* ST_RESTRICT planes,
                   Tap* ST_RESTRICT taps, int nthreads) {
  const int64_t channels = conv.channels / conv.groups, spatial = conv.kernel_h * conv.kernel_w;
  const int64_t columns = channels * spatial, words_a_row = row_words(columns);
  const auto decode = [&](int64_t row, Tap* out) {
    int64_t live = 0;
    for (int64_t w = 0; w < words_a_row; ++w)
      for (uint32_t word = words[row * words_a_row + w] & weight_bits(columns, w); word;
           word &= word - 1) {
        const int64_t k = 32 * w + __builtin_ctz(word);
        const int64_t at = (k % channels) * spatial + k / channels;
        out[live++] = {tap_offset(conv, k), weight[row * columns + at]};
      }
    return live;
  };
  direct_conv(x, bias, y, conv, planes, taps, decode, nthreads);
}

}  // namespace st::ST_ISA
