#include "bits.h"
#include "core.h"

namespace st::ST_ISA {
namespace {

template <typename T>
void apply_row(const T* ST_RESTRICT in, const uint32_t* ST_RESTRICT row, const Layout& layout,
               T* ST_RESTRICT out) {
  const int64_t columns = columns_of(layout), block = block_size(layout);
  for (int64_t at = 0; at < columns; at += block) {
    uint64_t memory[kBlockUnits];
    memory_bits(row, layout, at, memory);
    for (int64_t i = at; i < at + block && i < columns; i += 64) {
      const uint64_t bits = memory[(i - at) >> 6];
      if (i + 64 <= columns) {
        keep_unit(in + i, bits, out + i);
      } else {
        T values[64] = {};
        std::memcpy(values, in + i, static_cast<size_t>(columns - i) * sizeof(T));
        T kept[64];
        keep_unit(values, bits, kept);
        std::memcpy(out + i, kept, static_cast<size_t>(columns - i) * sizeof(T));
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
  for (int64_t row = 0; row < layout.rows; ++row)
    apply_row(dense + row * columns, words + row * words_a_row, layout, out + row * columns);
}

}  // namespace

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
