#include "bind.h"

namespace st {
namespace {

struct Linear {
  const void* x;
  const uint32_t* words;
  const void* bias;
  void* y;
  Dtype dtype;
  int64_t batch, rows, k;
};

Linear linear_of(const Tensor& x, const Tensor& words, const std::optional<Tensor>& bias,
                 const Tensor& y) {
  if (x.ndim() != 2 || y.ndim() != 2) x.fail("x and y need two dimensions");
  Linear l{};
  l.dtype = dtype_of(x);
  l.batch = x.dim(0), l.k = x.dim(1), l.rows = y.dim(1);
  l.x = x.data<void>();
  l.y = same_dtype(y, l.dtype).sized(l.batch * l.rows).data<void>();
  l.words = words.sized(l.rows * row_words(l.k)).words();
  l.bias = bias ? same_dtype(*bias, l.dtype).sized(l.rows).data<void>() : nullptr;
  return l;
}

void masked_linear(py::object x, py::object weight, py::object words, py::object bias, py::object y,
                   int nthreads) {
  const Tensor tx(x, "x"), tw(weight, "weight"), tm(words, "words"), ty(y, "y");
  const Linear l = linear_of(tx, tm, maybe(bias, "bias"), ty);
  const void* w = same_dtype(tw, l.dtype).sized(l.rows * l.k).data<void>();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().masked_linear(l.x, w, l.words, l.bias, l.y, l.dtype, l.batch, l.rows, l.k, nthreads);
}

}  // namespace

void bind_linear(py::module_& m) { m.def("masked_linear", &masked_linear); }

}  // namespace st
