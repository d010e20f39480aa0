#include <cstring>

#include "live_bits.h"

namespace st::ST_ISA {
namespace {

template <typename T>
void scatter(const T* ST_RESTRICT values, const uint32_t* ST_RESTRICT words, T* ST_RESTRICT dense,
             const int64_t* ST_RESTRICT starts, const Layout& layout, int nthreads) {
  const int64_t k = columns_of(layout);
  const int threads = threads_for(layout.rows * k, nthreads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < layout.rows; ++row) {
    const T* from = values + starts[row];
    T* const to = dense + row * k;
    std::memset(to, 0, static_cast<size_t>(k) * sizeof(T));
    Place place(layout);
    for_live(words + row * row_words(k), k,
             [&](int64_t column) { to[place.of(column)] = *from++; });
  }
}

}  // namespace

// starts: row_starts of the words. Elements are moved as unsigned integers.
void scatter_live(const void* ST_RESTRICT values, const uint32_t* ST_RESTRICT words,
                  void* ST_RESTRICT dense, const int64_t* ST_RESTRICT starts, int64_t item_bytes,
                  Layout layout, int nthreads) {
  if (item_bytes == 2)
    scatter(static_cast<const uint16_t*>(values), words, static_cast<uint16_t*>(dense), starts,
            layout, nthreads);
  else if (item_bytes == 4)
    scatter(static_cast<const uint32_t*>(values), words, static_cast<uint32_t*>(dense), starts,
            layout, nthreads);
  else
    scatter(static_cast<const uint64_t*>(values), words, static_cast<uint64_t*>(dense), starts,
            layout, nthreads);
}

}  // namespace st::ST_ISA
