// Direct convolution over live taps, shared by every conv kernel. The input of an image is copied
// once into zero-padded planes, split by stride phase, so that a tap is one constant offset and
// output pixels are one flat axis (the planes' rows, pad columns dropped when storing). A tile of
// pixel vectors stays in registers across the taps of a segment: those of one output channel in one
// block of input channels, whose windows fit the L1 cache together.
#pragma once

#include "core.h"
#include "simd.h"

namespace st {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = kConvTile;
#elif defined(__AVX2__)
constexpr int kTile = 6;
#else
constexpr int kTile = 2;
#endif

// Taps by (block of channels, output), each segment in canonical order; starts: blocks*outputs + 1.
struct TapStream {
  const int32_t* starts;
  const int32_t* offsets;
  const float* values;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------- padded planes
// One row of a phase plane: source columns j * stride + first for j in [0, columns).
inline void pad_row(const float* ST_RESTRICT from, float* ST_RESTRICT to, int64_t width,
                    int64_t columns, int64_t stride, int64_t first) {
  const int64_t lo = smaller(first < 0 ? (-first + stride - 1) / stride : 0, columns);
  const int64_t hi =
      larger(lo, smaller(columns, first < width ? (width - 1 - first) / stride + 1 : 0));
  for (int64_t j = 0; j < lo; ++j) to[j] = 0.0f;
  if (stride == 1)
    std::memcpy(to + lo, from + lo + first, static_cast<size_t>(hi - lo) * sizeof(float));
  else if (stride == 2)  // a known stride becomes shuffles
    for (int64_t j = lo; j < hi; ++j) to[j] = from[2 * j + first];
  else
    for (int64_t j = lo; j < hi; ++j) to[j] = from[j * stride + first];
  for (int64_t j = hi; j < columns; ++j) to[j] = 0.0f;
}

inline void pad_channel(const float* ST_RESTRICT x, float* ST_RESTRICT to, const Conv& c,
                        const ConvPlan& plan) {
  for (int64_t a = 0; a < plan.phases_h; ++a)
    for (int64_t b = 0; b < plan.phases_w; ++b)
      for (int64_t i = 0; i < plan.rows; ++i, to += plan.columns) {
        const int64_t h = i * c.stride_h + a * c.dilation_h % c.stride_h - c.pad_h;
        const bool inside = h >= 0 && h < c.height;
        pad_row(x + (inside ? h : 0) * c.width, to, inside ? c.width : 0, plan.columns, c.stride_w,
                b * c.dilation_w % c.stride_w - c.pad_w);
      }
}

// ---------------------------------------------------------------- one tile of pixels
template <int kCount>
inline void accumulate(const float* ST_RESTRICT x, const int32_t* ST_RESTRICT offsets,
                       const float* ST_RESTRICT values, int64_t live, const float* bias,
                       float* ST_RESTRICT sums) {
  Vec acc[kCount];
  for (int i = 0; i < kCount; ++i) acc[i] = bias ? broadcast(*bias) : load(sums + 16 * i);
  for (int64_t t = 0; t < live; ++t) {
    const Vec value = broadcast(values[t]);
    const float* const p = x + offsets[t];
    for (int i = 0; i < kCount; ++i) acc[i] = fma(value, load(p + 16 * i), acc[i]);
  }
  for (int i = 0; i < kCount; ++i) store(acc[i], sums + 16 * i);
}

// accumulate<count> for a count known at run time: the accumulators must be registers.
template <int kCount = kTile>
inline void accumulate_of(int64_t count, const float* ST_RESTRICT x,
                          const int32_t* ST_RESTRICT offsets, const float* ST_RESTRICT values,
                          int64_t live, const float* bias, float* ST_RESTRICT sums) {
  if (count == kCount)
    accumulate<kCount>(x, offsets, values, live, bias, sums);
  else if constexpr (kCount > 1)
    accumulate_of<kCount - 1>(count, x, offsets, values, live, bias, sums);
}

// Pixel vectors [first, first + count) of the flat axis, read from `base` on: a tile that would
// read past an unpadded input starts earlier than it stores.
struct Tile {
  int64_t base, first, count;
};

inline Tile tile_of(const ConvPlan& plan, int64_t index, int64_t tiles) {
  const int64_t first = plan.vectors * index / tiles;
  const int64_t count = plan.vectors * (index + 1) / tiles - first;
  const bool over = plan.in_place && (first + count) * 16 > plan.pixels;
  return {over ? plan.pixels - 16 * count : 16 * first, 16 * first, count};
}

// The tile's pixels without pad columns into one output plane.
inline void store_tile(const float* ST_RESTRICT sums, const Tile& tile, const Conv& c,
                       const ConvPlan& plan, float* ST_RESTRICT y) {
  const int64_t end = smaller(tile.base + 16 * tile.count, plan.pixels);
  if (plan.columns == c.out_width) {
    std::memcpy(y + tile.first, sums + tile.first - tile.base,
                static_cast<size_t>(end - tile.first) * sizeof(float));
    return;
  }
  for (int64_t row = tile.first / plan.columns; row * plan.columns < end; ++row) {
    const int64_t from = larger(row * plan.columns, tile.first);
    const int64_t to = smaller(row * plan.columns + c.out_width, end);
    if (to <= from) continue;
    std::memcpy(y + row * c.out_width + from - row * plan.columns, sums + from - tile.base,
                static_cast<size_t>(to - from) * sizeof(float));
  }
}

// Outputs [o0, o1) of one tile of one image.
void convolve_tile(const float* ST_RESTRICT planes, const TapStream& taps,
                   const float* ST_RESTRICT bias, float* ST_RESTRICT y, const Conv& c,
                   const ConvPlan& plan, const Tile& tile, int64_t o0, int64_t o1,
                   float* ST_RESTRICT sums) {
  const float zero_bias = 0.0f;
  const int64_t group_floats = c.channels / c.groups * plan.channel_floats;
  const int64_t group_outputs = c.outputs / c.groups;
  for (int64_t block = 0; block < plan.blocks; ++block)
    for (int64_t o = o0; o < o1; ++o) {
      const int32_t* const range = taps.starts + block * c.outputs + o;
      float* const mine = plan.blocks > 1 ? sums + (o - o0) * 16 * kTile : sums;
      const float* const start = block ? nullptr : bias ? bias + o : &zero_bias;
      accumulate_of(tile.count, planes + o / group_outputs * group_floats + tile.base,
                    taps.offsets + range[0], taps.values + range[0], range[1] - range[0], start,
                    mine);
      if (block == plan.blocks - 1)
        store_tile(mine, tile, c, plan, y + o * c.out_height * c.out_width);
    }
}

// ---------------------------------------------------------------- images and threads
// work(planes, y of the image, tile, first row, last row, thread), rows being output channels or
// strips of them.
// Whole images to a thread while there are enough; the rest together, by tiles or by outputs. The
// order in which a pixel's taps are added never depends on it.
template <typename Work>
void over_images(const float* ST_RESTRICT x, float* ST_RESTRICT y, const Conv& c,
                 const ConvPlan& plan, int64_t rows, float* ST_RESTRICT planes, int64_t tiles,
                 int nthreads, const Work& work) {
  const int64_t x_image = c.channels * c.height * c.width;
  const int64_t y_image = c.outputs * c.out_height * c.out_width;
  const int64_t alone = c.batch - c.batch % nthreads;
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
  for (int thread = 0; thread < nthreads; ++thread)
    for (int64_t n = thread; n < alone; n += nthreads) {
      float* const mine = planes + thread * conv_image_floats(c, plan);
      const float* const image = x + n * x_image;
      if (!plan.in_place)
        for (int64_t i = 0; i < c.channels; ++i)
          pad_channel(image + i * c.height * c.width, mine + i * plan.channel_floats, c, plan);
      for (int64_t t = 0; t < tiles; ++t)
        work(plan.in_place ? image : mine, y + n * y_image, t, 0, rows, thread);
    }
  const int64_t parts = tiles >= 8 * nthreads ? 1 : nthreads;
  for (int64_t n = alone; n < c.batch; ++n) {
    const float* const image = x + n * x_image;
#pragma omp parallel for num_threads(nthreads) schedule(static)
    for (int64_t i = 0; i < (plan.in_place ? 0 : c.channels); ++i)
      pad_channel(image + i * c.height * c.width, planes + i * plan.channel_floats, c, plan);
#pragma omp parallel for num_threads(nthreads) schedule(static, 1)
    for (int thread = 0; thread < nthreads; ++thread)
      for (int64_t item = thread; item < tiles * parts; item += nthreads) {
        const int64_t part = item % parts;
        work(plan.in_place ? image : planes, y + n * y_image, item / parts, rows * part / parts,
             rows * (part + 1) / parts, thread);
      }
  }
}

void sparse_convolution(const float* ST_RESTRICT x, const TapStream& taps,
                        const float* ST_RESTRICT bias, float* ST_RESTRICT y, const Conv& c,
                        const ConvPlan& plan, const ConvScratch& scratch, int nthreads) {
  const int64_t tiles = (plan.vectors + kTile - 1) / kTile;
  const auto work = [&](const float* planes, float* image_y, int64_t tile, int64_t o0, int64_t o1,
                        int thread) {
    convolve_tile(planes, taps, bias, image_y, c, plan, tile_of(plan, tile, tiles), o0, o1,
                  scratch.sums + thread * conv_sums_floats(c));
  };
  over_images(x, y, c, plan, c.outputs, scratch.planes, tiles, nthreads, work);
}

// ---------------------------------------------------------------- decoding a mask
// Where canonical column k of any row reads, the block of channels that it belongs to, and its
// place.
inline void place_columns(const Conv& c, const ConvPlan& plan, Column* ST_RESTRICT columns) {
  const int64_t channels = c.channels / c.groups;
  for (int64_t r = 0, k = 0; r < c.kernel_h; ++r)
    for (int64_t s = 0; s < c.kernel_w; ++s) {
      const int64_t phase = r % plan.phases_h * plan.phases_w + s % plan.phases_w;
      const int64_t at = (phase * plan.rows + r * c.dilation_h / c.stride_h) * plan.columns +
                         s * c.dilation_w / c.stride_w;
      for (int64_t i = 0; i < channels; ++i, ++k)
        columns[k] = {static_cast<int32_t>(i * plan.channel_floats + at),
                      static_cast<int32_t>(i / plan.block_channels),
                      static_cast<int32_t>((i * c.kernel_h + r) * c.kernel_w + s)};
    }
}

// Lists the set bits of a word from `first` on, without a branch for each: few words have more than
// kAtOnce, and which have how many is chance. Up to kAtOnce too many are written. Returns how many.
constexpr int kAtOnce = 4;
inline int64_t list_bits(uint32_t word, int64_t first, int32_t* ST_RESTRICT list) {
  const int count = __builtin_popcount(word);
  for (int done = 0; done < count || done == 0; done += kAtOnce)
    for (int i = 0; i < kAtOnce; ++i, word &= word - 1)
      list[done + i] = static_cast<int32_t>(first) + __builtin_ctz(word | 1u << 31);
  return count;
}

// Visits the live columns of a row in canonical order.
template <typename Visit>
inline void live_columns(const uint32_t* ST_RESTRICT row, int64_t k, const Visit& visit) {
  constexpr int64_t kWords = 32;
  int32_t list[32 * kWords + kAtOnce];
  for (int64_t from = 0; from < row_words(k); from += kWords) {
    int64_t count = 0;
    for (int64_t w = from; w < smaller(from + kWords, row_words(k)); ++w)
      count += list_bits(row[w] & weight_bits(k, w), 32 * w, list + count);
    for (int64_t i = 0; i < count; ++i) visit(int64_t{list[i]});
  }
}

// Fills starts and offsets; emit(position in the stream, row, k, rank in canonical order).
template <typename Emit>
void decode_taps(const uint32_t* ST_RESTRICT words, const Conv& c, const ConvPlan& plan,
                 Column* ST_RESTRICT columns, int32_t* ST_RESTRICT starts,
                 int32_t* ST_RESTRICT offsets, const Emit& emit) {
  const int64_t k = conv_columns(c), stride = row_words(k), segments = plan.blocks * c.outputs;
  place_columns(c, plan, columns);
  for (int64_t i = 0; i <= segments; ++i) starts[i] = 0;
  for (int64_t o = 0; o < c.outputs; ++o)
    live_columns(words + o * stride, k,
                 [&](int64_t at) { ++starts[columns[at].block * c.outputs + o]; });
  int32_t total = 0;  // counts become ends of segments before, then run up to their own ends
  for (int64_t i = 0; i <= segments; ++i) {
    const int32_t count = starts[i];
    starts[i] = total;
    total += count;
  }
  int64_t rank = 0;
  for (int64_t o = 0; o < c.outputs; ++o)
    live_columns(words + o * stride, k, [&](int64_t at) {
      const int32_t to = starts[columns[at].block * c.outputs + o]++;
      offsets[to] = columns[at].offset;
      emit(to, o, at, rank++);
    });
  for (int64_t i = segments; i > 0; --i) starts[i] = starts[i - 1];
  starts[0] = 0;
}

}  // namespace
}  // namespace st
