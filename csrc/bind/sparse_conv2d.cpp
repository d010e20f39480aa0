#include "conv.h"

namespace st {
namespace {

// The number of int32 of a tensor of taps.
int64_t taps_size(const Conv& c, const ConvPlan& plan, int64_t live) {
  return kTapHeader + plan.blocks * c.outputs + 1 + 2 * live;
}

// taps: None to learn the size of the tensor that is needed.
int64_t conv2d_taps(py::object words, py::object taps, const Shape& x, const Shape& y,
                    const Geometry& geometry) {
  const Tensor tm(words, "words");
  const auto tt = maybe(taps, "taps");
  const Conv c = conv_of(x, y, geometry);
  const uint32_t* mask = mask_of(tm, c);
  const int64_t live = count_of(tm, 1);
  const ConvPlan plan = plan_of(c, live);
  const int64_t size = taps_size(c, plan, live);
  if (!tt) return size;
  int32_t* out = tt->sized(size).of(kInt, 32).data<int32_t>();
  const auto columns = scratch_of<Column>(conv_columns(c));
  py::gil_scoped_release release;
  kernels().conv2d_taps(mask, c, plan, columns.get(), out, live);
  return size;
}

// Taps made for this geometry: the size holds the number of blocks, the header the image's size.
const int32_t* taps_of(const Tensor& taps, const ConvCall& call, int64_t live) {
  const Conv& c = call.conv;
  const int64_t size = taps_size(c, call.plan, live);
  const int32_t* t = taps.sized(size).of(kInt, 32).data<int32_t>();
  if (t[0] != c.height || t[1] != c.width || t[size - 2 * live - 1] != live)
    taps.fail("was made for another image size or mask");
  return t;
}

void sparse_conv2d(py::object x, py::object values, py::object taps, py::object bias, py::object y,
                   const Geometry& geometry, int nthreads) {
  const Tensor tx(x, "x"), tv(values, "values"), tt(taps, "taps"), ty(y, "y");
  const int64_t live = tv.size();
  const ConvCall c = conv_call(tx, live, maybe(bias, "bias"), ty, geometry, nthreads);
  const int32_t* t = taps_of(tt, c, live);
  float* stream = kept_scratch(Slot::stream, live);
  const float* v = tv.floats();
  py::gil_scoped_release release;
  kernels().sparse_conv2d(c.x, v, t, c.bias, c.y, c.conv, c.plan, c.scratch, stream, live,
                          nthreads);
}

void sparse_conv2d_dw(py::object x, py::object grad, py::object words, py::object out,
                      const Geometry& geometry, int nthreads) {
  const Tensor tx(x, "x"), tg(grad, "grad"), tm(words, "words"), to(out, "out");
  const Conv c = conv_of(shape_of(tx), shape_of(tg), geometry);
  const uint32_t* mask = mask_of(tm, c);
  const int64_t live = count_of(tm, checked_threads(nthreads));
  ConvPlan plan = plan_of(c, live);
  plan.block_channels = c.channels / c.groups;
  plan.blocks = 1;
  const float *px = tx.floats(), *pg = tg.floats();
  float* po = to.sized(live).floats();
  const auto columns = scratch_of<Column>(conv_columns(c));
  const auto starts = scratch_of<int32_t>(c.outputs + 1), offsets = scratch_of<int32_t>(live);
  const auto flat = scratch_of<float>(nthreads * 16 * plan.vectors);
  const auto sums = scratch_of<float>(nthreads * 16 * conv_columns(c));
  float* planes = kept_scratch(Slot::planes, grad_planes_floats(c, plan));
  const TapScratch taps{columns.get(), starts.get(), offsets.get(), nullptr};
  py::gil_scoped_release release;
  kernels().sparse_conv2d_dw(px, pg, mask, po, c, plan, taps, {planes, flat.get(), sums.get()},
                             live, nthreads);
}

}  // namespace

void bind_sparse_conv2d(py::module_& m) {
  m.def("conv2d_taps", &conv2d_taps);
  m.def("sparse_conv2d", &sparse_conv2d);
  m.def("sparse_conv2d_dw", &sparse_conv2d_dw);
}

}  // namespace st
