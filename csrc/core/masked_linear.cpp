#include <omp.h>

#include "core.h"
#include "live_rows.h"

namespace st::ST_ISA {
namespace {

// Sums of kTile output rows times kTile batch rows stay in registers; kBatch batch rows and
// kSlice columns at a time, so that what the tiles share comes from the L1 cache.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
constexpr int64_t kBatch = 16;
constexpr int64_t kSlice = 512;

// sums[r][b] += columns [at, at + n) of R rows of W * mask times B rows of x, n <= 16.
template <int R, int B, bool whole, typename T>
inline void tile_step(const T* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words,
                      const T* ST_RESTRICT x, int64_t k, int64_t at, int64_t n, Vec (&sums)[R][B]) {
  Vec own[B];
  for (int b = 0; b < B; ++b) own[b] = whole ? load(x + b * k + at) : load_first(x + b * k + at, n);
  for (int r = 0; r < R; ++r) {
    const T* const p = weight + r * k + at;
    const uint32_t bits = words[r * row_words(k) + (at >> 5)] >> (at & 16) & 0xFFFF;
    const Vec w = keep(whole ? load(p) : load_first(p, n), bits);
    for (int b = 0; b < B; ++b) sums[r][b] = fma(w, own[b], sums[r][b]);
  }
}

// A tile over the columns [first, end) of its rows.
template <int R, int B, typename T>
inline void tile(const T* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words,
                 const T* ST_RESTRICT x, int64_t k, int64_t first, int64_t end,
                 Vec (&total)[kTile][kBatch], int64_t batch_row) {
  Vec sums[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) sums[r][b] = total[r][batch_row + b];
  int64_t at = first;
  for (; at + 16 <= end; at += 16) tile_step<R, B, true>(weight, words, x, k, at, 16, sums);
  if (at < end) tile_step<R, B, false>(weight, words, x, k, at, end - at, sums);
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) total[r][batch_row + b] = sums[r][b];
}

template <int R, typename T>
inline void tile_rows(const T* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words,
                      const T* ST_RESTRICT x, const T* ST_RESTRICT bias, T* ST_RESTRICT y,
                      int64_t batch, int64_t rows, int64_t k) {
  Vec total[kTile][kBatch];
  for (auto& row : total)
    for (Vec& v : row) v = zero();
  // One batch row shares nothing between tiles: long runs of the weight are read fastest then.
  const int64_t slice = batch == 1 ? k : kSlice;
  for (int64_t first = 0; first < k; first += slice) {
    const int64_t end = k - first < slice ? k : first + slice;
    int64_t b = 0;
    for (; b + kTile <= batch; b += kTile)
      tile<R, kTile>(weight, words, x + b * k, k, first, end, total, b);
    for (; b < batch; ++b) tile<R, 1>(weight, words, x + b * k, k, first, end, total, b);
  }
  for (int64_t b = 0; b < batch; ++b)
    for (int r = 0; r < R; ++r)
      store_float(sum(total[r][b]) + (bias ? to_float(bias[r]) : 0.0f), y + b * rows + r);
}

template <typename T>
void run(const T* x, const T* weight, const uint32_t* words, const T* bias, T* y, int64_t batch,
         int64_t rows, int64_t k, int nthreads) {
#pragma omp parallel for num_threads(threads_for(batch * rows * k, nthreads)) schedule(static)
  for (int64_t row = 0; row < rows; row += kTile)
    for (int64_t b = 0; b < batch; b += kBatch) {
      const int64_t n = batch - b < kBatch ? batch - b : kBatch;
      const auto run_rows = row + kTile <= rows ? tile_rows<kTile, T> : tile_rows<1, T>;
      for (int64_t r = row; r < rows && r < row + kTile; r += row + kTile <= rows ? kTile : 1)
        run_rows(weight + r * k, words + r * row_words(k), x + b * k, bias ? bias + r : nullptr,
                 y + b * rows + r, n, rows, k);
    }
}

// sums [panel][n][kPanel] to the columns [first, first + n) of y [batch, width], plus the bias.
template <typename T>
void unpack_sums(const float* ST_RESTRICT sums, int64_t batch, int64_t width, int64_t first,
                 int64_t n, int64_t stride, const T* ST_RESTRICT bias, T* ST_RESTRICT y) {
  for (int64_t b = 0; b < batch; ++b) {
    const float* const from = sums + b / kPanel * stride * kPanel + b % kPanel;
    for (int64_t i = 0; i < n; ++i)
      store_float(from[i * kPanel] + (bias ? to_float(bias[first + i]) : 0.0f),
                  y + b * width + first + i);
  }
}

// y = x (W * mask)^T: threads share the rows of W.
template <typename T>
void live(const T* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words, const T* ST_RESTRICT bias,
          T* ST_RESTRICT y, const float* ST_RESTRICT panels, float* ST_RESTRICT scratch,
          int64_t batch, int64_t rows, int64_t k, int threads) {
  const int64_t count = (batch + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row += kRows) {
    LiveBlock block;
    float* const sums = scratch + omp_get_thread_num() * count * kRows * kPanel;
    const int64_t n = rows - row < kRows ? rows - row : kRows;
    std::memset(sums, 0, static_cast<size_t>(count * kRows * kPanel) * sizeof(float));
    for (int64_t first = 0; first < k; first += kSpan) {
      const int64_t columns = k - first < kSpan ? k - first : kSpan;
      decode_block(weight, words, k, row, n, first, columns, block);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t part = 0; part * kColumns < columns; ++part)
          for (int64_t r = 0; r < n; ++r) {
            const int64_t begin = list_begin(block, r, part);
            gather_row(block.columns[r] + begin, block.values[r] + begin,
                       block.ends[r][part] - begin, panels + (p * k + first) * kPanel,
                       sums + (p * kRows + r) * kPanel);
          }
    }
    unpack_sums(sums, batch, rows, row, n, kRows, bias, y);
  }
}

