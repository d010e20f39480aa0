#include "core.h"
#include "sparse_conv.h"

namespace st::ST_ISA {

void masked_conv2d(const float* ST_RESTRICT x, const float* ST_RESTRICT weight,
                   const uint32_t* ST_RESTRICT words, const float* ST_RESTRICT bias,
                   float* ST_RESTRICT y, Conv conv, ConvPlan plan, ConvScratch scratch,
                   TapScratch taps, int nthreads) {
  const int64_t channels = conv.channels / conv.groups, spatial = conv.kernel_h * conv.kernel_w;
  decode_taps(words, conv, plan, taps.columns, taps.starts, taps.offsets,
              [&](int32_t to, int64_t row, int64_t k, int64_t) {
                taps.values[to] = weight[(row * channels + k % channels) * spatial + k / channels];
              });
  sparse_convolution(x, {taps.starts, taps.offsets, taps.values}, bias, y, conv, plan, scratch,
                     nthreads);
}

}  // namespace st::ST_ISA
