#include "live_bits.h"

namespace st::ST_ISA {
namespace {

template <typename T>
void gather(const T* ST_RESTRICT dense, const uint32_t* ST_RESTRICT words, T* ST_RESTRICT values,
            const int64_t* ST_RESTRICT starts, const Layout& layout, int nthreads) {
  const int64_t k = columns_of(layout);
  const int threads = threads_for(layout.rows * k, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    const T* const from = dense + row * k;
    T* to = values + starts[row];
    Place place(layout);
    for_live(words + row * row_words(k), k,
             [&](int64_t column) { *to++ = from[place.of(column)]; });
  }
}

}  // namespace

// starts: row_starts of the words. Elements are moved as unsigned integers.
void gather_live(const void* ST_RESTRICT dense, const uint32_t* ST_RESTRICT words,
                 void* ST_RESTRICT values, const int64_t* ST_RESTRICT starts, int64_t item_bytes,
                 Layout layout, int nthreads) {
  if (item_bytes == 2)
    gather(static_cast<const uint16_t*>(dense), words, static_cast<uint16_t*>(values), starts,
           layout, nthreads);
  else if (item_bytes == 4)
    gather(static_cast<const uint32_t*>(dense), words, static_cast<uint32_t*>(values), starts,
           layout, nthreads);
  else
    gather(static_cast<const uint64_t*>(dense), words, static_cast<uint64_t*>(values), starts,
           layout, nthreads);
}

void live_starts(const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k,
                 int64_t* ST_RESTRICT starts) {
  row_starts(words, rows, k, starts);
}

}  // namespace st::ST_ISA
