#include "core.h"

namespace st::ST_ISA {

void mask_logical(const uint32_t* ST_RESTRICT a, const uint32_t* ST_RESTRICT b,
                  uint32_t* ST_RESTRICT out, int64_t n, Logical op, int nthreads) {
#pragma omp parallel for num_threads(threads_for(n, nthreads)) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    switch (op) {  // loop-invariant: the compiler makes one vector loop of each case
      case Logical::and_:
        out[i] = a[i] & b[i];
        break;
      case Logical::or_:
        out[i] = a[i] | b[i];
        break;
      case Logical::xor_:
        out[i] = a[i] ^ b[i];
        break;
      case Logical::andnot:
        out[i] = a[i] & ~b[i];
        break;
    }
  }
}

int64_t mask_count(const uint32_t* ST_RESTRICT a, const uint32_t* ST_RESTRICT b, int64_t n,
                   bool hamming, int nthreads) {
  int64_t count = 0;
#pragma omp parallel for num_threads(threads_for(n, nthreads)) schedule(static) reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += __builtin_popcount(hamming ? a[i] ^ b[i] : a[i]);
  return count;
}

}  // namespace st::ST_ISA
