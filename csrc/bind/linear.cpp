#include <memory>

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

// x [batch, K], y [batch, O]; transposed: x [batch, O], y [batch, K].
void masked_linear_live(py::object x, py::object weight, py::object words, py::object bias,
                        py::object y, bool transposed, int nthreads) {
  const Tensor tx(x, "x"), tw(weight, "weight"), tm(words, "words"), ty(y, "y");
  if (tx.ndim() != 2 || tw.ndim() != 2 || ty.ndim() != 2) tx.fail("all need two dimensions");
  const Dtype dtype = dtype_of(tx);
  const int64_t batch = tx.dim(0), rows = tw.dim(0), k = tw.dim(1);
  const int64_t width = transposed ? rows : k, outputs = transposed ? k : rows;
  const auto tb = maybe(bias, "bias");
  if (tb) same_dtype(*tb, dtype).sized(outputs);
  const void* px = tx.sized(batch * width).data<void>();
  const void* pw = same_dtype(tw, dtype).data<void>();
  void* to = same_dtype(ty, dtype).sized(batch * outputs).data<void>();
  const uint32_t* bits = tm.sized(rows * row_words(k)).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  // On a cache line, or every vector of a panel would lie on two.
  const int64_t floats = masked_linear_floats(batch, width, transposed, nthreads);
  const std::unique_ptr<float[]> owned(new float[floats + 16]);
  float* const scratch = owned.get() + (-reinterpret_cast<uintptr_t>(owned.get()) % 64) / 4;
  kernels().masked_linear_live(px, pw, bits, optional_data<void>(tb), to, dtype, batch, rows, k,
                               transposed, scratch, nthreads);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("masked_linear", &masked_linear);
  m.def("masked_linear_live", &masked_linear_live);
}

}  // namespace st
