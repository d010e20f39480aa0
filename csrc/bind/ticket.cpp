#include <memory>
#include <new>

#include "bind.h"

namespace st {
namespace {

constexpr std::align_val_t kLine{64};  // a vector that straddles two lines costs two loads
struct Free {
  void operator()(float* p) const { operator delete[](p, kLine); }
};

std::unique_ptr<float[], Free> scratch(int64_t floats) {
  return std::unique_ptr<float[], Free>(new (kLine) float[static_cast<size_t>(floats)]);
}

// x [batch, k], y [batch, rows] and the bias of a linear layer.
struct Linear {
  Linear(const Tensor& tx, const std::optional<Tensor>& tb, const Tensor& ty) {
    if (tx.ndim() != 2 || ty.ndim() != 2) tx.fail("x and y need two dimensions");
    dtype = dtype_of(tx);
    batch = tx.dim(0), k = tx.dim(1), rows = ty.dim(1);
    x = tx.data<void>();
    y = same_dtype(ty, dtype).sized(batch * rows).data<void>();
    bias = tb ? same_dtype(*tb, dtype).sized(rows).data<void>() : nullptr;
  }
  const void* x;
  const void* bias;
  void* y;
  Dtype dtype;
  int64_t batch, rows, k;
};

const uint32_t* plane(const std::optional<Tensor>& t, int64_t rows, int64_t k) {
  return t ? t->sized(rows * row_words(k)).words() : nullptr;
}

void ticket_codes(py::object words, py::object signs, py::object codes, int64_t rows, int64_t k,
                  bool transposed, uint32_t key, uint32_t high, int nthreads) {
  const Tensor tc(codes, "codes");
  const auto tw = maybe(words, "words"), ts = maybe(signs, "signs");
  const uint32_t *w = plane(tw, rows, k), *s = plane(ts, rows, k);
  const int64_t size =
      transposed ? code_chunks(rows) * code_rows(k) : code_chunks(k) * code_rows(rows);
  uint32_t* out = tc.sized(size).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().ticket_codes(w, s, out, rows, k, transposed, key, high, nthreads);
}

void ticket_linear(py::object x, py::object words, py::object signs, py::object bias, py::object y,
                   float sigma, uint32_t key, uint32_t high, int nthreads) {
  const Tensor tx(x, "x"), ty(y, "y");
  const auto tw = maybe(words, "words"), ts = maybe(signs, "signs"), tb = maybe(bias, "bias");
  const Linear l(tx, tb, ty);
  const uint32_t *w = plane(tw, l.rows, l.k), *s = plane(ts, l.rows, l.k);
  const auto tables = scratch(ticket_tables_floats(l.k));
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().ticket_linear(l.x, w, s, l.bias, l.y, l.dtype, l.batch, l.rows, l.k, sigma, key, high,
                          tables.get(), nthreads);
}

void lookup_linear(py::object x, py::object codes, py::object bias, py::object y, float sigma,
                   int nthreads) {
  const Tensor tx(x, "x"), tc(codes, "codes"), ty(y, "y");
  const auto tb = maybe(bias, "bias");
  const Linear l(tx, tb, ty);
  const uint32_t* c = tc.sized(code_chunks(l.k) * code_rows(l.rows)).words();
  const auto sums = scratch(lookup_sums_floats(checked_threads(nthreads)));
  py::gil_scoped_release release;
  kernels().lookup_linear(l.x, c, l.bias, l.y, l.dtype, l.batch, l.rows, l.k, sigma, sums.get(),
                          nthreads);
}

void popup_linear_ds(py::object grad, py::object scores, bool abs, float sigma, uint32_t key,
                     uint32_t high, int nthreads) {
  const Tensor tg(grad, "grad"), ts(scores, "scores");
  if (tg.ndim() != 2) tg.fail("needs two dimensions");
  float* g = tg.floats();
  const float* s = ts.sized(tg.size()).floats();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().popup_linear_ds(g, s, tg.dim(0), tg.dim(1), abs, sigma, key, high, nthreads);
}

}  // namespace

void bind_ticket(py::module_& m) {
  m.def("ticket_codes", &ticket_codes);
  m.def("ticket_linear", &ticket_linear);
  m.def("popup_linear_ds", &popup_linear_ds);
  m.def("lookup_linear", &lookup_linear);
}

}  // namespace st
