// Every kernel of the library: one list that declares it in each ISA namespace and in the table.
//
// The sources of this folder are compiled once per ISA level with ST_ISA = base, avx2 or avx512.
// Kernels get raw pointers, int64 sizes and nthreads; scratch comes from the caller. "Rows" below
// are canonical rows: K = taps * channels weights in channels-last order; taps > 1 says that the
// dense side is in torch's contiguous order instead (element c * taps + s for k = s * channels +
// c).
#pragma once

#include <cstdint>

#define ST_RESTRICT __restrict__

namespace st {

enum class Dtype : int { f32 = 0, bf16 = 1 };
enum class Dist : int { signed_constant = 0, uniform = 1, normal = 2 };
enum class Logical : int { and_ = 0, or_ = 1, xor_ = 2, andnot = 3 };

struct Layout {
  int64_t rows, channels, taps;
};

// Anonymous, here and in the other headers: an inline function with external linkage would exist
// once per program, compiled for whichever ISA level the linker met first.
namespace {
inline int64_t row_words(int64_t k) { return 2 * ((k + 63) / 64); }
inline int64_t columns_of(const Layout& layout) { return layout.channels * layout.taps; }
// The bits of word w of a row that are weights, not padding.
inline uint32_t weight_bits(int64_t k, int64_t w) {
  const int64_t left = k - 32 * w;
  return left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
}
// Sizes of the codes of lookup.h: words [chunks of columns][rows].
constexpr int64_t kCodeColumns = 16;
inline int64_t code_chunks(int64_t k) { return (k + kCodeColumns - 1) / kCodeColumns; }
inline int64_t code_rows(int64_t rows) { return (rows + 15) / 16 * 16; }
// Threads worth waking for so many elements: a parallel region costs a few microseconds.
inline int threads_for(int64_t elements, int nthreads) { return elements < 32768 ? 1 : nthreads; }
inline int64_t row_words(const Layout& layout) { return row_words(columns_of(layout)); }
}  // namespace

// One score tensor in memory order. canonical: memory order is canonical order although taps > 1
// (channels-last); ties are still ranked by torch's logical index. within: words of the only
// positions allowed, or null for all.
struct Scores {
  const float* data;
  const uint32_t* within;
  uint32_t* words;
  Layout layout;
  bool canonical;
};

struct Selection {
  uint32_t threshold;  // fp32 bits of the smallest kept key after the transform
  bool nan;            // a NaN was seen: the masks mean nothing
};

// Two words of a mask and their bits that the first pass could not decide.
struct SelectUnit {
  uint32_t* words;
  uint64_t candidates;
};
struct SelectPart {  // one thread's share of a pass
  int64_t above, inside, units;
  bool nan, overflow;
  uint32_t* refused;
};
struct SelectScratch {
  int32_t* samples;   // 2 * kSelectSamples
  int32_t* keys;      // (room + kSelectSlack) * nthreads
  SelectUnit* units;  // one for every two words of the masks
  SelectPart* parts;  // nthreads
  int64_t* counts;    // kSelectBins * nthreads
  uint32_t* row;      // row_words * nthreads
  int64_t room, row_words;
};
constexpr int64_t kSelectSamples = 65536;
constexpr int64_t kSelectBins = 2048;
constexpr int64_t kSelectSlack = 96;  // keys written or read past the room

// What popup_step reads and writes beside a Scores: gradients, first and second moments in the
// scores' memory order. signs: the weights' signs, null if the gradients are those of the scores.
struct ScoreState {
  float* scores;
  const float* grads;
  float *momentum, *variance;
  const uint32_t* signs;
  float sigma;
};
struct ScoreRule {
  bool adam, nesterov;
  // Of SGD: lr, momentum, decay. Of AdamW: decay = 1 - lr * weight decay, lr = the bias-corrected
  // step, root = sqrt(1 - beta2^step).
  float lr, decay, momentum, beta1_rest, beta2, beta2_rest, eps, root;
};

// What masked_step reads and writes of one tensor, all in memory order; layout.taps is 1 where that
// is canonical order. momentum, variance, shadow (the masked weight in bfloat16): null for none.
struct MaskedTensor {
  float* weights;
  const float* grads;
  float *momentum, *variance;
  void* shadow;
  const uint32_t* words;
  Layout layout;
};

// What subset_sum reads and writes: base [rows, n] and target [rows, shared], of doubles or floats;
// the rest in the shape of target. one_eps: eps holds one number for all. lengths: elements of each
// row that count; null for all n. min_error or else the fewest elements, up to max_card; fallback:
// any number of them where so few are not enough.
struct SubsetSum {
  const void *base, *target;
  const double* eps;
  const int64_t* lengths;
  int64_t* mask;
  double *value, *error;
  int8_t* status;
  int64_t rows, n, shared;
  bool doubles, one_eps, min_error, fallback;
  int max_card;
};
struct Finite {  // whether all elements were; if not, the results mean nothing
  bool base, target;
};
constexpr int64_t kSubsetMaxN = 64;
constexpr int64_t kSubsetMinErrorN = 40;      // most elements for the least error
constexpr int64_t kSubsetExactFallback = 32;  // and for it where the dynamic programme found none
constexpr int64_t kSubsetDpWords = 128;       // its sums, as bits

constexpr int64_t kLookupRows = 4096;  // outputs summed at a time: 256 KiB for 16 batch rows

constexpr int64_t kMaskedLinearPanel = 32;
constexpr int64_t kMaskedLinearRows = 8;
constexpr int64_t kMaskedLinearColumns = 128;

struct Conv {
  int64_t batch, channels, height, width;  // input
  int64_t outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};
// A batch of [groups][samples][features], or, inner, of [groups][features][samples].
struct Batch {
  int64_t groups, samples;
  bool inner;
};
// How the direct convolution lays out and walks an image; from make_conv_plan.
struct ConvPlan {
  int64_t phases_h, phases_w, rows, columns;  // zero-padded planes of one channel, one per phase
  int64_t channel_floats;                     // all planes of a channel
  int64_t pixels, vectors;                    // of the flat output axis, pad columns included
  int64_t block_channels, blocks;
  bool in_place;  // the input's own planes serve
};
struct Column {
  int32_t offset, block, place;  // place: in a row of torch's contiguous weight
};
struct ConvScratch {
  float* planes;  // conv_image_floats a thread
  float* sums;    // conv_sums_floats a thread
};
struct TapScratch {
  Column* columns;   // conv_columns
  int32_t* starts;   // blocks * outputs + 1
  int32_t* offsets;  // one a live weight
  float* values;
};
struct GradScratch {
  float* planes;  // grad_planes_floats
  float* flat;    // 16 * vectors a thread
  float* sums;    // 16 * conv_columns a thread
};
// What goes with the machine code of a mask; conv_code.cpp.
struct CodeParts {
  Column* columns;   // conv_columns, while the code is made
  int32_t* ranks;    // outputs, likewise
  int64_t* entries;  // of every strip, in the code
  int32_t* values;   // of every strip, in the stream
  int32_t* order;    // places of the stream's values
};
constexpr int kStripOutputs = 28;  // accumulators; the other registers hold inputs
constexpr int kCodeBias = 128;     // values before the register that walks the stream
constexpr int kTapHeader = 2;      // height and width that a tensor of taps was made for
constexpr int kConvTile = 8;       // most vectors of pixels kept in registers

}  // namespace st

