#include "lookup.h"

namespace st::ST_ISA {
namespace {

// How a sum of +-1 times activations becomes an output.
template <typename T>
struct Output {
  const T* bias;
  float sigma;
  void store(float sum, int64_t row, T* y) const {
    store_float(sigma * sum + (bias ? to_float(bias[row]) : 0.0f), y);
  }
};

// ------------------------------------------------------------------ one batch row, from bit planes

constexpr int kSubsets = (32 + kSubset - 1) / kSubset;  // tables of a word
constexpr int64_t kEntries = 1 << kSubset;
constexpr int64_t kBlocks = kTileRows / 16;  // whose planes are in L1 together

// The sums of each group of activations, for 32 columns; those past n count as 0. An entry's bits
// say which weights are -1 where all are kept, else which are kept: the others are added as 0 * x,
// so that infinities and NaN spread as in a dense layer.
// Sixteen entries are written at a time; where tables are shorter, the next one goes over the rest.
template <bool kAll, typename T>
void subset_tables(const T* ST_RESTRICT x, int64_t n, float* ST_RESTRICT tables) {
  static constexpr float bits[4][16] = {{0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1},
                                        {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1},
                                        {0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1},
                                        {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}};
  Vec weight[kSubset];
  for (int i = 0; i < kSubset; ++i)
    weight[i] = kAll ? fma(broadcast(-2), load(bits[i]), broadcast(1)) : load(bits[i]);
  float v[kSubsets * kSubset] = {};
  for (int64_t i = 0; i < 32 && i < n; ++i) v[i] = to_float(x[i]);
  for (int at = 0; at < kSubsets * kSubset; at += kSubset, tables += kEntries) {
    Vec sums = zero();
    for (int i = 0; i < kSubset; ++i) sums = fma(broadcast(v[at + i]), weight[i], sums);
    store(sums, tables);
  }
}

template <bool kAll>
inline Vec word_sum(const SubsetTable* t, Ints kept, Ints negative) {
  Vec plus = zero(), minus = zero();
  const Ints ones = kAll ? negative : both(kept, negative), others = without(kept, negative);
  for (unsigned g = 0; g < kSubsets; ++g) {
    plus = add(plus, pick(t[g], field_at(kAll ? ones : others, kSubset * g)));
    if (!kAll) minus = add(minus, pick(t[g], field_at(ones, kSubset * g)));
  }
  return kAll ? plus : sub(plus, minus);
}

template <bool kAll, typename T>
void plane_rows(const Planes& p, const float* ST_RESTRICT tables, int64_t first,
                const Output<T>& output, T* ST_RESTRICT y) {
  const int64_t words_a_row = row_words(p.k);
  uint32_t kept[kBlocks * 256] = {}, negative[kBlocks * 256];
  Vec sums[kBlocks];
  for (Vec& sum : sums) sum = zero();
  const int64_t blocks = p.rows - first < 16 * kBlocks ? (p.rows - first + 15) / 16 : kBlocks;
  for (int64_t slab = 0; slab < words_a_row; slab += 16) {
    for (int64_t b = 0; b < blocks; ++b)
      planes_by_lane(p, first + 16 * b, slab, kept + 256 * b, negative + 256 * b);
    for (int64_t w = 0; w < 16 && slab + w < words_a_row; ++w) {
      SubsetTable table[kSubsets];
      for (int g = 0; g < kSubsets; ++g)
        table[g] = subset_table(tables + ((slab + w) * kSubsets + g) * kEntries);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = 256 * b + 16 * w;
        const Vec sum = word_sum<kAll>(table, load_ints(kept + at), load_ints(negative + at));
        sums[b] = add(sums[b], sum);
      }
    }
  }
  float out[16];
  for (int64_t row = first; row < p.rows && row < first + 16 * kBlocks; ++row) {
    if ((row - first) % 16 == 0) store(sums[(row - first) / 16], out);
    output.store(out[(row - first) % 16], row, y + row);
  }
}

template <bool kAll, typename T>
void planes_linear(const Planes& p, const T* ST_RESTRICT x, int64_t batch, const Output<T>& output,
                   T* ST_RESTRICT y, float* ST_RESTRICT tables, int nthreads) {
  const int threads = threads_for(p.rows * p.k, nthreads);
  for (int64_t b = 0; b < batch; ++b, x += p.k, y += p.rows) {
    for (int64_t w = 0; w < row_words(p.k); ++w)
      subset_tables<kAll>(x + 32 * w, p.k - 32 * w, tables + w * kSubsets * kEntries);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < p.rows; row += 16 * kBlocks)
      plane_rows<kAll>(p, tables, row, output, y);
  }
}

