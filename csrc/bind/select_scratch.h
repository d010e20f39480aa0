// The score lists and scratch memory that select_mask and popup_step share.
#pragma once

#include <memory>
#include <tuple>

#include "bind.h"

namespace st {

using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, bool>;  // Layout and Scores::canonical

struct ScoreList {
  std::vector<Scores> scores;
  std::vector<int64_t> candidates;
};

// `within` may be empty.
ScoreList score_list(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                     const std::vector<py::object>& words, const std::vector<py::object>& within,
                     int nthreads);

// Groups of a list that are selected together: each tensor alone, or all of them.
struct ScoreGroup {
  size_t first, count;
  int64_t eligible;
  int threads;
};
std::vector<ScoreGroup> score_groups(const ScoreList& list, bool global, int nthreads);
void check_kept(const std::vector<int64_t>& kept, const std::vector<ScoreGroup>& groups);

// Memory for one group, from a block that its thread keeps between calls: pages fresh from the
// system cost as much as the selection. Calls of one thread must not overlap.
SelectScratch select_scratch(const ScoreList& list, const ScoreGroup& group);

}  // namespace st
