// y = x W^T for a sparse W: the batch lies innermost, in panels of up to 64 samples, so that each
// value is broadcast against whole vectors. Columns go in blocks whose slice of the panel stays in
// L1, rows in strips whose values stay in L2.
#include "panels.h"
#include "sparse_pattern.h"

namespace st::ST_ISA {
namespace {

constexpr int64_t kAhead = 4;

template <typename Index>
struct Matrix {
  Pattern shape;
  const uint32_t* starts;
  const Segment* segments;
  const Index* columns;
  const float* values;
};

// Adds one run of values to V vectors of sums; short rows of vectors take turns in several sets of
// sums to hide the latency of the fused multiply-adds.
template <int V, typename Index>
inline void add_run(const float* ST_RESTRICT values, const Index* ST_RESTRICT columns, int64_t n,
                    const float* ST_RESTRICT x, int64_t width, Vec* sums) {
  constexpr int kSets = V >= 3 ? 1 : 4 / V;
  Vec acc[kSets][V];
  for (int v = 0; v < V; ++v) acc[0][v] = sums[v];
  for (int s = 1; s < kSets; ++s)
    for (int v = 0; v < V; ++v) acc[s][v] = zero();
  int64_t i = 0;
  for (; i + kSets <= n; i += kSets)
    for (int s = 0; s < kSets; ++s) {
      const float* const p = x + static_cast<int64_t>(columns[i + s]) * width;
      const Vec w = broadcast(values[i + s]);
      for (int v = 0; v < V; ++v) acc[s][v] = fma(w, load(p + 16 * v), acc[s][v]);
    }
  for (; i < n; ++i) {
    const float* const p = x + static_cast<int64_t>(columns[i]) * width;
    const Vec w = broadcast(values[i]);
    for (int v = 0; v < V; ++v) acc[0][v] = fma(w, load(p + 16 * v), acc[0][v]);
  }
  for (int s = 1; s < kSets; ++s)
    for (int v = 0; v < V; ++v) acc[0][v] = add(acc[0][v], acc[s][v]);
  for (int v = 0; v < V; ++v) sums[v] = acc[0][v];
}

// Rows [first, first + n) times one panel; y is [n][..] with its own width.
template <int V, typename Index, typename T>
void strip_times_panel(const Matrix<Index>& w, int64_t first, int64_t n, const T* ST_RESTRICT bias,
                       const float* ST_RESTRICT x, int64_t x_width, float* ST_RESTRICT y,
                       int64_t y_width) {
  if (V == 1 || w.shape.blocks == 1) {
    for (int64_t r = 0; r < n; ++r) {
      const uint32_t start = w.starts[first + r], end = w.starts[first + r + 1];
      Vec sums[V];
      for (auto& sum : sums) sum = broadcast(bias ? to_float(bias[first + r]) : 0.0f);
      add_run<V>(w.values + start, w.columns + start, end - start, x, x_width, sums);
      for (int v = 0; v < V; ++v) store(sums[v], y + r * y_width + 16 * v);
    }
    return;
  }
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < V; ++v)
      store(broadcast(bias ? to_float(bias[first + r]) : 0.0f), y + r * y_width + 16 * v);
  const Segment* block = w.segments + first * w.shape.blocks;
  for (int64_t b = 0; b < w.shape.blocks; ++b, block += n)
    for (int64_t i = 0; i < n && block[i].count; ++i) {
      const Segment s = block[i];
      if (i + kAhead < n) {  // sorted by length, runs jump about: the hardware cannot foresee them
        const uint32_t next = block[i + kAhead].start;
        __builtin_prefetch(w.values + next);
        __builtin_prefetch(w.values + next + 16);
        __builtin_prefetch(w.columns + next);
      }
      float* const out = y + s.row * y_width;
      Vec sums[V];  // what is there is added last, when its load has long arrived
      for (auto& sum : sums) sum = zero();
      add_run<V>(w.values + s.start, w.columns + s.start, s.count, x, x_width, sums);
      for (int v = 0; v < V; ++v) store(add(sums[v], load(out + 16 * v)), out + 16 * v);
    }
}

template <typename Index, typename T>
void strip_product(int64_t vectors, const Matrix<Index>& w, int64_t first, int64_t n, const T* bias,
                   const float* x, int64_t x_width, float* y, int64_t y_width) {
  switch (vectors) {
    case 1:
      return strip_times_panel<1>(w, first, n, bias, x, x_width, y, y_width);
    case 2:
      return strip_times_panel<2>(w, first, n, bias, x, x_width, y, y_width);
    case 3:
      return strip_times_panel<3>(w, first, n, bias, x, x_width, y, y_width);
    default:
      return strip_times_panel<4>(w, first, n, bias, x, x_width, y, y_width);
  }
}

typedef float Four __attribute__((vector_size(16)));

// Loads are what one sample costs: values come four at a time, x one by one; gather instructions
// take 1.2 to 1.8 times as long on Zen 4.
template <typename Index, typename T>
inline Four add_four(const float* ST_RESTRICT values, const Index* ST_RESTRICT columns,
                     const T* ST_RESTRICT x, Four sums) {
  Four w;
  __builtin_memcpy(&w, values, sizeof w);
  const Four gathered = {to_float(x[columns[0]]), to_float(x[columns[1]]), to_float(x[columns[2]]),
                         to_float(x[columns[3]])};
  return sums + w * gathered;
}

template <typename Index, typename T>
void one_sample(const Matrix<Index>& w, const T* ST_RESTRICT x, const T* ST_RESTRICT bias,
                T* ST_RESTRICT y, int nthreads) {
#pragma omp parallel for num_threads(nthreads) schedule(static)
  for (int64_t row = 0; row < w.shape.rows; ++row) {
    const int64_t end = w.starts[row + 1];
    int64_t i = w.starts[row];
    Four even = {bias ? to_float(bias[row]) : 0.0f, 0, 0, 0}, odd = {0, 0, 0, 0};
    for (; i + 8 <= end; i += 8) {
      even = add_four(w.values + i, w.columns + i, x, even);
      odd = add_four(w.values + i + 4, w.columns + i + 4, x, odd);
    }
    if (i + 4 <= end) {
      even = add_four(w.values + i, w.columns + i, x, even);
      i += 4;
    }
    even += odd;
    for (; i < end; ++i) even[0] += w.values[i] * to_float(x[w.columns[i]]);
    store_float((even[0] + even[1]) + (even[2] + even[3]), y + row);
  }
}

// Panel after panel, which all threads pack and then share strip by strip.
template <typename Index, typename T>
void many_samples(const Matrix<Index>& w, const T* ST_RESTRICT x, const T* ST_RESTRICT bias,
                  T* ST_RESTRICT y, const Batch& batch, float* ST_RESTRICT packed,
                  float* ST_RESTRICT sums, int nthreads) {
  const int64_t rows = w.shape.rows, strips = w.shape.strips, stride = by_sample(batch, rows);
  for (int64_t panel = 0; panel < panels_of(batch); ++panel) {
    const Slice s = slice_of(batch, panel);
    T* const to = y + s.group * batch.samples * rows + s.first * stride;
    pack_slice(x, batch, s, w.shape.k, packed, nthreads);
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
    for (int64_t t = 0; t < nthreads; ++t)
      for (int64_t strip = t * strips / nthreads; strip < (t + 1) * strips / nthreads; ++strip) {
        const int64_t first = strip * kStrip, width = 16 * s.vectors;
        const int64_t n = rows - first < kStrip ? rows - first : kStrip;
        float* const mine = sums + t * kStrip * kPanel;
        strip_product(s.vectors, w, first, n, bias, packed, width, mine, width);
        unpack_panel(mine, s.vectors, n, to + first * by_feature(batch), stride, by_feature(batch),
                     s.samples);
      }
  }
}

// Panels that are the tensors themselves: [groups][features][samples] in whole vectors.
template <typename Index>
void resident(const Matrix<Index>& w, const float* ST_RESTRICT x, const float* ST_RESTRICT bias,
              float* ST_RESTRICT y, const Batch& batch, int nthreads) {
  const int64_t strips = w.shape.strips, rows = w.shape.rows, width = batch.samples;
  const int64_t items = panels_of(batch) * strips;
#pragma omp parallel for num_threads(nthreads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    const Slice s = slice_of(batch, item / strips);
    const int64_t first = item % strips * kStrip;
    const int64_t n = rows - first < kStrip ? rows - first : kStrip;
    strip_product(s.vectors, w, first, n, bias, x + s.group * width * w.shape.k + s.first, width,
                  y + (s.group * rows + first) * width + s.first, width);
  }
}

