// Score update, straight-through gradient and exact selection in one pass over memory: a few
// hundred scores are updated and go, still in the cache, through the pass of select.h with the
// bracket of the last threshold. On a miss one selection on its own follows.
//
// Products and sums are rounded one by one on every level, so that all of them give the same bits.
#pragma GCC optimize("fp-contract=off")

#include "select.h"
#include "update.h"

namespace st::ST_ISA {
namespace {

constexpr int64_t kUpdateAhead = 1024;  // up to four streams at once

#if defined(__AVX512F__)
inline uint32_t not_zero(Vec a) {
  return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}
inline Vec flip_like(Vec a, Vec sign) {  // change the sign where that one has its sign bit
  return {_mm512_xor_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
#elif defined(__AVX2__)
inline Vec flip_like(Vec a, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, _mm256_and_ps(sign.lo, bit)),
          _mm256_xor_ps(a.hi, _mm256_and_ps(sign.hi, bit))};
}
inline uint32_t not_zero(Vec a) {
  const __m256 none = _mm256_setzero_ps();
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, none, _CMP_NEQ_UQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, none, _CMP_NEQ_UQ));
  return static_cast<uint32_t>(lo | hi << 8);
}
#else
inline Vec flip_like(Vec a, Vec sign) {
  for (int i = 0; i < 16; ++i) a.v[i] = __builtin_signbit(sign.v[i]) ? -a.v[i] : a.v[i];
  return a;
}
inline uint32_t not_zero(Vec a) {
  uint32_t out = 0;
  for (int i = 0; i < 16; ++i) out |= static_cast<uint32_t>(!(a.v[i] == 0.0f)) << i;
  return out;
}
#endif

constexpr int64_t kBlockUnits = 4;

// G * W * sign(s), with the weight's sign bits; 0 where an abs score is 0.
template <bool abs>
inline Vec straight_through(Vec grad, Vec score, uint32_t signs, Vec sigma) {
  grad = flip(times(grad, sigma), signs);
  return abs ? keep(flip_like(grad, score), not_zero(score)) : grad;
}

// Sixteen scores.
template <bool abs, bool adam, bool whole>
inline void update(const ScoreState& s, const ScoreRule& rule, const Hyper& h, Vec sigma,
                   int64_t first, int64_t n, uint32_t signs) {
  Vec score = fetch<whole>(s.scores + first, n);
  Vec grad = fetch<whole>(s.grads + first, n);
  if (s.signs) grad = straight_through<abs>(grad, score, signs, sigma);
  Vec held = s.momentum ? fetch<whole>(s.momentum + first, n) : zero();
  Vec square = adam ? fetch<whole>(s.variance + first, n) : zero();
  score = stepped<adam>(score, grad, held, square, s.momentum != nullptr, rule, h);
  put<whole>(score, s.scores + first, n);
  if (s.momentum) put<whole>(held, s.momentum + first, n);
  if (adam) put<whole>(square, s.variance + first, n);
}

// So that memory keeps working while a block is being selected.
inline void ahead(const ScoreState& s, int64_t first) {
  __builtin_prefetch(s.scores + first + kUpdateAhead, 1);
  __builtin_prefetch(s.grads + first + kUpdateAhead);
  if (s.momentum) __builtin_prefetch(s.momentum + first + kUpdateAhead, 1);
  if (s.variance) __builtin_prefetch(s.variance + first + kUpdateAhead, 1);
}

// A row's sign bits in memory order; the last row is remembered.
struct RowSigns {
  const Scores& scores;
  const uint32_t* signs;
  uint32_t* memory;
  int64_t row;
};
inline uint64_t signs_of(RowSigns& s, int64_t row, int64_t unit) {
  if (!s.signs) return 0;
  if (in_order(s.scores)) return load_unit(s.signs + 2 * unit);
  const int64_t words = row_words(s.scores.layout);
  if (row != s.row) reorder_row<false>(s.signs + row * words, s.memory, s.scores.layout);
  s.row = row;
  return load_unit(s.memory + 2 * unit - row * words);
}

template <bool abs, bool adam>
void step_part(const Scores* scores, const ScoreState* states, int64_t count, Range range,
               const ScoreRule& rule, const SelectScratch& scratch, int thread, Emitter& e) {
  const Hyper h = spread(rule);
  each_part(scores, count, range, [&](int64_t t, int64_t begin, int64_t end) {
    const ScoreState s = states[t];
    const Vec sigma = broadcast(s.sigma);
    RowSigns row{scores[t], s.signs, scratch.row + thread * scratch.row_words, -1};
    uint32_t* const words = scores[t].words;
    each_run(scores[t].layout, begin, end, !in_order(scores[t]), kBlockUnits,
             [&](int64_t r, int64_t unit, int64_t first, int64_t n) {
               uint64_t signs = 0;
               for (int64_t i = 0; i < n; i += 16, signs >>= 16) {
                 if (i % 64 == 0) signs = signs_of(row, r, unit + i / 64);
                 ahead(s, first + i);
                 const uint32_t part = static_cast<uint32_t>(signs) & 0xFFFF;
                 if (n - i >= 16)
                   update<abs, adam, true>(s, rule, h, sigma, first + i, 16, part);
                 else
                   update<abs, adam, false>(s, rule, h, sigma, first + i, n - i, part);
               }
               emit<abs>(s.scores + first, n, nullptr, words + 2 * unit, e);
             });
  });
}

template <bool abs, bool adam>
Selection step(const Scores* scores, const ScoreState* states, int64_t count, const ScoreRule& rule,
               int64_t kept, uint32_t hint, const SelectScratch& scratch, int nthreads) {
  int64_t eligible = 0;
  for (int64_t t = 0; t < count; ++t)
    eligible += scores[t].layout.rows * columns_of(scores[t].layout);
  const bool hinted = hint != 0 && kept > 0;
  const Bracket bracket = hinted ? hinted_bracket(hint, abs) : Bracket{kHighestKey, kHighestKey};
  const int64_t units = units_in(scores, count);
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
  for (int thread = 0; thread < nthreads; ++thread) {
    const Range range = share(units, thread, nthreads);
    Emitter e = emitter(bracket, scratch, range.begin, thread);
    step_part<abs, adam>(scores, states, count, range, rule, scratch, thread, e);
    scratch.parts[thread] = part_of(e, scratch, range.begin);
  }
  const SelectPart total = total_of(scratch.parts, nthreads);
  if (total.nan || kept < 0) return {0, total.nan};
  Search search{nullptr, 0, eligible, kept, scratch.room, kLowestKey, kHighestKey};
  if (hinted && judge(total, kept, bracket, search) == Verdict::held)
    return finish<abs>(scores, count, kept, bracket, scratch, nthreads);
  return select_list<abs>(scores, count, eligible, kept, 0, scratch, nthreads);
}

}  // namespace

Selection popup_step(const Scores* ST_RESTRICT scores, const ScoreState* ST_RESTRICT states,
                     int64_t count, ScoreRule rule, int64_t kept, bool abs, uint32_t hint,
                     SelectScratch scratch, int nthreads) {
  const auto run = abs         ? rule.adam ? step<true, true> : step<true, false>
                   : rule.adam ? step<false, true>
                               : step<false, false>;
  return run(scores, states, count, rule, kept, hint, scratch, nthreads);
}

}  // namespace st::ST_ISA
