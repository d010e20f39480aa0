#include "bind.h"

namespace st {
namespace {

void sign_words(py::object words, uint32_t key, uint32_t high, int nthreads) {
  const Tensor w(words, "words");
  uint32_t* out = w.words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().sign_words(out, w.size() / 2, key, high, nthreads);
}

void regenerate(py::object out, py::object words, py::object table, int64_t rows, int64_t channels,
                int64_t taps, int dist, float scale, uint32_t key, uint32_t high, int nthreads) {
  const Layout layout = layout_of(rows, channels, taps);
  const Tensor o(out, "out");
  const auto w = maybe(words, "words");
  const auto t = maybe(table, "table");
  const Dtype dtype = dtype_of(o);
  void* to = o.sized(rows * columns_of(layout)).data<void>();
  if (w) w->of(kInt, 32).sized(rows * row_words(layout));
  if (dist < 0 || dist > 2) throw py::value_error("sparseticket._C: dist: need 0..2");
  if ((dist == 2) != t.has_value())
    throw py::value_error("sparseticket._C: table: for dist 2 only");
  if (t) t->of(kFloat, 32).sized(65536);
  checked_threads(nthreads);
  py::gil_scoped_release release;
  std::vector<uint32_t> signs(dist == 0 ? nthreads * regenerate_sign_words(layout) : 0);
  kernels().regenerate(to, dtype, optional_data<uint32_t>(w), optional_data<float>(t), layout,
                       static_cast<Dist>(dist), scale, key, high, signs.data(), nthreads);
}

}  // namespace

void bind_weights(py::module_& m) {
  m.def("sign_words", &sign_words);
  m.def("regenerate", &regenerate);
}

}  // namespace st
