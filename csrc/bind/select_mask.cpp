#include <memory>
#include <tuple>

#include "bind.h"

namespace st {
namespace {

struct ScoreList {
  std::vector<Scores> scores;
  std::vector<std::unique_ptr<uint8_t[]>> eligible;  // expanded `within` masks
  std::vector<int64_t> candidates;
};

using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, bool>;

ScoreList score_list(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                     const std::vector<py::object>& words,
                     const std::optional<std::vector<py::object>>& within, int nthreads) {
  if (layouts.size() != scores.size() || words.size() != scores.size() ||
      (within && within->size() != scores.size()))
    throw py::value_error("sparseticket._C: select_mask: lists differ in length");
  ScoreList list;
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto [rows, channels, taps, canonical] = layouts[i];
    const Layout layout = layout_of(rows, channels, taps);
    const Tensor s(scores[i], "scores"), w(words[i], "words");
    const int64_t n = rows * columns_of(layout);
    Scores entry{s.sized(n).floats(),
                 nullptr,
                 nullptr,
                 w.sized(rows * row_words(layout)).words(),
                 layout,
                 canonical};
    list.candidates.push_back(n);
    if (within) {
      const Tensor mask((*within)[i], "within");
      entry.within = mask.sized(rows * row_words(layout)).words();
      list.eligible.emplace_back(new uint8_t[static_cast<size_t>(n)]);
      entry.eligible = list.eligible.back().get();
      const Layout memory = canonical ? Layout{rows, channels * taps, 1} : layout;
      kernels().unpack_mask(entry.within, list.eligible.back().get(), memory, nthreads);
      list.candidates.back() =
          kernels().mask_count(entry.within, entry.within, w.size(), false, nthreads);
    }
    list.scores.push_back(entry);
  }
  return list;
}

void select_mask(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                 const std::vector<py::object>& words,
                 const std::optional<std::vector<py::object>>& within,
                 const std::vector<int64_t>& kept, bool abs, bool global, py::object hints,
                 py::object state, int nthreads) {
  checked_threads(nthreads);
  ScoreList list = score_list(scores, layouts, words, within, nthreads);
  const size_t groups = global ? 1 : list.scores.size();
  const Tensor out(state, "state");
  const auto hint = maybe(hints, "hints");
  uint32_t* results = out.sized(static_cast<int64_t>(2 * groups)).words();
  const uint32_t* hinted = hint ? hint->sized(static_cast<int64_t>(2 * groups)).words() : nullptr;
  if (kept.size() != groups) throw py::value_error("sparseticket._C: kept: one count per group");
  for (size_t g = 0; g < groups; ++g) {
    int64_t eligible = 0;
    for (size_t i = global ? 0 : g; i < (global ? list.scores.size() : g + 1); ++i)
      eligible += list.candidates[i];
    if (kept[g] < 0 || kept[g] > eligible)
      throw py::value_error("sparseticket._C: kept: need 0 to the number of candidates");
  }

  py::gil_scoped_release release;
  const auto samples = std::make_unique<uint32_t[]>(kSelectSamples);
  for (size_t g = 0; g < groups; ++g) {
    const size_t first = global ? 0 : g, count = global ? list.scores.size() : 1;
    int64_t eligible = 0, total = 0;
    for (size_t i = first; i < first + count; ++i) {
      eligible += list.candidates[i];
      total += list.scores[i].layout.rows * columns_of(list.scores[i].layout);
    }
    const int threads = threads_for(total, nthreads);
    const int64_t capacity = total / 8 + 65536 * threads;
    const std::unique_ptr<uint32_t[]> candidates(new uint32_t[static_cast<size_t>(capacity)]);
    const std::unique_ptr<int64_t[]> counts(
        new int64_t[static_cast<size_t>(kSelectBins * threads)]);
    const SelectScratch scratch{samples.get(), candidates.get(), capacity, counts.get()};
    const Selection selection =
        kernels().select_mask(list.scores.data() + first, static_cast<int64_t>(count), eligible,
                              kept[g], abs, hinted ? hinted[2 * g] : 0, scratch, threads);
    results[2 * g] = selection.threshold;
    results[2 * g + 1] = selection.nan;
  }
}

}  // namespace

void bind_select_mask(py::module_& m) { m.def("select_mask", &select_mask); }

}  // namespace st