// X(return type, name, arguments)
#define ST_KERNELS(X)                                                                              \
  X(void, pack_mask,                                                                               \
    (const uint8_t* ST_RESTRICT mask, uint32_t* ST_RESTRICT words, Layout layout, int nthreads))   \
  X(void, unpack_mask,                                                                             \
    (const uint32_t* ST_RESTRICT words, uint8_t* ST_RESTRICT mask, Layout layout, int nthreads))   \
  X(void, mask_logical,                                                                            \
    (const uint32_t* ST_RESTRICT a, const uint32_t* ST_RESTRICT b, uint32_t* ST_RESTRICT out,      \
     int64_t n, Logical op, int nthreads))                                                         \
  X(int64_t, mask_count,                                                                           \
    (const uint32_t* ST_RESTRICT a, const uint32_t* ST_RESTRICT b, int64_t n, bool hamming,        \
     int nthreads))                                                                                \
  X(void, apply_mask,                                                                              \
    (const void* ST_RESTRICT dense, const uint32_t* ST_RESTRICT words, void* ST_RESTRICT out,      \
     int64_t item_bytes, Layout layout, int nthreads))                                             \
  X(void, sign_words,                                                                              \
    (uint32_t* ST_RESTRICT words, int64_t units, uint32_t key, uint32_t high, int nthreads))       \
  X(void, regenerate,                                                                              \
    (void* ST_RESTRICT out, Dtype dtype, const uint32_t* ST_RESTRICT words,                        \
     const float* ST_RESTRICT table, Layout layout, Dist dist, float scale, uint32_t key,          \
     uint32_t high, uint32_t* ST_RESTRICT signs, int nthreads))                                    \
  X(Selection, select_mask,                                                                        \
    (const Scores* ST_RESTRICT scores, int64_t count, int64_t eligible, int64_t kept, bool abs,    \
     uint32_t hint, SelectScratch scratch, int nthreads))                                          \
  X(Selection, popup_step,                                                                         \
    (const Scores* ST_RESTRICT scores, const ScoreState* ST_RESTRICT states, int64_t count,        \
     ScoreRule rule, int64_t kept, bool abs, uint32_t hint, SelectScratch scratch, int nthreads))  \
  X(void, masked_step,                                                                             \
    (const MaskedTensor* ST_RESTRICT tensors, int64_t count, ScoreRule rule, int nthreads))        \
  X(int64_t, rice_encode,                                                                          \
    (const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int parameter,                    \
     uint8_t* ST_RESTRICT payload, int64_t capacity))                                              \
  X(bool, rice_decode,                                                                             \
    (const uint8_t* ST_RESTRICT payload, int64_t bytes, uint32_t* ST_RESTRICT words, int64_t rows, \
     int64_t k, int64_t kept, int parameter))                                                      \
  X(void, masked_linear,                                                                           \
    (const void* ST_RESTRICT x, const void* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words, \
     const void* ST_RESTRICT bias, void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows,  \
     int64_t k, int nthreads))                                                                     \
  X(void, ticket_codes,                                                                            \
    (const uint32_t* ST_RESTRICT words, const uint32_t* ST_RESTRICT signs,                         \
     uint32_t* ST_RESTRICT codes, int64_t rows, int64_t k, bool transposed, uint32_t key,          \
     uint32_t high, int nthreads))                                                                 \
  X(void, masked_linear_live,                                                                      \
    (const void* ST_RESTRICT x, const void* ST_RESTRICT weight, const uint32_t* ST_RESTRICT words, \
     const void* ST_RESTRICT bias, void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows,  \
     int64_t k, bool transposed, float* ST_RESTRICT scratch, int nthreads))                        \
  X(void, ticket_linear,                                                                           \
    (const void* ST_RESTRICT x, const uint32_t* ST_RESTRICT words,                                 \
     const uint32_t* ST_RESTRICT signs, const void* ST_RESTRICT bias, void* ST_RESTRICT y,         \
     Dtype dtype, int64_t batch, int64_t rows, int64_t k, float sigma, uint32_t key,               \
     uint32_t high, float* ST_RESTRICT tables, int nthreads))                                      \
  X(void, lookup_linear,                                                                           \
    (const void* ST_RESTRICT x, const uint32_t* ST_RESTRICT codes, const void* ST_RESTRICT bias,   \
     void* ST_RESTRICT y, Dtype dtype, int64_t batch, int64_t rows, int64_t k, float sigma,        \
     float* ST_RESTRICT sums, int nthreads))                                                       \
  X(void, popup_linear_ds,                                                                         \
    (float* ST_RESTRICT grad, const float* ST_RESTRICT scores, int64_t rows, int64_t k, bool abs,  \
     float sigma, uint32_t key, uint32_t high, int nthreads))                                      \
  X(void, conv2d_taps,                                                                             \
    (const uint32_t* ST_RESTRICT words, Conv conv, ConvPlan plan, Column* ST_RESTRICT columns,     \
     int32_t* ST_RESTRICT taps, int64_t live))                                                     \
  X(void, sparse_conv2d,                                                                           \
    (const float* ST_RESTRICT x, const float* ST_RESTRICT values, const int32_t* ST_RESTRICT taps, \
     const float* ST_RESTRICT bias, float* ST_RESTRICT y, Conv conv, ConvPlan plan,                \
     ConvScratch scratch, float* ST_RESTRICT stream, int64_t live, int nthreads))                  \
  X(int64_t, conv_code,                                                                            \
    (const uint32_t* ST_RESTRICT words, Conv conv, ConvPlan plan, CodeParts parts,                 \
     uint8_t* ST_RESTRICT code))                                                                   \
  X(void, run_conv_code,                                                                           \
    (const float* ST_RESTRICT x, const float* ST_RESTRICT values, const float* ST_RESTRICT bias,   \
     float* ST_RESTRICT y, Conv conv, ConvPlan plan, ConvScratch scratch, CodeParts parts,         \
     const uint8_t* ST_RESTRICT code, float* ST_RESTRICT stream, int64_t live, int nthreads))      \
  X(void, sparse_conv2d_dw,                                                                        \
    (const float* ST_RESTRICT x, const float* ST_RESTRICT grad, const uint32_t* ST_RESTRICT words, \
     float* ST_RESTRICT out, Conv conv, ConvPlan plan, TapScratch taps, GradScratch scratch,       \
     int64_t live, int nthreads))                                                                  \
  X(void, sparse_pattern,                                                                          \
    (const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int64_t kept, bool transposed,    \
     uint32_t* ST_RESTRICT pattern, int32_t* ST_RESTRICT places))                                  \
  X(void, sparse_linear,                                                                           \
    (const uint32_t* ST_RESTRICT pattern, const void* ST_RESTRICT values,                          \
     const void* ST_RESTRICT x, const void* ST_RESTRICT bias, void* ST_RESTRICT y, Dtype dtype,    \
     Batch batch, float* ST_RESTRICT scratch, int nthreads))                                       \
  X(void, sparse_linear_dw,                                                                        \
    (const uint32_t* ST_RESTRICT pattern, const void* ST_RESTRICT grad, const void* ST_RESTRICT x, \
     void* ST_RESTRICT out, Dtype dtype, Batch batch, float* ST_RESTRICT scratch, int nthreads))   \
  X(void, live_starts,                                                                             \
    (const uint32_t* ST_RESTRICT words, int64_t rows, int64_t k, int64_t* ST_RESTRICT starts))     \
  X(void, gather_live,                                                                             \
    (const void* ST_RESTRICT dense, const uint32_t* ST_RESTRICT words, void* ST_RESTRICT values,   \
     const int64_t* ST_RESTRICT starts, int64_t item_bytes, Layout layout, int nthreads))          \
  X(void, scatter_live,                                                                            \
    (const void* ST_RESTRICT values, const uint32_t* ST_RESTRICT words, void* ST_RESTRICT dense,   \
     const int64_t* ST_RESTRICT starts, int64_t item_bytes, Layout layout, int nthreads))          \
  X(void, masked_conv2d,                                                                           \
    (const float* ST_RESTRICT x, const float* ST_RESTRICT weight,                                  \
     const uint32_t* ST_RESTRICT words, const float* ST_RESTRICT bias, float* ST_RESTRICT y,       \
     Conv conv, ConvPlan plan, ConvScratch scratch, TapScratch taps, int nthreads))                \
  X(void, ticket_conv2d,                                                                           \
    (const float* ST_RESTRICT x, const uint32_t* ST_RESTRICT words,                                \
     const uint32_t* ST_RESTRICT signs, const float* ST_RESTRICT bias, float* ST_RESTRICT y,       \
     Conv conv, float sigma, uint32_t key, uint32_t high, ConvPlan plan, ConvScratch scratch,      \
     TapScratch taps, int nthreads))                                                               \
  X(Finite, subset_sum, (SubsetSum problem, int64_t* ST_RESTRICT scratch, int nthreads))

