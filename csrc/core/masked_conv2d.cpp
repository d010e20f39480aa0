#include "core.h"
#include "sparse_conv.h"

namespace st::ST_ISA {
namespace {

// A row of the weight on its way while the one before is gathered, at strides that hide from the
// hardware's prefetchers.
inline void fetch(const float* row, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(row + i);
}

}  // namespace

void masked_conv2d(const float* ST_RESTRICT x, const float* ST_RESTRICT weight,
                   const uint32_t* ST_RESTRICT words, const float* ST_RESTRICT bias,
                   float* ST_RESTRICT y, Conv conv, ConvPlan plan, ConvScratch scratch,
                   TapScratch taps, int nthreads) {
  const int64_t columns = conv_columns(conv);
  int64_t fetched = 0;
  decode_taps(words, conv, plan, taps.columns, taps.starts, taps.offsets,
              [&](int32_t to, int64_t row, int64_t k, int64_t) {
                if (row >= fetched && row + 1 < conv.outputs)
                  fetch(weight + (row + 1) * columns, columns);
                fetched = row + 1;
                taps.values[to] = weight[row * columns + taps.columns[k].place];
              });
  sparse_convolution(x, {taps.starts, taps.offsets, taps.values}, bias, y, conv, plan, scratch,
                     nthreads);
}

}  // namespace st::ST_ISA