// y = x (W * mask): threads share the columns of W.
template <typename T>
void live_transposed(const T* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words,
                     const T* ST_RESTRICT bias, T* ST_RESTRICT y, const float* ST_RESTRICT panels,
                     float* ST_RESTRICT scratch, int64_t batch, int64_t rows, int64_t k,
                     int threads) {
  const int64_t count = (batch + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < k; first += kColumns) {
    LiveBlock block;
    float* const sums = scratch + omp_get_thread_num() * count * kColumns * kPanel;
    const int64_t columns = k - first < kColumns ? k - first : kColumns;
    std::memset(sums, 0, static_cast<size_t>(count * kColumns * kPanel) * sizeof(float));
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t n = rows - row < kRows ? rows - row : kRows;
      decode_block(weight, words, k, row, n, first, columns, block);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t r = 0; r < n; ++r)
          scatter_row(block.columns[r], block.values[r], block.ends[r][0],
                      panels + (p * rows + row + r) * kPanel, sums + p * kColumns * kPanel);
    }
    unpack_sums(sums, batch, k, first, columns, kColumns, bias, y);
  }
}

template <typename T>
void walk(const T* x, const T* weight, const uint32_t* words, const T* bias, T* y, int64_t batch,
          int64_t rows, int64_t k, bool transposed, float* scratch, int nthreads) {
  const int threads = threads_for(batch * rows * k, nthreads);
  const int64_t width = transposed ? rows : k;
  float* const sums = scratch + masked_linear_panel_floats(batch, width);
  pack_panels(x, batch, width, scratch, threads);
  (transposed ? live_transposed<T> : live<T>)(weight, words, bias, y, scratch, sums, batch, rows, k,
                                              threads);
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

void masked_linear_live(const void* ST_RESTRICT x, const void* ST_RESTRICT weight,
                        const uint32_t* ST_RESTRICT words, const void* ST_RESTRICT bias,
                        void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows, int64_t k,
                        bool transposed, float* ST_RESTRICT scratch, int nthreads) {
  if (dtype == Dtype::f32)
    walk(static_cast<const float*>(x), static_cast<const float*>(weight), words,
         static_cast<const float*>(bias), static_cast<float*>(y), batch, rows, k, transposed,
         scratch, nthreads);
  else
    walk(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), words,
         static_cast<const bf16*>(bias), static_cast<bf16*>(y), batch, rows, k, transposed, scratch,
         nthreads);
}

}  // namespace st::ST_ISA
