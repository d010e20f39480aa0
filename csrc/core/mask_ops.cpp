#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

// Ones of a, or of a ^ b. Four counts: one popcount after another would wait for its sum.
inline int64_t ones(const uint32_t* ST_RESTRICT a, const uint32_t* ST_RESTRICT b, int64_t n) {
  int64_t count[4] = {};
  const auto at = [=](int64_t i) { return b ? unit_at(a + i) ^ unit_at(b + i) : unit_at(a + i); };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 4; ++j) count[j] += __builtin_popcountll(at(i + 2 * j));
  for (; i < n; ++i) count[0] += __builtin_popcount(b ? a[i] ^ b[i] : a[i]);
  return count[0] + count[1] + count[2] + count[3];
}

}  // namespace

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
  constexpr int64_t chunk = 8192;
  int64_t count = 0;
#pragma omp parallel for num_threads(threads_for(n, nthreads)) schedule(static) reduction(+ : count)
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t end = n - first < chunk ? n : first + chunk;
    count += ones(a + first, hamming ? b + first : nullptr, end - first);
  }
  return count;
}

}  // namespace st::ST_ISA
