#include "conv.h"

namespace st {
namespace {

[[noreturn]] void fail(const char* why) {
  throw py::value_error(std::string("sparseticket._C: convolution: ") + why);
}

}  // namespace

Conv conv_of(const Shape& x, const Shape& y, const Geometry& g) {
  for (const int64_t v : g)
    if (v < 0) fail("the geometry must not be negative");
  Conv c{x[0], x[1], x[2], x[3], y[1], y[2], y[3], g[0],
         g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]};
  if (c.groups < 1 || c.channels % c.groups || c.outputs % c.groups || c.stride_h < 1 ||
      c.stride_w < 1 || c.dilation_h < 1 || c.dilation_w < 1 || y[0] != c.batch)
    fail("x does not fit the geometry");
  const double padded = (2.0 * c.pad_h + c.height) * (2.0 * c.pad_w + c.width);
  if (padded * c.batch * c.channels > 1e15)  // so that no product of sizes below overflows
    fail("x: no memory holds it with this padding");
  if (c.out_height <= 1) c.stride_h = 1;  // a stride that is never taken
  if (c.out_width <= 1) c.stride_w = 1;
  const auto fits = [](int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride,
                       int64_t out) {
    return out == 0 || (out - 1) * stride + dilation * (kernel - 1) < in + 2 * pad;
  };
  if (!fits(c.height, c.pad_h, c.dilation_h, c.kernel_h, c.stride_h, c.out_height) ||
      !fits(c.width, c.pad_w, c.dilation_w, c.kernel_w, c.stride_w, c.out_width))
    fail("y is larger than the input allows");
  return c;
}

float* kept_scratch(Slot slot, int64_t n) {
  constexpr int64_t kAlignment = 64 / sizeof(float);
  struct Kept {
    std::unique_ptr<float[]> memory;
    int64_t size = 0;
  };
  thread_local Kept kept[static_cast<int>(Slot::count)];
  Kept& k = kept[static_cast<int>(slot)];
  if (k.size < n + kAlignment) {
    k.memory.reset();
    k.memory = scratch_of<float>(n + kAlignment);
    k.size = n + kAlignment;
  }
  const auto at = reinterpret_cast<uintptr_t>(k.memory.get());
  return reinterpret_cast<float*>((at + 63) / 64 * 64);
}

ConvPlan plan_of(const Conv& c, int64_t live) {
  const ConvPlan plan = make_conv_plan(c, live);
  if (c.channels * plan.channel_floats > INT32_MAX || live > INT32_MAX)
    fail("x is too large for 32-bit tap offsets");
  return plan;
}

ConvCall conv_call(const Tensor& x, int64_t live, const std::optional<Tensor>& bias,
                   const Tensor& y, const Geometry& geometry, int nthreads) {
  ConvCall call{};
  const Conv& c = call.conv = conv_of(shape_of(x), shape_of(y), geometry);
  call.plan = plan_of(c, live);
  call.x = x.floats();
  call.y = y.floats();
  call.bias = bias ? bias->sized(c.outputs).floats() : nullptr;
  checked_threads(nthreads);
  call.scratch = {kept_scratch(Slot::planes, nthreads * conv_image_floats(c, call.plan)),
                  kept_scratch(Slot::sums, nthreads * conv_sums_floats(c))};
  return call;
}

}  // namespace st