// ------------------------------------------------------------------------------------- from codes

constexpr int64_t kVectorRows = 6;         // batch rows left over that run faster one by one
constexpr int64_t kTableFloats = 96 * 16;  // of a group: rows d0 + 3 d1 + 9 d2 + 32 d3
constexpr int kSweep = 2;  // chunks of columns whose panel tables are in cache together

struct Codes {
  const uint32_t* words;
  int64_t rows, k, stride;
};

// A chunk's signed sums for one batch row: of the first three columns of each group, and of the
// fourth ones of two groups.
struct ChunkTables {
  TernaryTable three[kGroups];
  PairTable fourth[2];
};

// v times the digit, less 1, that stands in place i of the entry's index.
inline Vec digits(float v, int i, int half) {
  static constexpr float signs[3][32] = {
      {-1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1},
      {-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1},
      {-1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
  return fma(broadcast(v), load(signs[i] + 16 * half), zero());
}

inline Vec fourth_digits(float low, float high) {
  static constexpr float signs[2][16] = {{-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0},
                                         {-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0}};
  return fma(broadcast(high), load(signs[1]), fma(broadcast(low), load(signs[0]), zero()));
}

// entries: 5 * 32 floats that outlive the tables.
template <typename T>
ChunkTables chunk_tables(const T* ST_RESTRICT x, int64_t n, float* ST_RESTRICT entries) {
  float v[16] = {};
  store(n >= 16 ? load(x) : load_first(x, n), v);
  ChunkTables tables;
  for (int g = 0; g < kGroups; ++g, entries += 32) {
    for (int half = 0; half < 2; ++half) {
      const Vec upper = add(digits(v[4 * g + 2], 2, half), digits(v[4 * g + 1], 1, half));
      store(add(upper, digits(v[4 * g], 0, half)), entries + 16 * half);
    }
    tables.three[g] = ternary_table(entries);
  }
  for (int pair = 0; pair < 2; ++pair, entries += 16) {
    store(fourth_digits(v[8 * pair + 3], v[8 * pair + 7]), entries);
    tables.fourth[pair] = pair_table(entries);
  }
  return tables;
}

// sums[0 .. rows) over one batch row, for the outputs from `first` on.
template <typename T>
void code_rows_of(const Codes& codes, const T* ST_RESTRICT x, int64_t first, int64_t rows,
                  float* ST_RESTRICT sums) {
  std::memset(sums, 0, static_cast<size_t>(code_rows(rows)) * sizeof(float));
  for (int64_t c = 0; c < code_chunks(codes.k); ++c) {
    float entries[5 * 32];
    const ChunkTables t = chunk_tables(x + c * kCodeColumns, codes.k - c * kCodeColumns, entries);
    const uint32_t* const words = codes.words + c * codes.stride + first;
    for (int64_t r = 0; r < rows; r += 16) {
      const Ints w = load_ints(words + r);
      __builtin_prefetch(words + r + 1024);  // into the next page, where the hardware does not look
      const Vec low = add(pick<0>(t.three[0], w), pick<5>(t.three[1], w));
      const Vec high = add(pick<10>(t.three[2], w), pick<15>(t.three[3], w));
      const Vec fourth = add(pick<20>(t.fourth[0], w), pick<24>(t.fourth[1], w));
      store(add(add(load(sums + r), fourth), add(low, high)), sums + r);
    }
  }
}

// columns[16 * c + b]: 16 * blocks columns of up to sixteen batch rows; past the ends, 0.
template <typename T>
void load_columns(const T* ST_RESTRICT x, int64_t batch, int64_t k, int64_t first, int blocks,
                  float* ST_RESTRICT columns) {
  for (int i = 0; i < blocks; ++i, columns += 256) {
    float block[256] = {};
    const int64_t at = first + 16 * i, n = k - at < 16 ? k - at : 16;
    for (int64_t b = 0; b < batch && n > 0; ++b) {
      const T* const p = x + b * k + at;
      store(n == 16 ? load(p) : load_first(p, n), block + 16 * b);
    }
    transpose_block(block, 16, columns);
  }
}

// The 81 signed sums of a group of four columns, a row of sixteen batch lanes each. 0 * x is added
// where a weight is dropped, so that infinities and NaN spread as in a dense layer.
void panel_table(const float* ST_RESTRICT columns, float* ST_RESTRICT table) {
  Vec step[4][3];
  for (int i = 0; i < 4; ++i) {
    const Vec v = load(columns + 16 * i);
    step[i][0] = flip(v, 0xFFFF);
    step[i][1] = fma(v, zero(), zero());
    step[i][2] = v;
  }
  for (int d3 = 0; d3 < 3; ++d3) {
    float* to = table + 32 * 16 * d3;
    for (int d2 = 0; d2 < 3; ++d2) {
      const Vec last = add(step[3][d3], step[2][d2]);
      for (int d1 = 0; d1 < 3; ++d1) {
        const Vec upper = add(last, step[1][d1]);
        for (int d0 = 0; d0 < 3; ++d0, to += 16) store(add(upper, step[0][d0]), to);
      }
    }
  }
}

// Adds kChunks chunks of columns to the sums of every row: one load and add for four weights.
template <int kChunks>
void sweep(const uint32_t* ST_RESTRICT words, int64_t stride, int64_t rows,
           const float* ST_RESTRICT tables, float* ST_RESTRICT sums) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec even = load(sums + 16 * r), odd = zero();
    for (int q = 0; q < kChunks; ++q) {
      const uint64_t bytes = static_cast<uint64_t>(group_bytes(words[q * stride + r])) << 4;
      const float* const t = tables + q * kGroups * kTableFloats;
      even = add(even, load(t + (bytes & 0x7F0)));
      odd = add(odd, load(t + kTableFloats + (bytes >> 8 & 0x7F0)));
      even = add(even, load(t + 2 * kTableFloats + (bytes >> 16 & 0x7F0)));
      odd = add(odd, load(t + 3 * kTableFloats + (bytes >> 24 & 0x7F0)));
    }
    store(add(even, odd), sums + 16 * r);
  }
}

