#include "core.h"

namespace st::ST_ISA {

const Kernels& table() {
  static constexpr Kernels kernels = {
#define ST_ENTRY(ret, name, args) name,
      ST_KERNELS(ST_ENTRY)
#undef ST_ENTRY
  };
  return kernels;
}

}  // namespace st::ST_ISA
