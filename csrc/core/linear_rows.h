// The row loop shared by the fused linear kernels: y[b, o] = sum_k w[o, k] * x[b, k] + bias[o].
// Dropped weights multiply as zeros, so that infinities and NaN in x spread as in a dense layer.
#pragma once

#include "core.h"
#include "simd.h"

namespace st {
namespace {

// One output row for kBatch rows of x. A Source is moved to each pair of 16 weights by next(), and
// gives them by weights(); two accumulators hide the latency of the fused multiply-adds.
template <int kBatch, typename T, typename Source>
inline void row_sums(Source& source, const T* ST_RESTRICT x, int64_t k, float* sums) {
  Vec acc[kBatch][2];
  for (auto& pair : acc) pair[0] = pair[1] = zero();
  for (int64_t first = 0; first < k; first += 32) {
    source.next(first);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first + 16 * half;
      const int64_t n = k - at < 16 ? k - at : 16;
      if (n <= 0) break;
      const Vec weights = source.weights(at, n, half);
      for (int b = 0; b < kBatch; ++b) {
        const T* const p = x + b * k + at;
        acc[b][half] = fma(weights, n == 16 ? load(p) : load_first(p, n), acc[b][half]);
      }
    }
  }
  for (int b = 0; b < kBatch; ++b) sums[b] = sum(add(acc[b][0], acc[b][1]));
}

// make_source(row) gives a Source for one output row.
template <typename T, typename MakeSource>
void linear_rows(const T* ST_RESTRICT x, const T* ST_RESTRICT bias, T* ST_RESTRICT y, int64_t batch,
                 int64_t rows, int64_t k, const MakeSource& make_source, int nthreads) {
  const int threads = threads_for(batch * rows * k, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float shift = bias ? to_float(bias[row]) : 0.0f;
    for (int64_t b = 0; b < batch;) {
      float sums[4];
      auto source = make_source(row);
      int64_t done = 4;
      if (batch - b >= 4) {
        row_sums<4>(source, x + b * k, k, sums);
      } else if (batch - b >= 2) {
        row_sums<2>(source, x + b * k, k, sums);
        done = 2;
      } else {
        row_sums<1>(source, x + b * k, k, sums);
        done = 1;
      }
      for (int64_t i = 0; i < done; ++i) store_float(sums[i] + shift, y + (b + i) * rows + row);
      b += done;
    }
  }
}

}  // namespace
}  // namespace st
