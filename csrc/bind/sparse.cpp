#include <memory>

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

}  // namespace

void bind_sparse(py::module_& m) {
  m.def("gather_live", &gather_live);
  m.def("scatter_live", &scatter_live);
}

}  // namespace st
