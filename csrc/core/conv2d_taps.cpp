#include "core.h"
#include "sparse_conv.h"

namespace st::ST_ISA {

void conv2d_taps(const uint32_t* ST_RESTRICT words, Conv conv, ConvPlan plan,
                 Column* ST_RESTRICT columns, int32_t* ST_RESTRICT taps, int64_t live) {
  taps[0] = static_cast<int32_t>(conv.height);
  taps[1] = static_cast<int32_t>(conv.width);
  int32_t* const starts = taps + kTapHeader;
  int32_t* const offsets = starts + plan.blocks * conv.outputs + 1;
  int32_t* const order = offsets + live;
  decode_taps(
      words, conv, plan, columns, starts, offsets,
      [&](int32_t to, int64_t, int64_t, int64_t rank) { order[to] = static_cast<int32_t>(rank); });
}

}  // namespace st::ST_ISA
