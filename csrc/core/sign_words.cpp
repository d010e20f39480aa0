#include "core.h"
#include "philox.h"

namespace st::ST_ISA {

void sign_words(uint32_t* ST_RESTRICT words, int64_t units, uint32_t key, uint32_t high,
                int nthreads) {
  constexpr int64_t chunk = 1024;
#pragma omp parallel for num_threads(threads_for(64 * units, nthreads)) schedule(static)
  for (int64_t first = 0; first < units; first += chunk) {
    const int64_t n = units - first < chunk ? units - first : chunk;
    philox_run<true>(first, n, key, high, words + 2 * first);
  }
}

}  // namespace st::ST_ISA
