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

// Memory for one group; as the kernels touch it, never more than a small part of the scores.
class SelectMemory {
 public:
  SelectMemory(const ScoreList& list, const ScoreGroup& group);
  SelectScratch scratch() const { return scratch_; }

 private:
  std::unique_ptr<int32_t[]> samples_, keys_;
  std::unique_ptr<SelectUnit[]> units_;
  std::unique_ptr<SelectPart[]> parts_;
  std::unique_ptr<int64_t[]> counts_;
  std::unique_ptr<uint32_t[]> row_;
  SelectScratch scratch_;
};

}  // namespace st