// sums[16 * r + b] for the outputs first + r and up to sixteen batch rows.
template <typename T>
void panel(const Codes& codes, const T* ST_RESTRICT x, int64_t batch, int64_t first, int64_t rows,
           float* ST_RESTRICT sums) {
  std::memset(sums, 0, static_cast<size_t>(rows) * 16 * sizeof(float));
  const int64_t chunks = code_chunks(codes.k);
  for (int64_t c = 0; c < chunks; c += kSweep) {
    alignas(64) float columns[kSweep * 256], tables[kSweep * kGroups * kTableFloats];
    const int n = chunks - c < kSweep ? 1 : kSweep;
    load_columns(x, batch, codes.k, c * kCodeColumns, n, columns);
    for (int i = 0; i < n * kGroups; ++i) panel_table(columns + 64 * i, tables + i * kTableFloats);
    const uint32_t* const words = codes.words + c * codes.stride + first;
    if (n == kSweep)
      sweep<kSweep>(words, codes.stride, rows, tables, sums);
    else
      sweep<1>(words, codes.stride, rows, tables, sums);
  }
}

template <typename T>
void store_panel(const float* ST_RESTRICT sums, int64_t batch, int64_t first, int64_t rows,
                 const Output<T>& output, T* ST_RESTRICT y, int64_t stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    float block[256];
    transpose_block(sums + 16 * r, 16, block);
    const int64_t n = rows - r < 16 ? rows - r : 16;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i)
        output.store(block[16 * b + i], first + r + i, y + b * stride + first + r + i);
  }
}

