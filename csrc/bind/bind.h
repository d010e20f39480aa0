// What every binding shares: the chosen ISA level and the checks of arguments. One file per group
// of ops binds them; the binding checks its capsules, owns scratch memory and releases the GIL
// around the kernel, and does no arithmetic.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../core/core.h"
#include "dlpack.h"

namespace st {

namespace py = pybind11;

const Kernels& kernels();  // of the ISA level in use

inline int checked_threads(int nthreads) {
  if (nthreads < 1) throw py::value_error("sparseticket._C: nthreads: need at least 1");
  return nthreads;
}

inline Dtype dtype_of(const Tensor& t) {
  if (t.is(kFloat, 32)) return Dtype::f32;
  if (t.is(kBfloat, 16)) return Dtype::bf16;
  t.fail("need float32 or bfloat16");
}

inline const Tensor& same_dtype(const Tensor& t, Dtype dtype) {
  if (dtype_of(t) != dtype) t.fail("has another dtype than its companions");
  return t;
}

template <typename T>
const T* optional_data(const std::optional<Tensor>& t) {
  return t ? t->data<T>() : nullptr;
}

inline std::optional<Tensor> maybe(const py::object& capsule, const char* name) {
  if (capsule.is_none()) return std::nullopt;
  return Tensor(capsule, name);
}

inline Layout layout_of(int64_t rows, int64_t channels, int64_t taps) {
  if (rows < 0 || channels < 0 || taps < 1)
    throw py::value_error("sparseticket._C: layout: sizes must not be negative");
  return {rows, channels, taps};
}

void bind_conv2d(py::module_& m);
void bind_conv_code(py::module_& m);
void bind_linear(py::module_& m);
void bind_masked_step(py::module_& m);
void bind_masks(py::module_& m);
void bind_popup_step(py::module_& m);
void bind_select_mask(py::module_& m);
void bind_sparse_conv2d(py::module_& m);
void bind_sparse(py::module_& m);
void bind_subset_sum(py::module_& m);
void bind_ticket(py::module_& m);
void bind_weights(py::module_& m);

}  // namespace st
