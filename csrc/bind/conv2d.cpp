#include <array>

#include "bind.h"
#include "conv.h"

namespace st {
namespace {

// A mask's decoded taps, for the ops that are given none.
struct DecodedTaps {
  std::unique_ptr<Column[]> columns;
  std::unique_ptr<int32_t[]> starts, offsets;
  std::unique_ptr<float[]> values;

  DecodedTaps(const ConvCall& call, int64_t live)
      : columns(scratch_of<Column>(conv_columns(call.conv))),
        starts(scratch_of<int32_t>(call.plan.blocks * call.conv.outputs + 1)),
        offsets(scratch_of<int32_t>(live)),
        values(scratch_of<float>(live)) {}
  TapScratch scratch() const { return {columns.get(), starts.get(), offsets.get(), values.get()}; }
};

void masked_conv2d(py::object x, py::object weight, py::object words, py::object bias, py::object y,
                   const Geometry& geometry, int nthreads) {
  const Tensor tx(x, "x"), tw(weight, "weight"), tm(words, "words"), ty(y, "y");
  const int64_t live = count_of(tm, checked_threads(nthreads));
  const ConvCall c = conv_call(tx, live, maybe(bias, "bias"), ty, geometry, nthreads);
  const uint32_t* mask = mask_of(tm, c.conv);
  const float* w = tw.sized(c.conv.outputs * conv_columns(c.conv)).floats();
  const DecodedTaps taps(c, live);
  py::gil_scoped_release release;
  kernels().masked_conv2d(c.x, w, mask, c.bias, c.y, c.conv, c.plan, c.scratch, taps.scratch(),
                          nthreads);
}

void ticket_conv2d(py::object x, py::object words, py::object signs, py::object bias, py::object y,
                   const Geometry& geometry, float sigma, uint32_t key, uint32_t high,
                   int nthreads) {
  const Tensor tx(x, "x"), tm(words, "words"), ty(y, "y");
  const auto ts = maybe(signs, "signs");
  const int64_t live = count_of(tm, checked_threads(nthreads));
  const ConvCall c = conv_call(tx, live, maybe(bias, "bias"), ty, geometry, nthreads);
  const uint32_t* mask = mask_of(tm, c.conv);
  if (ts) ts->of(kInt, 32).sized(tm.size());
  const DecodedTaps taps(c, live);
  py::gil_scoped_release release;
  kernels().ticket_conv2d(c.x, mask, optional_data<uint32_t>(ts), c.bias, c.y, c.conv, sigma, key,
                          high, c.plan, c.scratch, taps.scratch(), nthreads);
}

}  // namespace

void bind_conv2d(py::module_& m) {
  m.def("masked_conv2d", &masked_conv2d);
  m.def("ticket_conv2d", &ticket_conv2d);
}

}  // namespace st
