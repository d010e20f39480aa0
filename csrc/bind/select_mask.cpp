#include "select_scratch.h"

namespace st {

ScoreList score_list(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                     const std::vector<py::object>& words, const std::vector<py::object>& within,
                     int nthreads) {
  if (layouts.size() != scores.size() || words.size() != scores.size() ||
      (!within.empty() && within.size() != scores.size()))
    throw py::value_error("sparseticket._C: scores: lists differ in length");
  ScoreList list;
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto [rows, channels, taps, canonical] = layouts[i];
    const Layout layout = layout_of(rows, channels, taps);
    const Tensor s(scores[i], "scores"), w(words[i], "words");
    const int64_t n = rows * columns_of(layout), bits = rows * row_words(layout);
    Scores entry{s.sized(n).floats(), nullptr, w.sized(bits).words(), layout, canonical};
    list.candidates.push_back(n);
    if (!within.empty()) {
      entry.within = Tensor(within[i], "within").sized(bits).words();
      list.candidates.back() =
          kernels().mask_count(entry.within, entry.within, bits, false, nthreads);
    }
    list.scores.push_back(entry);
  }
  return list;
}

std::vector<ScoreGroup> score_groups(const ScoreList& list, bool global, int nthreads) {
  std::vector<ScoreGroup> groups;
  const size_t n = list.scores.size(), size = global ? n : 1;
  for (size_t first = 0; first < n || (global && groups.empty()); first += size ? size : 1) {
    int64_t eligible = 0, total = 0;
    for (size_t i = first; i < first + size; ++i) {
      eligible += list.candidates[i];
      total += list.scores[i].layout.rows * columns_of(list.scores[i].layout);
    }
    groups.push_back({first, size, eligible, threads_for(total, nthreads)});
  }
  return groups;
}

void check_kept(const std::vector<int64_t>& kept, const std::vector<ScoreGroup>& groups) {
  if (kept.size() != groups.size())
    throw py::value_error("sparseticket._C: kept: one count per group");
  for (size_t g = 0; g < groups.size(); ++g)
    if (kept[g] < 0 || kept[g] > groups[g].eligible)
      throw py::value_error("sparseticket._C: kept: need 0 to the number of candidates");
}

namespace {

constexpr size_t kKeptBytes = size_t{1} << 28;  // larger blocks are freed when the next call comes

char* thread_block(size_t bytes) {
  thread_local std::unique_ptr<char[]> block;
  thread_local size_t size = 0;
  if (bytes > size || size > kKeptBytes) {
    block.reset();
    block.reset(new char[bytes]);
    size = bytes;
  }
  return block.get();
}

}  // namespace

SelectScratch select_scratch(const ScoreList& list, const ScoreGroup& group) {
  int64_t units = 0, longest = 0;
  for (size_t i = group.first; i < group.first + group.count; ++i) {
    const Layout& layout = list.scores[i].layout;
    units += layout.rows * row_words(layout) / 2;
    if (layout.taps > 1 && row_words(layout) > longest) longest = row_words(layout);
  }
  // A thread's share of the keys or, of a long list, a sixteenth of all of them.
  const int64_t share = (units / group.threads + 1) * 64, part = units * 4 + 65536;
  const int64_t room = share < part ? share : part;
  const auto bytes = [](int64_t n, size_t each) {
    return (static_cast<size_t>(n) * each + 63) & ~size_t{63};
  };
  const size_t sizes[] = {
      bytes(2 * kSelectSamples, sizeof(int32_t)),
      bytes((room + kSelectSlack) * group.threads, sizeof(int32_t)),
      bytes(units, sizeof(SelectUnit)),
      bytes(group.threads, sizeof(SelectPart)),
      bytes(kSelectBins * group.threads, sizeof(int64_t)),
      bytes(longest * group.threads, sizeof(uint32_t)),
  };
  size_t total = 0;
  for (const size_t size : sizes) total += size;
  char* at[6];
  at[0] = thread_block(total);
  for (int i = 1; i < 6; ++i) at[i] = at[i - 1] + sizes[i - 1];
  return {reinterpret_cast<int32_t*>(at[0]),
          reinterpret_cast<int32_t*>(at[1]),
          reinterpret_cast<SelectUnit*>(at[2]),
          reinterpret_cast<SelectPart*>(at[3]),
          reinterpret_cast<int64_t*>(at[4]),
          reinterpret_cast<uint32_t*>(at[5]),
          room,
          longest};
}

namespace {

void select_mask(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                 const std::vector<py::object>& words, const std::vector<py::object>& within,
                 const std::vector<int64_t>& kept, bool abs, bool global, py::object hints,
                 py::object state, int nthreads) {
  checked_threads(nthreads);
  const ScoreList list = score_list(scores, layouts, words, within, nthreads);
  const std::vector<ScoreGroup> groups = score_groups(list, global, nthreads);
  const int64_t entries = static_cast<int64_t>(2 * groups.size());
  const Tensor out(state, "state");
  const auto hint = maybe(hints, "hints");
  uint32_t* const results = out.sized(entries).words();
  const uint32_t* const hinted = hint ? hint->sized(entries).words() : nullptr;
  check_kept(kept, groups);
  py::gil_scoped_release release;
  for (size_t g = 0; g < groups.size(); ++g) {
    const ScoreGroup& group = groups[g];
    const Selection selection = kernels().select_mask(
        list.scores.data() + group.first, static_cast<int64_t>(group.count), group.eligible,
        kept[g], abs, hinted ? hinted[2 * g] : 0, select_scratch(list, group), group.threads);
    results[2 * g] = selection.threshold;
    results[2 * g + 1] = selection.nan;
  }
}

}  // namespace

void bind_select_mask(py::module_& m) { m.def("select_mask", &select_mask); }

}  // namespace st
