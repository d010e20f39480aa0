#include "bind.h"

namespace st {
namespace {

void pack_mask(py::object mask, py::object words, int64_t rows, int64_t channels, int64_t taps,
               int nthreads) {
  const Layout layout = layout_of(rows, channels, taps);
  const Tensor m(mask, "mask"), w(words, "words");
  const uint8_t* in = m.sized(rows * columns_of(layout)).bools();
  uint32_t* out = w.sized(rows * row_words(layout)).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().pack_mask(in, out, layout, nthreads);
}

void unpack_mask(py::object words, py::object mask, int64_t rows, int64_t channels, int64_t taps,
                 int nthreads) {
  const Layout layout = layout_of(rows, channels, taps);
  const Tensor w(words, "words"), m(mask, "mask");
  const uint32_t* in = w.sized(rows * row_words(layout)).words();
  uint8_t* out = m.sized(rows * columns_of(layout)).bools();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().unpack_mask(in, out, layout, nthreads);
}

void mask_logical(py::object a, py::object b, py::object out, int op, int nthreads) {
  const Tensor ta(a, "a"), tb(b, "b"), to(out, "out");
  const uint32_t* pa = ta.words();
  const uint32_t* pb = tb.sized(ta.size()).words();
  uint32_t* po = to.sized(ta.size()).words();
  if (op < 0 || op > 3) throw py::value_error("sparseticket._C: op: need 0..3");
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().mask_logical(pa, pb, po, ta.size(), static_cast<Logical>(op), nthreads);
}

int64_t mask_count(py::object a, py::object b, bool hamming, int nthreads) {
  const Tensor ta(a, "a"), tb(b, "b");
  const uint32_t* pa = ta.words();
  const uint32_t* pb = tb.sized(ta.size()).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  return kernels().mask_count(pa, pb, ta.size(), hamming, nthreads);
}

void apply_mask(py::object dense, py::object words, py::object out, int64_t rows, int64_t channels,
                int64_t taps, int nthreads) {
  const Layout layout = layout_of(rows, channels, taps);
  const Tensor d(dense, "dense"), w(words, "words"), o(out, "out");
  const int64_t bytes = d.item_bytes();
  if (bytes != 2 && bytes != 4 && bytes != 8) d.fail("need 2-, 4- or 8-byte elements");
  if (o.item_bytes() != bytes) o.fail("has another dtype than dense");
  const void* in = d.sized(rows * columns_of(layout)).data<void>();
  void* to = o.sized(rows * columns_of(layout)).data<void>();
  const uint32_t* bits = w.sized(rows * row_words(layout)).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().apply_mask(in, bits, to, bytes, layout, nthreads);
}

int64_t rice_encode(py::object words, int64_t k, int parameter, py::object payload) {
  const Tensor w(words, "words");
  const auto p = maybe(payload, "payload");
  const uint32_t* in = w.words();
  if (w.ndim() != 2) w.fail("needs two dimensions");
  if (parameter < 0 || parameter > 30) throw py::value_error("sparseticket._C: parameter: 0 to 30");
  const int64_t rows = w.dim(0);
  if (k < 0 || w.size() != rows * row_words(k)) w.fail("does not fit k");
  uint8_t* out = p ? p->bytes() : nullptr;
  py::gil_scoped_release release;
  const int64_t bits = kernels().rice_encode(in, rows, k, parameter, out, p ? p->size() : 0);
  if (bits < 0) {
    py::gil_scoped_acquire acquire;
    p->fail("is too short");
  }
  return bits;
}

bool rice_decode(py::object payload, py::object words, int64_t k, int64_t kept, int parameter) {
  const Tensor p(payload, "payload"), w(words, "words");
  const uint8_t* in = p.bytes();
  uint32_t* out = w.words();
  if (w.ndim() != 2) w.fail("needs two dimensions");
  if (parameter < 0 || parameter > 30) throw py::value_error("sparseticket._C: parameter: 0 to 30");
  const int64_t rows = w.dim(0);
  if (k < 0 || w.size() != rows * row_words(k)) w.fail("does not fit k");
  py::gil_scoped_release release;
  return kernels().rice_decode(in, p.size(), out, rows, k, kept, parameter);
}

}  // namespace

void bind_masks(py::module_& m) {
  m.def("pack_mask", &pack_mask);
  m.def("unpack_mask", &unpack_mask);
  m.def("mask_logical", &mask_logical);
  m.def("mask_count", &mask_count);
  m.def("apply_mask", &apply_mask);
  m.def("rice_encode", &rice_encode);
  m.def("rice_decode", &rice_decode);
}

}  // namespace st
