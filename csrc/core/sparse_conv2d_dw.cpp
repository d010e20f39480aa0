#include "core.h"
#include "sparse_conv.h"

namespace st::ST_ISA {
namespace {

// sums[t] += the products of a tile of the gradient, held in registers, with what tap t reads.
template <int kCount>
inline void correlate(const float* ST_RESTRICT x, const float* ST_RESTRICT grad,
                      const int32_t* ST_RESTRICT offsets, int64_t live, float* ST_RESTRICT sums) {
  Vec g[kCount];
  for (int i = 0; i < kCount; ++i) g[i] = load(grad + 16 * i);
  for (int64_t t = 0; t < live; ++t) {
    const float* const p = x + offsets[t];
    Vec acc = load(sums + 16 * t);
    for (int i = 0; i < kCount; ++i) acc = fma(g[i], load(p + 16 * i), acc);
    store(acc, sums + 16 * t);
  }
}

template <int kCount = kTile>
inline void correlate_of(int64_t count, const float* ST_RESTRICT x, const float* ST_RESTRICT grad,
                         const int32_t* ST_RESTRICT offsets, int64_t live,
                         float* ST_RESTRICT sums) {
  if (count == kCount)
    correlate<kCount>(x, grad, offsets, live, sums);
  else if constexpr (kCount > 1)
    correlate_of<kCount - 1>(count, x, grad, offsets, live, sums);
}

// One output plane of the gradient on the flat axis: zeros where the axis has pad columns.
inline void flatten(const float* ST_RESTRICT grad, const Conv& c, const ConvPlan& plan,
                    float* ST_RESTRICT flat) {
  int64_t at = 0;
  for (int64_t h = 0; h < c.out_height; ++h)
    for (int64_t w = 0; w < (h + 1 < c.out_height ? plan.columns : c.out_width); ++w)
      flat[at++] = w < c.out_width ? grad[h * c.out_width + w] : 0.0f;
  while (at < 16 * plan.vectors) flat[at++] = 0.0f;
}

// The share of `images` images in the gradient of one output's live weights.
void correlate_row(const float* ST_RESTRICT x, const float* ST_RESTRICT grad, int64_t images,
                   const int32_t* ST_RESTRICT offsets, int64_t live, const Conv& c,
                   const ConvPlan& plan, float* ST_RESTRICT flat, float* ST_RESTRICT sums,
                   float* ST_RESTRICT out) {
  for (int64_t i = 0; i < 16 * live; ++i) sums[i] = 0.0f;
  const int64_t tiles = (plan.vectors + kTile - 1) / kTile;
  for (int64_t n = 0; n < images; ++n) {
    flatten(grad + n * c.outputs * c.out_height * c.out_width, c, plan, flat);
    const float* const image = x + n * c.channels * plan.channel_floats;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = plan.vectors * t / tiles;
      const int64_t count = plan.vectors * (t + 1) / tiles - first;
      correlate_of(count, image + 16 * first, flat + 16 * first, offsets, live, sums);
    }
  }
  for (int64_t t = 0; t < live; ++t) out[t] += sum(load(sums + 16 * t));
}

}  // namespace

void sparse_conv2d_dw(const float* ST_RESTRICT x, const float* ST_RESTRICT grad,
                      const uint32_t* ST_RESTRICT words, float* ST_RESTRICT out, Conv conv,
                      ConvPlan plan, TapScratch taps, GradScratch scratch, int64_t live,
                      int nthreads) {
  decode_taps(words, conv, plan, taps.columns, taps.starts, taps.offsets,
              [](int32_t, int64_t, int64_t, int64_t) {});
  for (int64_t i = 0; i < live; ++i) out[i] = 0.0f;
  const int64_t group_floats = conv.channels / conv.groups * plan.channel_floats;
  const int64_t group_outputs = conv.outputs / conv.groups;
  const int64_t image_floats = conv.height * conv.width;
  const int64_t grad_floats = conv.out_height * conv.out_width;
  const int64_t together = grad_images(conv, plan), planes = conv.channels * plan.channel_floats;
  for (int64_t i = 0; i < 16; ++i)
    scratch.planes[together * planes + i] = 0.0f;  // read past the last plane, times zeros
#pragma omp parallel num_threads(nthreads)
  for (int64_t n = 0; n < conv.batch; n += together) {
    const int64_t images = smaller(together, conv.batch - n);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * conv.channels; ++i)
      pad_channel(x + (n * conv.channels + i) * image_floats,
                  scratch.planes + i * plan.channel_floats, conv, plan);
#pragma omp for schedule(static)
    for (int thread = 0; thread < nthreads; ++thread)
      for (int64_t o = conv.outputs * thread / nthreads; o < conv.outputs * (thread + 1) / nthreads;
           ++o) {
        const int32_t first = taps.starts[o];
        correlate_row(scratch.planes + o / group_outputs * group_floats,
                      grad + (n * conv.outputs + o) * grad_floats, images, taps.offsets + first,
                      taps.starts[o + 1] - first, conv, plan,
                      scratch.flat + thread * 16 * plan.vectors,
                      scratch.sums + thread * 16 * conv_columns(conv), out + first);
      }
  }
}

}  // namespace st::ST_ISA
