// sparseticket._C: the ISA levels and the list of bindings.
#include <cstdlib>

#include "bind.h"

namespace st {

const char* csrc_hash();

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

std::vector<Level> supported_levels() {
  std::vector<Level> levels{{"base", &base::table()}};
#ifdef ST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("popcnt"))
    levels.push_back({"avx2", &avx2::table()});
  if (levels.size() == 2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    levels.push_back({"avx512", &avx512::table()});
#endif
  return levels;
}

Level level;  // chosen once at import, changed only by set_isa

void set_isa(const std::string& name) {
  std::string known;
  for (const Level& candidate : supported_levels()) {
    if (name == candidate.name) {
      level = candidate;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
  }
  throw py::value_error("SPARSETICKET_ISA: got '" + name + "', this machine has: " + known);
}

void choose_isa() {
  const char* wanted = std::getenv("SPARSETICKET_ISA");
  if (wanted && *wanted)
    set_isa(wanted);
  else
    level = supported_levels().back();
}

}  // namespace

const Kernels& kernels() { return *level.kernels; }

}  // namespace st

PYBIND11_MODULE(_C, m) {
  st::choose_isa();
  m.attr("csrc_hash") = st::csrc_hash();
  m.def("isa", [] { return std::string(st::level.name); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const st::Level& l : st::supported_levels()) names.push_back(l.name);
    return names;
  });
  m.def("set_isa", &st::set_isa);
  st::bind_conv2d(m);
  st::bind_conv_code(m);
  st::bind_linear(m);
  st::bind_masked_step(m);
  st::bind_masks(m);
  st::bind_popup_step(m);
  st::bind_select_mask(m);
  st::bind_sparse_conv2d(m);
  st::bind_sparse(m);
  st::bind_subset_sum(m);
  st::bind_ticket(m);
  st::bind_weights(m);
}
