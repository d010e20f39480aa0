#include "select.h"

namespace st::ST_ISA {

Selection select_mask(const Scores* ST_RESTRICT scores, int64_t count, int64_t eligible,
                      int64_t kept, bool abs, uint32_t hint, SelectScratch scratch, int nthreads) {
  return abs ? select_list<true>(scores, count, eligible, kept, hint, scratch, nthreads)
             : select_list<false>(scores, count, eligible, kept, hint, scratch, nthreads);
}

}  // namespace st::ST_ISA
