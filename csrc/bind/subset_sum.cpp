#include <memory>

#include "bind.h"

namespace st {
namespace {

// Whether all of base and all of target are finite.
py::tuple subset_sum(py::object base, py::object target, py::object eps, py::object lengths,
                     py::object mask, py::object value, py::object error, py::object status,
                     bool min_error, int max_card, bool fallback, int nthreads) {
  const Tensor b(base, "base"), t(target, "target"), e(eps, "eps"), m(mask, "mask");
  const Tensor v(value, "value"), r(error, "error"), s(status, "status");
  const auto l = maybe(lengths, "lengths");
  if (b.ndim() != 2) b.fail("needs two dimensions");
  if (t.ndim() != 2 || t.dim(0) != b.dim(0)) t.fail("needs two dimensions, the first as base");
  const bool doubles = b.is(kFloat, 64);
  const int64_t n = b.dim(1), all = t.size();
  if (!doubles) b.floats();
  t.of(kFloat, doubles ? 64 : 32);
  if (n > (min_error ? kSubsetMinErrorN : kSubsetMaxN)) b.fail("has too many columns");
  if (e.size() != 1) e.sized(all);
  if (l) l->of(kInt, 64).sized(b.dim(0));
  for (int64_t i = 0; l && i < l->size(); ++i)
    if (l->data<int64_t>()[i] < 0 || l->data<int64_t>()[i] > n) l->fail("need 0 to base's columns");
  if (max_card < 1 || max_card > 4) throw py::value_error("sparseticket._C: max_card: need 1 to 4");
  checked_threads(nthreads);
  const SubsetSum problem{b.data<void>(),
                          t.data<void>(),
                          e.of(kFloat, 64).data<double>(),
                          optional_data<int64_t>(l),
                          m.of(kInt, 64).sized(all).data<int64_t>(),
                          v.of(kFloat, 64).sized(all).data<double>(),
                          r.of(kFloat, 64).sized(all).data<double>(),
                          s.of(kInt, 8).sized(all).data<int8_t>(),
                          b.dim(0),
                          n,
                          all / (b.dim(0) ? b.dim(0) : 1),
                          doubles,
                          e.size() == 1,
                          min_error,
                          fallback,
                          max_card};
  Finite finite;
  {
    py::gil_scoped_release release;
    const int64_t room = nthreads * subset_scratch(n, min_error, fallback);
    const std::unique_ptr<int64_t[]> scratch(new int64_t[static_cast<size_t>(room)]);
    finite = kernels().subset_sum(problem, scratch.get(), nthreads);
  }
  return py::make_tuple(finite.base, finite.target);
}

}  // namespace

void bind_subset_sum(py::module_& m) { m.def("subset_sum", &subset_sum); }

}  // namespace st
