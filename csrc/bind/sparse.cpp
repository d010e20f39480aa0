#include <memory>
#include <new>
#include <utility>

#include "../core/sparse_pattern.h"
#include "bind.h"

namespace st {
namespace {

using Starts = std::unique_ptr<int64_t[]>;

// Where the values of every row begin; fails unless there are `kept` of them.
Starts starts_of(const uint32_t* words, int64_t rows, int64_t k, int64_t kept) {
  Starts starts(new int64_t[static_cast<size_t>(rows + 1)]);
  kernels().live_starts(words, rows, k, starts.get());
  if (starts[static_cast<size_t>(rows)] != kept)
    throw py::value_error(
        "sparseticket._C: words: " + std::to_string(starts[static_cast<size_t>(rows)]) +
        " live weights, but there are " + std::to_string(kept) + " values");
  return starts;
}

void live_values(py::object dense, py::object words, py::object values, int64_t rows,
                 int64_t channels, int64_t taps, bool scatter, int nthreads) {
  const Layout layout = layout_of(rows, channels, taps);
  const Tensor d(dense, "dense"), w(words, "words"), v(values, "values");
  void* full = d.sized(rows * columns_of(layout)).data<void>();
  void* live = v.data<void>();
  const uint32_t* bits = w.sized(rows * row_words(layout)).words();
  const int64_t bytes = d.item_bytes();
  if (v.item_bytes() != bytes) v.fail("has another element size than dense");
  if (bytes != 2 && bytes != 4 && bytes != 8) v.fail("need 2-, 4- or 8-byte elements");
  checked_threads(nthreads);
  const Starts starts = starts_of(bits, rows, columns_of(layout), v.size());
  py::gil_scoped_release release;
  if (scatter)
    kernels().scatter_live(live, bits, full, starts.get(), bytes, layout, nthreads);
  else
    kernels().gather_live(full, bits, live, starts.get(), bytes, layout, nthreads);
}

void gather_live(py::object dense, py::object words, py::object values, int64_t rows,
                 int64_t channels, int64_t taps, int nthreads) {
  live_values(dense, words, values, rows, channels, taps, false, nthreads);
}

void scatter_live(py::object values, py::object words, py::object dense, int64_t rows,
                  int64_t channels, int64_t taps, int nthreads) {
  live_values(dense, words, values, rows, channels, taps, true, nthreads);
}

// Uninitialised floats on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(new (std::align_val_t(64)) float[static_cast<size_t>(floats)]) {}
  ~Scratch() { operator delete[](memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return memory_; }

 private:
  float* memory_;
};

Pattern checked_pattern(const Tensor& t, bool may_be_transposed) {
  const uint32_t* header = t.words();
  if (t.size() < 16) t.fail("is not made by sparse_pattern");
  const Pattern p = pattern_of(header[0], header[1], header[2]);
  if (header[3] > may_be_transposed || t.size() != p.words_of(header[3]))
    t.fail("is not made by sparse_pattern for this use");
  return p;
}

Batch batch_of(int64_t groups, int64_t samples, bool inner) {
  if (groups < 1 || samples < 1) throw py::value_error("sparseticket._C: batch: need a sample");
  return {groups, samples, inner};
}

int64_t pattern_words(int64_t rows, int64_t k, int64_t kept, bool transposed) {
  if (rows < 0 || k < 0 || kept < 0) throw py::value_error("sparseticket._C: sizes: need >= 0");
  return pattern_of(rows, k, kept).words_of(transposed);
}

// rows, k: of the words.
void sparse_pattern(py::object words, py::object pattern, int64_t rows, int64_t k, int64_t kept,
                    bool transposed) {
  const Tensor w(words, "words"), out(pattern, "pattern");
  const uint32_t* bits = w.sized(rows * row_words(k)).words();
  if (rows > UINT32_MAX || k > UINT32_MAX || kept > UINT32_MAX)
    throw py::value_error("sparseticket._C: words: the kernels list up to 2**32 - 1 weights");
  if (transposed) std::swap(rows, k);
  uint32_t* to = out.sized(pattern_words(rows, k, kept, transposed)).words();
  if (transposed)
    starts_of(bits, k, rows, kept);
  else
    starts_of(bits, rows, k, kept);
  py::gil_scoped_release release;
  const std::unique_ptr<int32_t[]> places(new int32_t[kLongestBlock + 1]);
  kernels().sparse_pattern(bits, rows, k, kept, transposed, to, places.get());
}

void sparse_linear(py::object x, py::object values, py::object pattern, py::object bias,
                   py::object y, int64_t groups, int64_t samples, bool inner, int nthreads) {
  const Tensor tx(x, "x"), tv(values, "values"), tp(pattern, "pattern"), ty(y, "y");
  const auto tb = maybe(bias, "bias");
  const Dtype dtype = dtype_of(tx);
  const Batch batch = batch_of(groups, samples, inner);
  const Pattern p = checked_pattern(tp, true);
  same_dtype(tv, dtype).sized(p.kept);
  same_dtype(ty, dtype).sized(groups * samples * p.rows);
  tx.sized(groups * samples * p.k);
  if (tb) same_dtype(*tb, dtype).sized(p.rows);
  checked_threads(nthreads);
  py::gil_scoped_release release;
  const Scratch scratch(sparse_linear_floats(p, nthreads));
  kernels().sparse_linear(tp.words(), tv.data<void>(), tx.data<void>(), optional_data<void>(tb),
                          ty.data<void>(), dtype, batch, scratch.data(), nthreads);
}

void sparse_linear_dw(py::object grad, py::object x, py::object pattern, py::object out,
                      int64_t groups, int64_t samples, bool inner, int nthreads) {
  const Tensor tg(grad, "grad"), tx(x, "x"), tp(pattern, "pattern"), to(out, "out");
  const Dtype dtype = dtype_of(tx);
  const Batch batch = batch_of(groups, samples, inner);
  const Pattern p = checked_pattern(tp, false);
  same_dtype(tg, dtype).sized(groups * samples * p.rows);
  same_dtype(to, dtype).sized(p.kept);
  tx.sized(groups * samples * p.k);
  checked_threads(nthreads);
  py::gil_scoped_release release;
  const Scratch scratch(sparse_linear_dw_floats(p));
  kernels().sparse_linear_dw(tp.words(), tg.data<void>(), tx.data<void>(), to.data<void>(), dtype,
                             batch, scratch.data(), nthreads);
}

}  // namespace

void bind_sparse(py::module_& m) {
  m.def("gather_live", &gather_live);
  m.def("pattern_words", &pattern_words);
  m.def("scatter_live", &scatter_live);
  m.def("sparse_linear", &sparse_linear);
  m.def("sparse_linear_dw", &sparse_linear_dw);
  m.def("sparse_pattern", &sparse_pattern);
}

}  // namespace st
