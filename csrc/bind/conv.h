// What the bindings of convolutions share: the geometry, checked once, and scratch memory.
#pragma once

#include <array>
#include <memory>

#include "bind.h"

namespace st {

using Geometry = std::array<int64_t, 9>;  // kernel, stride, padding, dilation (h, w each), groups
using Shape = std::array<int64_t, 4>;     // batch, channels, height, width

inline Shape shape_of(const Tensor& t) {
  if (t.ndim() != 4) t.fail("needs four dimensions");
  return {t.dim(0), t.dim(1), t.dim(2), t.dim(3)};
}

Conv conv_of(const Shape& x, const Shape& y, const Geometry& geometry);
ConvPlan plan_of(const Conv& conv, int64_t live);

template <typename T>
std::unique_ptr<T[]> scratch_of(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

// Scratch that the calling thread keeps from call to call: fresh pages of the size of an image cost
// as much as a sparse convolution of it.
enum class Slot { planes, sums, stream, count };
float* kept_scratch(Slot slot, int64_t n);

// Everything but the taps: pointers, checked against the geometry, and scratch memory.
struct ConvCall {
  Conv conv;
  ConvPlan plan;
  const float* x;
  const float* bias;
  float* y;
  ConvScratch scratch;
};

ConvCall conv_call(const Tensor& x, int64_t live, const std::optional<Tensor>& bias,
                   const Tensor& y, const Geometry& geometry, int nthreads);

inline const uint32_t* mask_of(const Tensor& words, const Conv& c) {
  return words.sized(c.outputs * row_words(conv_columns(c))).words();
}

// Live weights, and padding bits if any are set: enough room in any case.
inline int64_t count_of(const Tensor& words, int nthreads) {
  return kernels().mask_count(words.words(), nullptr, words.size(), false, nthreads);
}

}  // namespace st