namespace st {

struct Kernels {
#define ST_POINTER(ret, name, args) ret(*name) args;
  ST_KERNELS(ST_POINTER)
#undef ST_POINTER
};

#ifdef ST_ISA
namespace ST_ISA {
#define ST_DECLARE(ret, name, args) ret name args;
ST_KERNELS(ST_DECLARE)
#undef ST_DECLARE
}  // namespace ST_ISA
#endif

namespace base {
const Kernels& table();
}
#ifdef ST_X86
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
#endif

namespace {
// Floats of the panels that hold [batch, k] activations for masked_linear_live, and of all its
// scratch: those of x [batch, rows or k] and the sums of each thread.
inline int64_t masked_linear_panel_floats(int64_t batch, int64_t k) {
  return (batch + kMaskedLinearPanel - 1) / kMaskedLinearPanel * kMaskedLinearPanel * k;
}
inline int64_t masked_linear_floats(int64_t batch, int64_t width, bool transposed, int nthreads) {
  const int64_t sums = transposed ? kMaskedLinearColumns : kMaskedLinearRows;
  return masked_linear_panel_floats(batch, width + nthreads * sums);
}
// uint32 words of `signs` that regenerate needs for each thread.
inline int64_t regenerate_sign_words(const Layout& layout) {
  return row_words(layout) > 1024 ? row_words(layout) : 1024;
}
inline int64_t conv_columns(const Conv& c) {
  return c.channels / c.groups * c.kernel_h * c.kernel_w;
}
inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// `live`: weights in all. A block's windows of kConvTile vectors take about three quarters of an L1
// cache, but segments of fewer than kSegment taps do not pay for their sums' way to memory.
inline ConvPlan make_conv_plan(const Conv& c, int64_t live) {
  constexpr int64_t kWindowFloats = 6144, kSegment = 16;
  ConvPlan p{};
  p.phases_h = c.stride_h / common_divisor(c.stride_h, c.dilation_h);
  p.phases_w = c.stride_w / common_divisor(c.stride_w, c.dilation_w);
  if (p.phases_h > c.kernel_h) p.phases_h = c.kernel_h;
  if (p.phases_w > c.kernel_w) p.phases_w = c.kernel_w;
  p.rows = c.out_height + (c.kernel_h - 1) * c.dilation_h / c.stride_h;
  p.columns = c.out_width + (c.kernel_w - 1) * c.dilation_w / c.stride_w;
  p.channel_floats = p.phases_h * p.phases_w * p.rows * p.columns;
  p.pixels = c.out_height && c.out_width ? (c.out_height - 1) * p.columns + c.out_width : 0;
  p.vectors = (p.pixels + 15) / 16;
  p.in_place = c.kernel_h == 1 && c.kernel_w == 1 && c.stride_h == 1 && c.stride_w == 1 &&
               c.pad_h == 0 && c.pad_w == 0 && (p.pixels % 16 == 0 || p.vectors > kConvTile);
  const int64_t channels = c.channels / c.groups;
  int64_t window = 16 * kConvTile + (c.kernel_h - 1) * c.dilation_h / c.stride_h * p.columns;
  if (window > p.rows * p.columns) window = p.rows * p.columns;
  p.block_channels = kWindowFloats / (p.phases_h * p.phases_w * window + 1) + 1;
  const int64_t enough = kSegment * c.outputs * channels / (live + 1) + 1;
  if (p.block_channels < enough) p.block_channels = enough;
  if (p.block_channels > channels) p.block_channels = channels;
  p.blocks = (channels + p.block_channels - 1) / p.block_channels;
  return p;
}

// Vectors read past the last pixel of the last channel.
inline int64_t conv_image_floats(const Conv& c, const ConvPlan& p) {
  return p.in_place ? 0 : c.channels * p.channel_floats + 16 * kConvTile;
}
// Images whose planes fit half of an L2 cache together: a live weight's products are summed over
// them before they are reduced.
inline int64_t grad_images(const Conv& c, const ConvPlan& p) {
  const int64_t fit = (1 << 17) / (c.channels * p.channel_floats + 1);
  return fit < 1 ? 1 : fit > c.batch ? c.batch : fit;
}
inline int64_t grad_planes_floats(const Conv& c, const ConvPlan& p) {
  return grad_images(c, p) * c.channels * p.channel_floats + 16;
}
inline int64_t conv_sums_floats(const Conv& c) { return c.outputs * 16 * kConvTile; }
inline int64_t conv_strips(const Conv& c) {
  return c.groups * ((c.outputs / c.groups + kStripOutputs - 1) / kStripOutputs);
}
// Sorted sums of half of n elements, and one that ends them.
inline int64_t subset_half_keys(int64_t n) { return (int64_t{1} << (n + 1) / 2) + 1; }
// int64 of scratch that subset_sum needs for each thread.
inline int64_t subset_scratch(int64_t n, bool min_error, bool fallback) {
  if (!min_error && !fallback) return 0;
  const int64_t most = min_error || n < kSubsetExactFallback ? n : kSubsetExactFallback;
  const int64_t halves = 3 * subset_half_keys(most), levels = (n + 1) * kSubsetDpWords;
  return min_error || halves > levels ? halves : levels;
}
// Floats of `tables` that ticket_linear needs: at most 128 a word of a row, whole blocks of words.
inline int64_t ticket_tables_floats(int64_t k) { return (row_words(k) + 15) / 16 * 16 * 128; }
// Floats of `sums` that lookup_linear needs.
inline int64_t lookup_sums_floats(int nthreads) { return nthreads * 16 * kLookupRows; }
}  // namespace

}  // namespace st
