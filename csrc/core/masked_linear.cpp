#include "core.h"
#include "linear_rows.h"

namespace st::ST_ISA {
namespace {

template <typename T>
struct MaskedRow {
  const T* weight;
  const uint32_t* words;
  uint32_t word = 0;
  void next(int64_t first) { word = words[first >> 5]; }
  Vec weights(int64_t at, int64_t n, int half) const {
    const Vec w = n == 16 ? load(weight + at) : load_first(weight + at, n);
    return keep(w, word >> (16 * half) & 0xFFFF);
  }
};

template <typename T>
void run(const T* x, const T* weight, const uint32_t* words, const T* bias, T* y, int64_t batch,
         int64_t rows, int64_t k, int nthreads) {
  const int64_t words_a_row = row_words(k);
  const auto source = [=](int64_t row) {
    return MaskedRow<T>{weight + row * k, words + row * words_a_row};
  };
  linear_rows(x, bias, y, batch, rows, k, source, nthreads);
}

}  // namespace

void masked_linear(const void* ST_RESTRICT x, const void* ST_RESTRICT weight,
                   const uint32_t* ST_RESTRICT words, const void* ST_RESTRICT bias,
                   void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows, int64_t k,
                   int nthreads) {
  if (dtype == Dtype::f32)
    run(static_cast<const float*>(x), static_cast<const float*>(weight), words,
        static_cast<const float*>(bias), static_cast<float*>(y), batch, rows, k, nthreads);
  else
    run(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), words,
        static_cast<const bf16*>(bias), static_cast<bf16*>(y), batch, rows, k, nthreads);
}

}  // namespace st::ST_ISA
