// torch.optim's formulas for SGD and AdamW on sixteen values, which popup_step and masked_step
// share. Their sources switch contraction off first: products and sums are rounded one by one on
// every level, so that all of them give the same bits.
#pragma once

#include "core.h"
#include "simd.h"

namespace st::ST_ISA {
namespace {

#if defined(__AVX512F__)
inline Vec times(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec minus(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec over(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec choose(uint32_t bits, Vec one, Vec other) {  // one where the bit is 1
  return {_mm512_mask_mov_ps(other.v, static_cast<__mmask16>(bits), one.v)};
}
#elif defined(__AVX2__)
inline Vec times(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec minus(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec over(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline Vec choose(uint32_t bits, Vec one, Vec other) {
  return {_mm256_blendv_ps(other.lo, one.lo, _mm256_castsi256_ps(lane_mask(bits))),
          _mm256_blendv_ps(other.hi, one.hi, _mm256_castsi256_ps(lane_mask(bits >> 8)))};
}
#else
inline Vec times(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Vec minus(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Vec over(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
inline Vec root(Vec a) {
  for (float& lane : a.v) lane = __builtin_sqrtf(lane);
  return a;
}
inline Vec choose(uint32_t bits, Vec one, Vec other) {
  for (int i = 0; i < 16; ++i) other.v[i] = (bits >> i) & 1 ? one.v[i] : other.v[i];
  return other;
}
#endif

struct Hyper {
  Vec lr, decay, momentum, beta1_rest, beta2, beta2_rest, eps, root;
};
inline Hyper spread(const ScoreRule& r) {
  return {broadcast(r.lr),         broadcast(r.decay), broadcast(r.momentum),
          broadcast(r.beta1_rest), broadcast(r.beta2), broadcast(r.beta2_rest),
          broadcast(r.eps),        broadcast(r.root)};
}

// Up to sixteen values; zeros past the end.
template <bool whole>
inline Vec fetch(const float* p, int64_t n) {
  return whole ? load(p) : load_first(p, n);
}
template <bool whole>
inline void put(Vec a, float* p, int64_t n) {
  if (whole)
    store(a, p);
  else
    store_first(a, p, n);
}

// One step, operation by operation; the moments in place.
template <bool adam>
inline Vec stepped(Vec value, Vec grad, Vec& held, Vec& square, bool momentum,
                   const ScoreRule& rule, const Hyper& h) {
  if (adam) {
    held = add(held, times(h.beta1_rest, minus(grad, held)));
    square = add(times(square, h.beta2), times(times(h.beta2_rest, grad), grad));
    const Vec size = add(over(root(square), h.root), h.eps);
    return minus(times(value, h.decay), over(times(h.lr, held), size));
  }
  if (rule.decay != 0.0f) grad = add(grad, times(h.decay, value));
  if (momentum) {
    held = add(times(held, h.momentum), grad);
    grad = rule.nesterov ? add(grad, times(h.momentum, held)) : held;
  }
  return minus(value, times(h.lr, grad));
}

}  // namespace
}  // namespace st::ST_ISA
