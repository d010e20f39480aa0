// The arguments that popup_step and masked_step share.
#pragma once

#include "bind.h"

namespace st {

inline float* moment(const std::vector<py::object>& list, size_t i, const char* name, int64_t n) {
  return list.empty() ? nullptr : Tensor(list.at(i), name).sized(n).floats();
}

inline ScoreRule rule_of(bool adam, bool nesterov, const std::vector<float>& v) {
  if (v.size() != 8) throw py::value_error("sparseticket._C: rule: need 8 numbers");
  return {adam, nesterov, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
}

}  // namespace st
