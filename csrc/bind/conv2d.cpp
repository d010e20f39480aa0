#include <array>
#include <memory>

#include "bind.h"

namespace st {
namespace {

using Geometry = std::array<int64_t, 9>;  // kernel, stride, padding, dilation (h, w each), groups

Conv conv_of(const Tensor& x, const Tensor& y, const Geometry& g) {
  if (x.ndim() != 4 || y.ndim() != 4) x.fail("x and y need four dimensions");
  for (const int64_t v : g)
    if (v < 0) x.fail("the geometry must not be negative");
  Conv c{x.dim(0), x.dim(1), x.dim(2), x.dim(3), y.dim(1), y.dim(2), y.dim(3), g[0],
         g[1],     g[2],     g[3],     g[4],     g[5],     g[6],     g[7],     g[8]};
  if (c.groups < 1 || c.channels % c.groups || c.outputs % c.groups || c.stride_h < 1 ||
      c.stride_w < 1 || c.dilation_h < 1 || c.dilation_w < 1 || y.dim(0) != c.batch)
    x.fail("does not fit the geometry");
  const double padded = (2.0 * c.pad_h + c.height) * (2.0 * c.pad_w + c.width);
  if (padded * c.batch * c.channels > 1e15)  // so that no product of sizes below overflows
    x.fail("no memory holds it with this padding");
  if (c.out_height <= 1) c.stride_h = 1;  // a stride that is never taken
  if (c.out_width <= 1) c.stride_w = 1;
  const auto fits = [](int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride,
                       int64_t out) {
    return out == 0 || (out - 1) * stride + dilation * (kernel - 1) < in + 2 * pad;
  };
  if (!fits(c.height, c.pad_h, c.dilation_h, c.kernel_h, c.stride_h, c.out_height) ||
      !fits(c.width, c.pad_w, c.dilation_w, c.kernel_w, c.stride_w, c.out_width))
    y.fail("is larger than the input allows");
  return c;
}

struct ConvCall {
  Conv conv;
  const float* x;
  const uint32_t* words;
  const float* bias;
  float* y;
  std::unique_ptr<float[]> planes;
  std::unique_ptr<Tap[]> taps;
};

ConvCall conv_call(const Tensor& x, const Tensor& words, const std::optional<Tensor>& bias,
                   const Tensor& y, const Geometry& geometry, int nthreads) {
  ConvCall call{};
  call.conv = conv_of(x, y, geometry);
  const Conv& c = call.conv;
  const int64_t columns = c.channels / c.groups * c.kernel_h * c.kernel_w;
  call.x = x.floats();
  call.y = y.floats();
  call.words = words.sized(c.outputs * row_words(columns)).words();
  call.bias = bias ? bias->sized(c.outputs).floats() : nullptr;
  checked_threads(nthreads);
  call.planes.reset(new float[static_cast<size_t>(conv_planes_floats(c))]);
  call.taps.reset(new Tap[static_cast<size_t>(columns * nthreads)]);
  return call;
}

void masked_conv2d(py::object x, py::object weight, py::object words, py::object bias, py::object y,
                   const Geometry& geometry, int nthreads) {
  const Tensor tx(x, "x"), tw(weight, "weight"), tm(words, "words"), ty(y, "y");
  const ConvCall c = conv_call(tx, tm, maybe(bias, "bias"), ty, geometry, nthreads);
  const float* w =
      tw.sized(c.conv.outputs * c.conv.channels / c.conv.groups * c.conv.kernel_h * c.conv.kernel_w)
          .floats();
  py::gil_scoped_release release;
  kernels().masked_conv2d(c.x, w, c.words, c.bias, c.y, c.conv, c.planes.get(), c.taps.get(),
                          nthreads);
}

void ticket_conv2d(py::object x, py::object words, py::object signs, py::object bias, py::object y,
                   const Geometry& geometry, float sigma, uint32_t key, uint32_t high,
                   int nthreads) {
  const Tensor tx(x, "x"), tm(words, "words"), ty(y, "y");
  const auto ts = maybe(signs, "signs");
  const ConvCall c = conv_call(tx, tm, maybe(bias, "bias"), ty, geometry, nthreads);
  if (ts) ts->of(kInt, 32).sized(tm.size());
  py::gil_scoped_release release;
  kernels().ticket_conv2d(c.x, c.words, optional_data<uint32_t>(ts), c.bias, c.y, c.conv, sigma,
                          key, high, c.planes.get(), c.taps.get(), nthreads);
}

}  // namespace

void bind_conv2d(py::module_& m) {
  m.def("masked_conv2d", &masked_conv2d);
  m.def("ticket_conv2d", &ticket_conv2d);
}

}  // namespace st