// Jobs are groups of batch rows times runs of outputs; every output is one sum in one order.
template <typename T>
void codes_linear(const Codes& codes, const T* ST_RESTRICT x, int64_t batch,
                  const Output<T>& output, T* ST_RESTRICT y, float* ST_RESTRICT sums,
                  int nthreads) {
  const int64_t left = batch % 16, vectors = left <= kVectorRows ? left : 0;
  const int64_t panels = (batch - vectors + 15) / 16, groups = panels + vectors;
  const int threads = threads_for(batch * codes.rows * codes.k, nthreads);
  int64_t runs = (codes.rows + kLookupRows - 1) / kLookupRows;
  if (groups * runs < threads) runs = threads;
  const int64_t run = code_rows((codes.rows + runs - 1) / runs);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    float* const mine = sums + thread * 16 * kLookupRows;
    for (int64_t job = thread; job < groups * runs; job += threads) {
      const int64_t group = job / runs, first = job % runs * run;
      const int64_t rows = codes.rows - first < run ? codes.rows - first : run;
      if (rows <= 0) continue;
      if (group < panels) {
        const int64_t b = 16 * group, n = batch - b < 16 ? batch - b : 16;
        panel(codes, x + b * codes.k, n, first, rows, mine);
        store_panel(mine, n, first, rows, output, y + b * codes.rows, codes.rows);
      } else {
        const int64_t b = 16 * panels + group - panels;
        code_rows_of(codes, x + b * codes.k, first, rows, mine);
        for (int64_t r = 0; r < rows; ++r)
          output.store(mine[r], first + r, y + b * codes.rows + first + r);
      }
    }
  }
}

template <typename T>
Output<T> output_of(const void* bias, float sigma) {
  return {static_cast<const T*>(bias), sigma};
}

template <typename T>
void planes_linear_of(const Planes& p, const void* ST_RESTRICT x, int64_t batch,
                      const void* ST_RESTRICT bias, float sigma, void* ST_RESTRICT y,
                      float* ST_RESTRICT tables, int nthreads) {
  const auto run = p.words ? planes_linear<false, T> : planes_linear<true, T>;
  run(p, static_cast<const T*>(x), batch, output_of<T>(bias, sigma), static_cast<T*>(y), tables,
      nthreads);
}

}  // namespace

void ticket_linear(const void* ST_RESTRICT x, const uint32_t* ST_RESTRICT words,
                   const uint32_t* ST_RESTRICT signs, const void* ST_RESTRICT bias,
                   void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows, int64_t k,
                   float sigma, uint32_t key, uint32_t high, float* ST_RESTRICT tables,
                   int nthreads) {
  const Planes planes{words, signs, rows, k, key, high};
  if (dtype == Dtype::f32)
    planes_linear_of<float>(planes, x, batch, bias, sigma, y, tables, nthreads);
  else
    planes_linear_of<bf16>(planes, x, batch, bias, sigma, y, tables, nthreads);
}

void lookup_linear(const void* ST_RESTRICT x, const uint32_t* ST_RESTRICT codes,
                   const void* ST_RESTRICT bias, void* ST_RESTRICT y, Dtype dtype, int64_t batch,
                   int64_t rows, int64_t k, float sigma, float* ST_RESTRICT sums, int nthreads) {
  const Codes c{codes, rows, k, code_rows(rows)};
  if (dtype == Dtype::f32)
    codes_linear(c, static_cast<const float*>(x), batch, output_of<float>(bias, sigma),
                 static_cast<float*>(y), sums, nthreads);
  else
    codes_linear(c, static_cast<const bf16*>(x), batch, output_of<bf16>(bias, sigma),
                 static_cast<bf16*>(y), sums, nthreads);
}

}  // namespace st::ST_ISA
