#include "core.h"

namespace st::ST_ISA {
namespace {

// The 32 bits of a row that start at any bit; beyond the row's words they are 0.
inline uint32_t bits_from(const uint32_t* ST_RESTRICT words, int64_t words_a_row, int64_t first) {
  const int64_t w = first >> 5, shift = first & 31;
  const uint64_t high = w + 1 < words_a_row ? words[w + 1] : 0;
  return static_cast<uint32_t>((high << 32 | words[w]) >> shift);
}

template <typename T>
inline T kept(T value, uint32_t bit) {
  return static_cast<T>(value & -static_cast<T>(bit & 1));
}

template <typename T>
void apply_row(const T* ST_RESTRICT in, const uint32_t* ST_RESTRICT bits, T* ST_RESTRICT out,
               int64_t columns) {
  for (int64_t first = 0; first < columns; first += 32) {
    const uint32_t word = bits[first >> 5];
    const int64_t n = columns - first < 32 ? columns - first : 32;
    for (int64_t i = 0; i < n; ++i) out[first + i] = kept(in[first + i], word >> i);
  }
}

// Contiguous convolution weights: 32 channels at a time, each tap's bits of them in one word. kTaps
// is the number of taps where the compiler may know it (3x3 kernels), else 0.
template <int kTaps, typename T>
void apply_taps(const T* ST_RESTRICT in, const uint32_t* ST_RESTRICT bits, T* ST_RESTRICT out,
                const Layout& layout) {
  constexpr int64_t kMost = 64;
  const int64_t words_a_row = row_words(layout), taps = kTaps ? kTaps : layout.taps;
  for (int64_t begin = 0; begin < taps; begin += kMost) {
    const int64_t end = taps - begin < kMost ? taps : begin + kMost;
    for (int64_t first = 0; first < layout.channels; first += 32) {
      uint32_t words[kMost];
      for (int64_t s = begin; s < end; ++s)
        words[s - begin] = bits_from(bits, words_a_row, s * layout.channels + first);
      const int64_t n = layout.channels - first < 32 ? layout.channels - first : 32;
      for (int64_t c = 0; c < n; ++c) {
        const int64_t at = (first + c) * taps + begin;
        for (int64_t s = 0; s < (kTaps ? kTaps : end - begin); ++s)
          out[at + s] = kept(in[at + s], words[s] >> c);
      }
    }
  }
}

template <typename T>
void apply(const T* ST_RESTRICT dense, const uint32_t* ST_RESTRICT words, T* ST_RESTRICT out,
           const Layout& layout, int nthreads) {
  const int64_t columns = columns_of(layout), words_a_row = row_words(layout);
  const int threads = threads_for(layout.rows * columns, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    const uint32_t* const bits = words + row * words_a_row;
    const T* const in = dense + row * columns;
    T* const to = out + row * columns;
    if (layout.taps == 1)
      apply_row(in, bits, to, columns);
    else if (layout.taps == 9)
      apply_taps<9>(in, bits, to, layout);
    else
      apply_taps<0>(in, bits, to, layout);
  }
}

}  // namespace

// Elements are moved as unsigned integers: a dropped one becomes +0 whatever it was.
void apply_mask(const void* ST_RESTRICT dense, const uint32_t* ST_RESTRICT words,
                void* ST_RESTRICT out, int64_t item_bytes, Layout layout, int nthreads) {
  if (item_bytes == 2)
    apply(static_cast<const uint16_t*>(dense), words, static_cast<uint16_t*>(out), layout,
          nthreads);
  else if (item_bytes == 4)
    apply(static_cast<const uint32_t*>(dense), words, static_cast<uint32_t*>(out), layout,
          nthreads);
  else
    apply(static_cast<const uint64_t*>(dense), words, static_cast<uint64_t*>(out), layout,
          nthreads);
}

}  // namespace st::ST_ISA
