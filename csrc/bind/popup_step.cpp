#include "select_scratch.h"
#include "update_rule.h"

namespace st {
namespace {

using Capsules = std::vector<py::object>;

// kept: one count per group, or none to update only. Returns whether a score is NaN.
bool popup_step(const Capsules& scores, const std::vector<LayoutTuple>& layouts,
                const Capsules& grads, const Capsules& momenta, const Capsules& variances,
                const Capsules& words, const Capsules& signs, const std::vector<float>& sigmas,
                bool adam, bool nesterov, const std::vector<float>& rule,
                const std::vector<int64_t>& kept, bool abs, bool global, py::object state,
                int nthreads) {
  checked_threads(nthreads);
  const ScoreRule numbers = rule_of(adam, nesterov, rule);
  const ScoreList list = score_list(scores, layouts, words, {}, nthreads);
  const size_t n = list.scores.size();
  if (grads.size() != n || signs.size() != n || sigmas.size() != n ||
      (momenta.size() != n && (adam || !momenta.empty())) || variances.size() != (adam ? n : 0))
    throw py::value_error("sparseticket._C: popup_step: lists differ in length");
  std::vector<ScoreState> states;
  for (size_t i = 0; i < n; ++i) {
    const int64_t size = list.candidates[i];
    const auto planes = maybe(signs[i], "signs");
    const int64_t bits = list.scores[i].layout.rows * row_words(list.scores[i].layout);
    states.push_back({Tensor(scores[i], "scores").floats(),
                      Tensor(grads[i], "grads").sized(size).floats(),
                      moment(momenta, i, "momenta", size), moment(variances, i, "variances", size),
                      planes ? planes->sized(bits).words() : nullptr, sigmas[i]});
  }
  const std::vector<ScoreGroup> groups = score_groups(list, global, nthreads);
  if (!kept.empty()) check_kept(kept, groups);
  const Tensor out(state, "state");
  uint32_t* const results = out.sized(static_cast<int64_t>(2 * groups.size())).words();
  py::gil_scoped_release release;
  bool nan = false;
  for (size_t g = 0; g < groups.size(); ++g) {
    const ScoreGroup& group = groups[g];
    const Selection selection = kernels().popup_step(
        list.scores.data() + group.first, states.data() + group.first,
        static_cast<int64_t>(group.count), numbers, kept.empty() ? -1 : kept[g], abs,
        results[2 * g], select_scratch(list, group), group.threads);
    results[2 * g] = selection.threshold;
    results[2 * g + 1] = selection.nan;
    nan |= selection.nan;
  }
  return nan;
}

}  // namespace

void bind_popup_step(py::module_& m) { m.def("popup_step", &popup_step); }

}  // namespace st
