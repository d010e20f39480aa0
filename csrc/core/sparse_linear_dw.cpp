// dW of a sparse W: dot products of dY and X over the batch, at the live positions only. Sixteen
// dots are reduced together by a tree of shuffles.
#include "panels.h"
#include "sparse_pattern.h"

namespace st::ST_ISA {
namespace {

#if defined(__AVX512F__)
inline __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
// Lane i of the result is the sum of the lanes of m[i].
inline Vec sums16(const Vec* m) {
  __m512 quad[4];
  for (int i = 0; i < 4; ++i) {
    const Vec* const v = m + 4 * i;
    const __m512 low =
        _mm512_add_ps(_mm512_unpacklo_ps(v[0].v, v[1].v), _mm512_unpackhi_ps(v[0].v, v[1].v));
    const __m512 high =
        _mm512_add_ps(_mm512_unpacklo_ps(v[2].v, v[3].v), _mm512_unpackhi_ps(v[2].v, v[3].v));
    quad[i] = _mm512_add_ps(pairs(low, high, false), pairs(low, high, true));
  }
  return {add_halves(add_halves(quad[0], quad[1]), add_halves(quad[2], quad[3]))};
}
#elif defined(__AVX2__)
inline __m256 sums8(const Vec* m) {
  __m256 quad[2];
  for (int i = 0; i < 2; ++i) {
    __m256 v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm256_add_ps(m[4 * i + j].lo, m[4 * i + j].hi);
    quad[i] = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                       _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}
inline Vec sums16(const Vec* m) { return {sums8(m), sums8(m + 8)}; }
#else
inline Vec sums16(const Vec* m) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.v[i] = sum(m[i]);
  return out;
}
#endif

template <int V>
inline Vec dot(const Vec* g, const float* ST_RESTRICT x) {
  Vec out = fma(g[0], load(x), zero());
  for (int v = 1; v < V; ++v) out = fma(g[v], load(x + 16 * v), out);
  return out;
}

// One row of dY against the live columns of a panel of X; added to what is there unless `fresh`.
template <int V, typename Index>
void row_dots(const float* ST_RESTRICT grad, const float* ST_RESTRICT x,
              const Index* ST_RESTRICT columns, int64_t n, float* ST_RESTRICT out, bool fresh) {
  Vec g[V];
  for (int v = 0; v < V; ++v) g[v] = load(grad + 16 * v);
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t many = n - first < 16 ? n - first : 16;
    Vec dots[16];
    if (many == 16) {
      for (int i = 0; i < 16; ++i)
        dots[i] = dot<V>(g, x + static_cast<int64_t>(columns[first + i]) * 16 * V);
    } else {
      for (int i = 0; i < 16; ++i)
        dots[i] =
            i < many ? dot<V>(g, x + static_cast<int64_t>(columns[first + i]) * 16 * V) : zero();
    }
    const Vec total = sums16(dots);
    const Vec before = fresh ? zero() : load_first(out + first, many);
    store_part(add(before, total), out + first, many);
  }
}

template <typename Index, typename T>
void run(const uint32_t* ST_RESTRICT pattern, const T* ST_RESTRICT grad, const T* ST_RESTRICT x,
         T* ST_RESTRICT out, const Batch& batch, float* ST_RESTRICT scratch, int nthreads) {
  const Pattern p = pattern_of(pattern[0], pattern[1], pattern[2]);
  const uint32_t* const starts = pattern + 16;
  const Index* const columns = reinterpret_cast<const Index*>(pattern + p.columns);
  const int threads = threads_for(batch.groups * batch.samples * p.kept, nthreads);
  float* const totals = scratch;
  float* const packed_x = totals + padded16(p.kept);
  float* const packed_grad = packed_x + kPanel * p.k;
  for (int64_t panel = 0; panel < panels_of(batch); ++panel) {
    const Slice s = slice_of(batch, panel);
    pack_slice(x, batch, s, p.k, packed_x, threads);
    pack_slice(grad, batch, s, p.rows, packed_grad, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      const Index* const live = columns + starts[row];
      const int64_t n = starts[row + 1] - starts[row];
      const float* const g = packed_grad + row * 16 * s.vectors;
      float* const to = totals + starts[row];
      switch (s.vectors) {
        case 1:
          row_dots<1>(g, packed_x, live, n, to, panel == 0);
          break;
        case 2:
          row_dots<2>(g, packed_x, live, n, to, panel == 0);
          break;
        case 3:
          row_dots<3>(g, packed_x, live, n, to, panel == 0);
          break;
        default:
          row_dots<4>(g, packed_x, live, n, to, panel == 0);
      }
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < p.kept; ++i) store_float(totals[i], out + i);
}

template <typename T>
void run_wide(const uint32_t* pattern, const void* grad, const void* x, void* out,
              const Batch& batch, float* scratch, int nthreads) {
  const T* const g = static_cast<const T*>(grad);
  const T* const from = static_cast<const T*>(x);
  if (pattern[1] > 65536)
    run<uint32_t>(pattern, g, from, static_cast<T*>(out), batch, scratch, nthreads);
  else
    run<uint16_t>(pattern, g, from, static_cast<T*>(out), batch, scratch, nthreads);
}

}  // namespace

// pattern: not a transposed one. scratch: sparse_linear_dw_floats(). The batch has samples.
void sparse_linear_dw(const uint32_t* ST_RESTRICT pattern, const void* ST_RESTRICT grad,
                      const void* ST_RESTRICT x, void* ST_RESTRICT out, Dtype dtype, Batch batch,
                      float* ST_RESTRICT scratch, int nthreads) {
  if (dtype == Dtype::f32)
    run_wide<float>(pattern, grad, x, out, batch, scratch, nthreads);
  else
    run_wide<bf16>(pattern, grad, x, out, batch, scratch, nthreads);
}

}  // namespace st::ST_ISA
