#include "core.h"
#include "sparse_conv.h"

namespace st::ST_ISA {

void sparse_conv2d(const float* ST_RESTRICT x, const float* ST_RESTRICT values,
                   const int32_t* ST_RESTRICT taps, const float* ST_RESTRICT bias,
                   float* ST_RESTRICT y, Conv conv, ConvPlan plan, ConvScratch scratch,
                   float* ST_RESTRICT stream, int64_t live, int nthreads) {
  const int32_t* const starts = taps + kTapHeader;
  const int32_t* const offsets = starts + plan.blocks * conv.outputs + 1;
  const int32_t* const order = offsets + live;
  const bool ordered = plan.blocks == 1;  // canonical order is the stream's
  const int threads = threads_for(live, nthreads);
  if (!ordered) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < live; ++i) stream[i] = values[order[i]];
  }
  sparse_convolution(x, {starts, offsets, ordered ? values : stream}, bias, y, conv, plan, scratch,
                     nthreads);
}

}  // namespace st::ST_ISA
