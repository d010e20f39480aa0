#include "update_rule.h"

namespace st {
namespace {

using Capsules = std::vector<py::object>;

void masked_step(const Capsules& weights,
                 const std::vector<std::tuple<int64_t, int64_t, int64_t>>& layouts,
                 const Capsules& grads, const Capsules& momenta, const Capsules& variances,
                 const Capsules& shadows, const Capsules& words, bool adam, bool nesterov,
                 const std::vector<float>& numbers, int nthreads) {
  checked_threads(nthreads);
  const ScoreRule rule = rule_of(adam, nesterov, numbers);
  const size_t n = weights.size();
  const auto fits = [n](const Capsules& list) { return list.empty() || list.size() == n; };
  if (layouts.size() != n || grads.size() != n || words.size() != n || !fits(momenta) ||
      !fits(shadows) || variances.size() != (adam ? n : 0) || (adam && momenta.size() != n))
    throw py::value_error("sparseticket._C: masked_step: lists differ in length");
  std::vector<MaskedTensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const auto [rows, channels, taps] = layouts[i];
    const Layout layout = layout_of(rows, channels, taps);
    const int64_t size = rows * columns_of(layout);
    void* shadow = nullptr;
    if (!shadows.empty())
      shadow = Tensor(shadows[i], "shadows").of(kBfloat, 16).sized(size).data<void>();
    tensors.push_back({Tensor(weights[i], "weights").sized(size).floats(),
                       Tensor(grads[i], "grads").sized(size).floats(),
                       moment(momenta, i, "momenta", size), moment(variances, i, "variances", size),
                       shadow, Tensor(words[i], "words").sized(rows * row_words(layout)).words(),
                       layout});
  }
  py::gil_scoped_release release;
  kernels().masked_step(tensors.data(), static_cast<int64_t>(n), rule, nthreads);
}

}  // namespace

void bind_masked_step(py::module_& m) { m.def("masked_step", &masked_step); }

}  // namespace st
