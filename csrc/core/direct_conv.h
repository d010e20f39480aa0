// Direct convolution over live taps: the input is copied once into zero-padded planes, so that
// every tap is one constant offset; eight vectors of output pixels stay in registers across all
// taps.
#pragma once

#include "core.h"
#include "simd.h"

namespace st {
namespace {

constexpr int64_t kBlocks = 8;

struct Block {
  int64_t base, out, pixels;  // offset in the padded plane, in the output plane, lanes in use
};

void pad_planes(const float* ST_RESTRICT x, float* ST_RESTRICT planes, const Conv& c,
                int nthreads) {
  const int64_t columns = c.width + 2 * c.pad_w, rows = c.height + 2 * c.pad_h;
#pragma omp parallel for num_threads(nthreads) schedule(static)
  for (int64_t plane = 0; plane < c.batch * c.channels; ++plane) {
    float* const to = planes + plane * rows * columns;
    const float* const from = x + plane * c.height * c.width;
    for (int64_t i = 0; i < rows * columns; ++i) to[i] = 0.0f;
    for (int64_t h = 0; h < c.height; ++h)
      for (int64_t w = 0; w < c.width; ++w)
        to[(h + c.pad_h) * columns + w + c.pad_w] = from[h * c.width + w];
  }
  const int64_t used = c.batch * c.channels * rows * columns;
  for (int64_t i = used; i < conv_planes_floats(c); ++i) planes[i] = 0.0f;
}

template <int kCount>
inline void blocks(const float* ST_RESTRICT input, const Tap* ST_RESTRICT taps, int64_t live,
                   const Block* block, int64_t stride, float bias, float* ST_RESTRICT y) {
  Vec acc[kCount];
  for (Vec& a : acc) a = broadcast(bias);
  for (int64_t t = 0; t < live; ++t) {
    const Vec weight = broadcast(taps[t].weight);
    const float* const p = input + taps[t].offset;
    for (int i = 0; i < kCount; ++i) {
      const float* const at = p + block[i].base;
      acc[i] = fma(weight, stride == 1 ? load(at) : load_strided(at, stride), acc[i]);
    }
  }
  for (int i = 0; i < kCount; ++i) store_first(acc[i], y + block[i].out, block[i].pixels);
}

// blocks<count> for a count known at run time: the accumulators must be registers.
template <int kCount = kBlocks>
inline void blocks_of(int64_t count, const float* ST_RESTRICT input, const Tap* ST_RESTRICT taps,
                      int64_t live, const Block* block, int64_t stride, float bias,
                      float* ST_RESTRICT y) {
  if (count == kCount)
    blocks<kCount>(input, taps, live, block, stride, bias, y);
  else if constexpr (kCount > 1)
    blocks_of<kCount - 1>(count, input, taps, live, block, stride, bias, y);
}

// One output channel of one image.
void convolve(const float* ST_RESTRICT input, const Tap* ST_RESTRICT taps, int64_t live,
              const Conv& c, float bias, float* ST_RESTRICT y) {
  const int64_t columns = c.width + 2 * c.pad_w;
  Block block[kBlocks];
  int64_t filled = 0;
  for (int64_t h = 0; h < c.out_height; ++h) {
    for (int64_t w = 0; w < c.out_width; w += 16) {
      const int64_t left = c.out_width - w;
      block[filled++] = {h * c.stride_h * columns + w * c.stride_w, h * c.out_width + w,
                         left < 16 ? left : 16};
      if (filled == kBlocks) {
        blocks_of(filled, input, taps, live, block, c.stride_w, bias, y);
        filled = 0;
      }
    }
  }
  for (int64_t i = 0; i < filled; ++i) blocks<1>(input, taps, live, block + i, c.stride_w, bias, y);
}

// decode(output channel, taps) writes that channel's live taps and returns their number.
template <typename Decode>
void direct_conv(const float* ST_RESTRICT x, const float* ST_RESTRICT bias, float* ST_RESTRICT y,
                 const Conv& c, float* ST_RESTRICT planes, Tap* ST_RESTRICT taps,
                 const Decode& decode, int nthreads) {
  const int64_t plane = (c.height + 2 * c.pad_h) * (c.width + 2 * c.pad_w);
  const int64_t group_channels = c.channels / c.groups, group_outputs = c.outputs / c.groups;
  const int64_t per_row = group_channels * c.kernel_h * c.kernel_w;
  pad_planes(x, planes, c, nthreads);
  const int64_t share = (c.outputs + nthreads - 1) / nthreads;
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
  for (int thread = 0; thread < nthreads; ++thread) {
    Tap* const mine = taps + thread * per_row;
    const int64_t end = (thread + 1) * share < c.outputs ? (thread + 1) * share : c.outputs;
    for (int64_t o = thread * share; o < end; ++o) {
      const int64_t live = decode(o, mine);
      for (int64_t n = 0; n < c.batch; ++n) {
        const int64_t first = n * c.channels + (o / group_outputs) * group_channels;
        convolve(planes + first * plane, mine, live, c, bias ? bias[o] : 0.0f,
                 y + (n * c.outputs + o) * c.out_height * c.out_width);
      }
    }
  }
}

// Offset of canonical column k = s * channels + c of a row in the padded planes.
inline int64_t tap_offset(const Conv& c, int64_t k) {
  const int64_t channels = c.channels / c.groups, columns = c.width + 2 * c.pad_w;
  const int64_t s = k / channels, channel = k % channels;
  return channel * (c.height + 2 * c.pad_h) * columns + (s / c.kernel_w) * c.dilation_h * columns +
         (s % c.kernel_w) * c.dilation_w;
}

}  // namespace
}  // namespace st
