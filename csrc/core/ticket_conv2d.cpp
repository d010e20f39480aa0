#include "core.h"
#include "philox.h"
#include "sparse_conv.h"

namespace st::ST_ISA {

void ticket_conv2d(const float* ST_RESTRICT x, const uint32_t* ST_RESTRICT words,
                   const uint32_t* ST_RESTRICT signs, const float* ST_RESTRICT bias,
                   float* ST_RESTRICT y, Conv conv, float sigma, uint32_t key, uint32_t high,
                   ConvPlan plan, ConvScratch scratch, TapScratch taps, int nthreads) {
  const int64_t units = row_words(conv_columns(conv)) / 2;
  uint32_t made[2];
  int64_t unit = -1;  // the one whose signs `made` holds
  decode_taps(words, conv, plan, taps.columns, taps.starts, taps.offsets,
              [&](int32_t to, int64_t row, int64_t k, int64_t) {
                const int64_t at = row * units + k / 64;
                if (!signs && at != unit) philox_run<true>(unit = at, 1, key, high, made);
                const uint32_t* const negative = signs ? signs + 2 * at : made;
                const bool minus = (negative[k / 32 % 2] >> (k % 32)) & 1;
                taps.values[to] = minus ? -sigma : sigma;
              });
  sparse_convolution(x, {taps.starts, taps.offsets, taps.values}, bias, y, conv, plan, scratch,
                     nthreads);
}

}  // namespace st::ST_ISA
