// SGD with momentum or AdamW on the live weights of many tensors in one pass over memory: gradient
// and state of a dead weight count as 0 and its state is written as 0, its weight stays.
//
// Products and sums are rounded one by one on every level, so that all of them give the same bits.
#pragma GCC optimize("fp-contract=off")

#include "bits.h"
#include "update.h"

namespace st::ST_ISA {
namespace {

inline void put_shadow(Vec a, bf16* p, int64_t n) {
  float values[16];
  store(a, values);
  for (int64_t i = 0; i < n; ++i) store_float(values[i], p + i);
}

// Up to sixteen weights; `live`: their bits.
template <bool adam, bool whole>
inline void update(const MaskedTensor& t, const ScoreRule& rule, const Hyper& h, int64_t first,
                   int64_t n, uint32_t live) {
  const Vec weight = fetch<whole>(t.weights + first, n);
  const Vec grad = keep(fetch<whole>(t.grads + first, n), live);
  Vec held = t.momentum ? keep(fetch<whole>(t.momentum + first, n), live) : zero();
  Vec square = adam ? keep(fetch<whole>(t.variance + first, n), live) : zero();
  const Vec made = stepped<adam>(weight, grad, held, square, t.momentum != nullptr, rule, h);
  put<whole>(choose(live, made, weight), t.weights + first, n);
  if (t.momentum) put<whole>(keep(held, live), t.momentum + first, n);
  if (adam) put<whole>(square, t.variance + first, n);
  if (t.shadow) put_shadow(keep(made, live), static_cast<bf16*>(t.shadow) + first, n);
}

template <bool adam>
void step_row(const MaskedTensor& t, const ScoreRule& rule, const Hyper& h, int64_t row) {
  const int64_t columns = columns_of(t.layout), block = block_size(t.layout);
  const uint32_t* const words = t.words + row * row_words(columns);
  for (int64_t at = 0; at < columns; at += block) {
    uint64_t memory[kBlockUnits];
    memory_bits(words, t.layout, at, memory);
    for (int64_t i = at; i < at + block && i < columns; i += 16) {
      const uint32_t live = static_cast<uint32_t>(memory[(i - at) >> 6] >> (i & 63)) & 0xFFFF;
      if (columns - i >= 16)
        update<adam, true>(t, rule, h, row * columns + i, 16, live);
      else
        update<adam, false>(t, rule, h, row * columns + i, columns - i, live);
    }
  }
}

template <bool adam>
void step(const MaskedTensor* tensors, int64_t count, const ScoreRule& rule, int nthreads) {
  const Hyper h = spread(rule);
  int64_t weights = 0;
  for (int64_t i = 0; i < count; ++i)
    weights += tensors[i].layout.rows * columns_of(tensors[i].layout);
#pragma omp parallel num_threads(threads_for(weights, nthreads))
  for (int64_t i = 0; i < count; ++i) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < tensors[i].layout.rows; ++row)
      step_row<adam>(tensors[i], rule, h, row);
  }
}

}  // namespace

void masked_step(const MaskedTensor* ST_RESTRICT tensors, int64_t count, ScoreRule rule,
                 int nthreads) {
  rule.adam ? step<true>(tensors, count, rule, nthreads)
            : step<false>(tensors, count, rule, nthreads);
}

}  // namespace st::ST_ISA