// Values as float32 in the order of the pattern; those given where they already are.
template <typename T>
const float* ordered_values(const T* ST_RESTRICT values, const uint32_t* ST_RESTRICT order,
                            int64_t kept, float* ST_RESTRICT copy, int nthreads) {
#pragma omp parallel for num_threads(threads_for(kept, nthreads)) schedule(static)
  for (int64_t i = 0; i < kept; ++i) copy[i] = to_float(values[order ? order[i] : i]);
  return copy;
}
const float* as_floats(const float* values) { return values; }
const float* as_floats(const bf16*) { return nullptr; }

bool is_resident(const float*, const Batch& batch) {
  return batch.inner && batch.samples % 16 == 0 && batch.samples <= kPanel;
}
bool is_resident(const bf16*, const Batch&) { return false; }
void resident(const Matrix<uint16_t>&, const bf16*, const bf16*, bf16*, const Batch&, int) {}
void resident(const Matrix<uint32_t>&, const bf16*, const bf16*, bf16*, const Batch&, int) {}

template <typename Index, typename T>
void run(const uint32_t* ST_RESTRICT pattern, const T* ST_RESTRICT values, const T* ST_RESTRICT x,
         const T* ST_RESTRICT bias, T* ST_RESTRICT y, const Batch& batch,
         float* ST_RESTRICT scratch, int nthreads) {
  const Pattern p = pattern_of(pattern[0], pattern[1], pattern[2]);
  const int threads = threads_for(batch.groups * batch.samples * p.kept, nthreads);
  const uint32_t* const order = pattern[3] ? pattern + p.order : nullptr;
  float* const packed = scratch + padded16(p.kept);
  const float* ready = order ? nullptr : as_floats(values);
  if (!ready) ready = ordered_values(values, order, p.kept, scratch, threads);
  const Matrix<Index> w{p, pattern + 16, reinterpret_cast<const Segment*>(pattern + p.segments),
                        reinterpret_cast<const Index*>(pattern + p.columns), ready};
  if (batch.groups * batch.samples == 1)
    one_sample(w, x, bias, y, threads);
  else if (is_resident(x, batch))
    resident(w, x, bias, y, batch, threads);
  else
    many_samples(w, x, bias, y, batch, packed, packed + kPanel * p.k, threads);
}

template <typename T>
void run_wide(const uint32_t* pattern, const void* values, const void* x, const void* bias, void* y,
              const Batch& batch, float* scratch, int nthreads) {
  const auto of = [](const void* p) { return static_cast<const T*>(p); };
  if (pattern[1] > 65536)
    run<uint32_t>(pattern, of(values), of(x), of(bias), static_cast<T*>(y), batch, scratch,
                  nthreads);
  else
    run<uint16_t>(pattern, of(values), of(x), of(bias), static_cast<T*>(y), batch, scratch,
                  nthreads);
}

}  // namespace

// scratch: sparse_linear_floats().
void sparse_linear(const uint32_t* ST_RESTRICT pattern, const void* ST_RESTRICT values,
                   const void* ST_RESTRICT x, const void* ST_RESTRICT bias, void* ST_RESTRICT y,
                   Dtype dtype, Batch batch, float* ST_RESTRICT scratch, int nthreads) {
  if (dtype == Dtype::f32)
    run_wide<float>(pattern, values, x, bias, y, batch, scratch, nthreads);
  else
    run_wide<bf16>(pattern, values, x, bias, y, batch, scratch, nthreads);
}

}  // namespace st::ST_ISA
