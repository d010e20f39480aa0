#include "core.h"
#include "philox.h"

namespace st::ST_ISA {
namespace {

constexpr int64_t kChunkWords = 128;

// 32 columns or fewer; plain loops, which the compiler turns into vectors of every level.
template <bool kAbs>
void scale_word(float* ST_RESTRICT grad, const float* ST_RESTRICT scores, int64_t n,
                uint32_t negative, float sigma) {
  for (int64_t i = 0; i < n; ++i) {
    const float weight = (negative >> i) & 1 ? -sigma : sigma;
    const float sign = static_cast<float>((scores[i] > 0) - (scores[i] < 0));
    grad[i] = kAbs ? grad[i] * weight * sign : grad[i] * weight;
  }
}

}  // namespace

void popup_linear_ds(float* ST_RESTRICT grad, const float* ST_RESTRICT scores, int64_t rows,
                     int64_t k, bool abs, float sigma, uint32_t key, uint32_t high, int nthreads) {
  const int64_t words_a_row = row_words(k);
#pragma omp parallel for num_threads(threads_for(rows* k, nthreads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t signs[kChunkWords];
    for (int64_t w = 0; 32 * w < k; ++w) {
      if (w % kChunkWords == 0) {
        const int64_t left = words_a_row - w, n = left < kChunkWords ? left : kChunkWords;
        philox_run<true>(static_cast<uint64_t>((row * words_a_row + w) / 2), n / 2, key, high,
                         signs);
      }
      const int64_t at = row * k + 32 * w, n = k - 32 * w < 32 ? k - 32 * w : 32;
      if (abs)
        scale_word<true>(grad + at, scores + at, n, signs[w % kChunkWords], sigma);
      else
        scale_word<false>(grad + at, scores + at, n, signs[w % kChunkWords], sigma);
    }
  }
}

}  // namespace st::ST_ISA
