// Drives every kernel of one ISA level over random shapes, in heap blocks of the exact size, and
// holds the results against naive loops; tests/test_sanitize.py builds it with AddressSanitizer and
// UBSan. Each kernel has its drive_NAME: the list at the end is made from ST_KERNELS, so that a
// kernel without one does not compile. argv[1]: cases a kernel.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core.h"
#include "philox.h"
#include "simd.h"

namespace {

using namespace st;

const Kernels& kernels = ST_ISA::table();

struct Random {  // SplitMix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  float value() { return static_cast<float>(below(2001) - 1000) / 1000; }
  int64_t size() {  // small and odd, often 0
    const int64_t limits[] = {2, 4, 18, 70, 150};
    return below(limits[below(5)]);
  }
};

struct Case {
  const char* kernel;
  int number, threads;
  Random random;
};

void check(bool holds, const Case& c, int line, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s, case %d: line %d: %s\n", c.kernel, c.number, line, what);
  std::exit(1);
}
#define CHECK(that) check(that, c, __LINE__, #that)

// Exactly n elements up to the end of a heap block, off the grid of vectors, first all bits 1: NaN.
template <typename T>
struct Buffer {
  int64_t n, shift;
  T* block;
  Buffer(Random& random, int64_t n) : n(n), shift(random.below(4)) {
    const size_t bytes = static_cast<size_t>(n + shift) * sizeof(T);
    block = static_cast<T*>(std::malloc(bytes));
    std::memset(block, 0xFF, bytes);
  }
  Buffer(Buffer&& other) : n(other.n), shift(other.shift), block(other.block) {
    other.block = nullptr;
  }
  ~Buffer() { std::free(block); }
  T* data() const { return block + shift; }
  T& operator[](int64_t i) const { return data()[i]; }
  void zero() const { std::memset(data(), 0, static_cast<size_t>(n) * sizeof(T)); }
};

template <typename T>
Buffer<T> values(Random& random, int64_t n) {
  Buffer<T> out(random, n);
  for (int64_t i = 0; i < n; ++i) store_float(random.value(), &out[i]);
  return out;
}

Buffer<uint8_t> bytes(Random& random, int64_t n) {
  Buffer<uint8_t> out(random, n);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(random.next());
  return out;
}

Buffer<uint8_t> bools(Random& random, int64_t n) {
  const int64_t kind = random.below(4);  // density 0, 1, or something between
  const int64_t of_100 = kind == 0 ? 0 : kind == 1 ? 100 : random.below(100);
  Buffer<uint8_t> out(random, n);
  for (int64_t i = 0; i < n; ++i) out[i] = random.below(100) < of_100;
  return out;
}

// Rows that fill several chunks of a kernel, enough rows for several threads, or anything small.
Layout layout_of(Random& random) {
  const int64_t kind = random.below(6);
  if (kind == 0) return {random.below(4), 1000 + random.below(9000), 1};
  if (kind == 1) return {200 + random.below(200), 100 + random.below(100), 1};
  if (kind == 2) return {random.size(), random.size(), 1};
  return {random.size(), random.below(70), 2 + random.below(30)};
}

int64_t numel(const Layout& l) { return l.rows * columns_of(l); }
int64_t words_of(const Layout& l) { return l.rows * row_words(l); }

// Where canonical column k lies in a row of the dense tensor.
int64_t dense_column(const Layout& l, int64_t k) {
  return k % l.channels * l.taps + k / l.channels;
}

bool bit(const Buffer<uint32_t>& words, const Layout& l, int64_t row, int64_t k) {
  return words[row * row_words(l) + k / 32] >> (k % 32) & 1;
}

// padding: bits past the columns, which kernels must not heed.
Buffer<uint32_t> mask_words(Random& random, const Layout& l, bool padding) {
  const Buffer<uint8_t> kept = bools(random, words_of(l) * 32);
  Buffer<uint32_t> out(random, words_of(l));
  out.zero();
  for (int64_t i = 0; i < 32 * out.n; ++i) out[i / 32] |= uint32_t{kept[i]} << (i % 32);
  if (!padding)
    for (int64_t i = 0; i < out.n; ++i) out[i] &= weight_bits(columns_of(l), i % row_words(l));
  return out;
}

int64_t count(const Buffer<uint32_t>& words) {
  int64_t out = 0;
  for (int64_t i = 0; i < words.n; ++i) out += __builtin_popcount(words[i]);
  return out;
}

// ------------------------------------------------------------------ masks
void drive_pack_mask(Case& c) {
  const Layout l = layout_of(c.random);
  const Buffer<uint8_t> mask = bools(c.random, numel(l));
  for (int64_t i = 0; i < mask.n; ++i) mask[i] *= 1 + c.random.below(255);  // any byte is true
  const Buffer<uint32_t> words(c.random, words_of(l));
  kernels.pack_mask(mask.data(), words.data(), l, c.threads);
  int64_t ones = 0;
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < columns_of(l); ++k) {
      const bool kept = mask[row * columns_of(l) + dense_column(l, k)] != 0;
      CHECK(bit(words, l, row, k) == kept);
      ones += kept;
    }
  CHECK(count(words) == ones);
}

void drive_unpack_mask(Case& c) {
  const Layout l = layout_of(c.random);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<uint8_t> mask(c.random, numel(l));
  kernels.unpack_mask(words.data(), mask.data(), l, c.threads);
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < columns_of(l); ++k)
      CHECK(mask[row * columns_of(l) + dense_column(l, k)] == bit(words, l, row, k));
}

void drive_mask_logical(Case& c) {
  const Layout l = layout_of(c.random);
  const Buffer<uint32_t> a = mask_words(c.random, l, true), b = mask_words(c.random, l, true);
  const Buffer<uint32_t> out(c.random, a.n);
  const int op = static_cast<int>(c.random.below(4));
  kernels.mask_logical(a.data(), b.data(), out.data(), a.n, static_cast<Logical>(op), c.threads);
  for (int64_t i = 0; i < a.n; ++i) {
    const uint32_t expected[] = {a[i] & b[i], a[i] | b[i], a[i] ^ b[i], a[i] & ~b[i]};
    CHECK(out[i] == expected[op]);
  }
}

void drive_mask_count(Case& c) {
  const Layout l = layout_of(c.random);
  const Buffer<uint32_t> a = mask_words(c.random, l, true), b = mask_words(c.random, l, true);
  CHECK(kernels.mask_count(a.data(), b.data(), a.n, false, c.threads) == count(a));
  const int64_t distance = kernels.mask_count(a.data(), b.data(), a.n, true, c.threads);
  for (int64_t i = 0; i < a.n; ++i) a[i] ^= b[i];
  CHECK(distance == count(a));
}

template <typename T>
void apply_mask(Case& c) {
  const Layout l = layout_of(c.random);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<T> dense(c.random, numel(l)), out(c.random, numel(l));
  for (int64_t i = 0; i < dense.n; ++i) dense[i] = static_cast<T>(c.random.next());
  kernels.apply_mask(dense.data(), words.data(), out.data(), sizeof(T), l, c.threads);
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < columns_of(l); ++k) {
      const int64_t at = row * columns_of(l) + dense_column(l, k);
      CHECK(out[at] == (bit(words, l, row, k) ? dense[at] : 0));
    }
}

void drive_apply_mask(Case& c) {
  const int64_t kind = c.random.below(3);
  kind == 0   ? apply_mask<uint16_t>(c)
  : kind == 1 ? apply_mask<uint32_t>(c)
              : apply_mask<uint64_t>(c);
}

void drive_rice_encode(Case& c) {
  Layout l = layout_of(c.random);
  l.taps = 1;
  const Buffer<uint32_t> words = mask_words(c.random, l, true), back(c.random, words.n);
  const int parameter = static_cast<int>(c.random.below(31));
  const auto encode = [&](uint8_t* to) {
    return kernels.rice_encode(words.data(), l.rows, l.channels, parameter, to);
  };
  const Buffer<uint8_t> payload(c.random, (encode(nullptr) + 7) / 8);
  payload.zero();
  CHECK((encode(payload.data()) + 7) / 8 == payload.n);
  back.zero();
  for (int64_t i = 0; i < words.n; ++i) words[i] &= weight_bits(l.channels, i % row_words(l));
  CHECK(kernels.rice_decode(payload.data(), payload.n, back.data(), l.rows, l.channels,
                            count(words), parameter));
  for (int64_t i = 0; i < words.n; ++i) CHECK(back[i] == words[i]);
}

void drive_rice_decode(Case& c) {  // payloads that nobody encoded
  Layout l = layout_of(c.random);
  l.taps = 1;
  const Buffer<uint8_t> payload = bytes(c.random, c.random.size());
  if (c.random.one_in(4)) std::memset(payload.data(), 0xFF, static_cast<size_t>(payload.n));
  const Buffer<uint32_t> words(c.random, words_of(l));
  words.zero();
  const int64_t kept = c.random.below(4 * payload.n + 2);
  const int parameter = static_cast<int>(c.random.below(c.random.one_in(2) ? 31 : 4));
  if (kernels.rice_decode(payload.data(), payload.n, words.data(), l.rows, l.channels, kept,
                          parameter))
    CHECK(count(words) == kept);
}

// ------------------------------------------------------------------ generated weights
struct Key {
  uint32_t low, high;
};
Key key_of(Random& random) {
  return {static_cast<uint32_t>(random.next()), static_cast<uint32_t>(random.next())};
}

// The sign words that the generator's scalar form makes.
Buffer<uint32_t> made_signs(Random& random, int64_t n, Key key) {
  Buffer<uint32_t> out(random, n);
  for (int64_t unit = 0; unit < n / 2; ++unit)
    philox_one<true>(static_cast<uint64_t>(unit), key.low, key.high, &out[2 * unit]);
  return out;
}

void drive_sign_words(Case& c) {
  const Layout l = layout_of(c.random);
  const Key key = key_of(c.random);
  const Buffer<uint32_t> words(c.random, words_of(l));
  kernels.sign_words(words.data(), words.n / 2, key.low, key.high, c.threads);
  const Buffer<uint32_t> expected = made_signs(c.random, words.n, key);
  for (int64_t i = 0; i < words.n; ++i) CHECK(words[i] == expected[i]);
}

template <typename T>
void regenerate(Case& c, Dtype dtype) {
  const Layout l = layout_of(c.random);
  const Key key = key_of(c.random);
  const Dist dist = static_cast<Dist>(c.random.below(3));
  const bool masked = c.random.one_in(2);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<uint32_t> signs = made_signs(c.random, words.n, key);
  const Buffer<float> table = values<float>(c.random, 65536);
  const Buffer<T> out(c.random, numel(l));
  kernels.regenerate(out.data(), dtype, masked ? words.data() : nullptr,
                     dist == Dist::normal ? table.data() : nullptr, l, dist, 0.5f, key.low,
                     key.high, c.threads);
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < columns_of(l); ++k) {
      const float made = to_float(out[row * columns_of(l) + dense_column(l, k)]);
      const float constant = bit(signs, l, row, k) ? -0.5f : 0.5f;
      if (masked && !bit(words, l, row, k))
        CHECK(made == 0);
      else if (dist == Dist::signed_constant)
        CHECK(made == constant);
      else
        CHECK(made >= -0.5f && made <= 0.5f);
    }
}

void drive_regenerate(Case& c) {
  c.random.one_in(2) ? regenerate<float>(c, Dtype::f32) : regenerate<bf16>(c, Dtype::bf16);
}

// ------------------------------------------------------------------ select_mask
struct ScoreTensor {
  Layout layout;
  bool canonical;
  Buffer<float> scores;
  Buffer<uint32_t> within, words;
  Buffer<uint8_t> eligible;

  int64_t memory_column(int64_t k) const { return canonical ? k : dense_column(layout, k); }
};

ScoreTensor score_tensor(Random& random) {
  const Layout l = layout_of(random);
  ScoreTensor t{l,
                random.one_in(2),
                values<float>(random, numel(l)),
                mask_words(random, l, false),
                Buffer<uint32_t>(random, words_of(l)),
                Buffer<uint8_t>(random, numel(l))};
  if (random.one_in(3))  // ties, and both zeros
    for (int64_t i = 0; i < t.scores.n; ++i) t.scores[i] = std::round(2 * t.scores[i]);
  if (random.one_in(4) && t.scores.n) t.scores[random.below(t.scores.n)] = INFINITY;
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < columns_of(l); ++k)
      t.eligible[row * columns_of(l) + t.memory_column(k)] = bit(t.within, l, row, k);
  return t;
}

void drive_select_mask(Case& c) {
  std::vector<ScoreTensor> tensors;
  for (int64_t i = 1 + c.random.below(3); i > 0; --i) tensors.push_back(score_tensor(c.random));
  const bool within = c.random.one_in(2), abs = c.random.one_in(2);
  std::vector<Scores> scores;
  int64_t candidates = 0;
  for (const ScoreTensor& t : tensors) {
    scores.push_back({t.scores.data(), within ? t.eligible.data() : nullptr,
                      within ? t.within.data() : nullptr, t.words.data(), t.layout, t.canonical});
    candidates += within ? count(t.within) : numel(t.layout);
  }
  const int64_t kept = c.random.one_in(4) ? candidates : c.random.below(candidates + 1);
  // A bracket's keys may not fit: the kernel must then do without.
  const int64_t capacity = c.random.one_in(3) ? c.random.below(3000) : 100000 * c.threads;
  const Buffer<uint32_t> samples(c.random, kSelectSamples), room(c.random, capacity);
  const Buffer<int64_t> counts(c.random, kSelectBins * c.threads);
  const uint32_t hint = c.random.one_in(2) ? static_cast<uint32_t>(c.random.next()) : 0;
  const Selection made =
      kernels.select_mask(scores.data(), static_cast<int64_t>(scores.size()), candidates, kept, abs,
                          hint, {samples.data(), room.data(), capacity, counts.data()}, c.threads);
  CHECK(!made.nan);
  int64_t ones = 0;
  float least, most = -INFINITY;  // kept, dropped
  std::memcpy(&least, &made.threshold, 4);
  bool tie_dropped = false;
  for (const ScoreTensor& t : tensors) {
    ones += count(t.words);
    for (int64_t row = 0; row < t.layout.rows; ++row)
      for (int64_t at = 0; at < columns_of(t.layout); ++at) {  // torch's logical order
        const int64_t k = at % t.layout.taps * t.layout.channels + at / t.layout.taps;
        const float raw = t.scores[row * columns_of(t.layout) + t.memory_column(k)];
        const float score = abs ? std::fabs(raw) : raw;
        const bool allowed = !within || bit(t.within, t.layout, row, k);
        if (bit(t.words, t.layout, row, k)) {
          CHECK(allowed && score >= least && !(score == least && tie_dropped));
        } else if (allowed) {
          most = std::fmax(most, score);
          tie_dropped |= score == least;
        }
      }
  }
  CHECK(ones == kept && (kept == 0 || most <= least));
}

// ------------------------------------------------------------------ linear and convolution
template <typename T>
bool near(T got, double expected, double bound) {
  const double eps = sizeof(T) == 2 ? 0x1p-8 : 0x1p-20;
  return std::fabs(to_float(got) - expected) <= eps * bound;
}

// run(x, bias or null, y); weight(row, k) is what must have been multiplied.
template <typename T, typename Run, typename Weight>
void check_linear(Case& c, const Layout& l, const Run& run, const Weight& weight) {
  const int64_t batch = c.random.below(9), k_end = columns_of(l);
  const Buffer<T> x = values<T>(c.random, batch * k_end), bias = values<T>(c.random, l.rows);
  const Buffer<T> y(c.random, batch * l.rows);
  const bool biased = c.random.one_in(2);
  run(x.data(), biased ? bias.data() : nullptr, y.data(), batch);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t row = 0; row < l.rows; ++row) {
      double sum = biased ? to_float(bias[row]) : 0, bound = std::fabs(sum);
      for (int64_t k = 0; k < k_end; ++k) {
        const double product = static_cast<double>(to_float(x[b * k_end + k])) * weight(row, k);
        sum += product;
        bound += std::fabs(product);
      }
      CHECK(near(y[b * l.rows + row], sum, bound));
    }
}

Layout linear_of(Random& random) {
  Layout l = layout_of(random);
  l.taps = 1;
  return l;
}

template <typename T>
void masked_linear(Case& c, Dtype dtype) {
  const Layout l = linear_of(c.random);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<T> weight = values<T>(c.random, numel(l));
  check_linear<T>(
      c, l,
      [&](const T* x, const T* bias, T* y, int64_t batch) {
        kernels.masked_linear(x, weight.data(), words.data(), bias, y, dtype, batch, l.rows,
                              l.channels, c.threads);
      },
      [&](int64_t row, int64_t k) {
        return bit(words, l, row, k) ? to_float(weight[row * l.channels + k]) : 0.0f;
      });
}

void drive_masked_linear(Case& c) {
  c.random.one_in(2) ? masked_linear<float>(c, Dtype::f32) : masked_linear<bf16>(c, Dtype::bf16);
}

// The weight of a ticket; its sign plane is given or left to the kernel.
struct Ticket {
  Layout layout;
  Key key;
  bool plane;
  Buffer<uint32_t> words, made;

  Ticket(Random& random, const Layout& l)
      : layout(l),
        key(key_of(random)),
        plane(random.one_in(2)),
        words(mask_words(random, l, true)),
        made(made_signs(random, words_of(l), key)) {}
  const uint32_t* signs() const { return plane ? made.data() : nullptr; }
  float weight(int64_t row, int64_t k) const {
    return !bit(words, layout, row, k) ? 0.0f : bit(made, layout, row, k) ? -0.25f : 0.25f;
  }
};

template <typename T>
void ticket_linear(Case& c, Dtype dtype) {
  const Layout l = linear_of(c.random);
  const Ticket ticket(c.random, l);
  check_linear<T>(
      c, l,
      [&](const T* x, const T* bias, T* y, int64_t batch) {
        kernels.ticket_linear(x, ticket.words.data(), ticket.signs(), bias, y, dtype, batch, l.rows,
                              l.channels, 0.25f, ticket.key.low, ticket.key.high, c.threads);
      },
      [&](int64_t row, int64_t k) { return ticket.weight(row, k); });
}

void drive_ticket_linear(Case& c) {
  c.random.one_in(2) ? ticket_linear<float>(c, Dtype::f32) : ticket_linear<bf16>(c, Dtype::bf16);
}

Conv conv_of(Random& random) {
  Conv v{};
  const auto axis = [&](int64_t& in, int64_t& out, int64_t& kernel, int64_t& stride, int64_t& pad,
                        int64_t& dilation) {
    kernel = 1 + random.below(4), dilation = 1 + random.below(3), stride = 1 + random.below(4);
    pad = random.below(4);
    const int64_t reach = dilation * (kernel - 1) + 1;
    in = 1 + random.below(random.one_in(3) ? 70 : 9);
    if (in + 2 * pad < reach) in = reach;
    out = (in + 2 * pad - reach) / stride + 1;
  };
  axis(v.height, v.out_height, v.kernel_h, v.stride_h, v.pad_h, v.dilation_h);
  axis(v.width, v.out_width, v.kernel_w, v.stride_w, v.pad_w, v.dilation_w);
  v.batch = random.below(3), v.groups = 1 + random.below(3);
  v.channels = v.groups * (1 + random.below(random.one_in(6) ? 40 : 4));
  v.outputs = v.groups * (1 + random.below(4));
  return v;
}

Layout layout_of(const Conv& v) {
  return {v.outputs, v.channels / v.groups, v.kernel_h * v.kernel_w};
}

// One output pixel, and the sum of its products' sizes.
template <typename Weight>
double conv_pixel(const Conv& v, const float* x, int64_t o, int64_t h, int64_t w,
                  const Weight& weight, double* bound) {
  const Layout l = layout_of(v);
  const int64_t first = o / (v.outputs / v.groups) * l.channels;
  double sum = 0;
  for (int64_t k = 0; k < columns_of(l); ++k) {
    const int64_t tap = k / l.channels, channel = first + k % l.channels;
    const int64_t y = h * v.stride_h - v.pad_h + tap / v.kernel_w * v.dilation_h;
    const int64_t z = w * v.stride_w - v.pad_w + tap % v.kernel_w * v.dilation_w;
    if (y < 0 || y >= v.height || z < 0 || z >= v.width) continue;
    const double product = double{x[(channel * v.height + y) * v.width + z]} * weight(o, k);
    sum += product;
    *bound += std::fabs(product);
  }
  return sum;
}

// run(x, bias or null, y, scratch...): as check_linear.
template <typename Run, typename Weight>
void check_conv2d(Case& c, const Conv& v, const Run& run, const Weight& weight) {
  const int64_t image = v.channels * v.height * v.width, plane = v.out_height * v.out_width;
  const Buffer<float> x = values<float>(c.random, v.batch * image);
  const Buffer<float> bias = values<float>(c.random, v.outputs);
  const Buffer<float> y(c.random, v.batch * v.outputs * plane);
  const Buffer<float> planes(c.random, conv_planes_floats(v));
  const Buffer<Tap> taps(c.random, columns_of(layout_of(v)) * c.threads);
  const bool biased = c.random.one_in(2);
  run(x.data(), biased ? bias.data() : nullptr, y.data(), planes.data(), taps.data());
  for (int64_t i = 0; i < y.n; ++i) {
    const int64_t n = i / plane / v.outputs, o = i / plane % v.outputs, at = i % plane;
    const double shift = biased ? bias[o] : 0.0f;
    double bound = std::fabs(shift);
    const double sum =
        conv_pixel(v, x.data() + n * image, o, at / v.out_width, at % v.out_width, weight, &bound);
    CHECK(near(y[i], shift + sum, bound));
  }
}

void drive_masked_conv2d(Case& c) {
  const Conv v = conv_of(c.random);
  const Layout l = layout_of(v);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<float> weight = values<float>(c.random, numel(l));
  check_conv2d(
      c, v,
      [&](const float* x, const float* bias, float* y, float* planes, Tap* taps) {
        kernels.masked_conv2d(x, weight.data(), words.data(), bias, y, v, planes, taps, c.threads);
      },
      [&](int64_t o, int64_t k) {
        return bit(words, l, o, k) ? weight[o * columns_of(l) + dense_column(l, k)] : 0.0f;
      });
}

void drive_ticket_conv2d(Case& c) {
  const Conv v = conv_of(c.random);
  const Ticket ticket(c.random, layout_of(v));
  check_conv2d(
      c, v,
      [&](const float* x, const float* bias, float* y, float* planes, Tap* taps) {
        kernels.ticket_conv2d(x, ticket.words.data(), ticket.signs(), bias, y, v, 0.25f,
                              ticket.key.low, ticket.key.high, planes, taps, c.threads);
      },
      [&](int64_t o, int64_t k) { return ticket.weight(o, k); });
}

// ------------------------------------------------------------------ the list
struct Driver {
  const char* kernel;
  void (*run)(Case&);
};
const Driver drivers[] = {
#define ST_DRIVER(ret, name, args) {#name, drive_##name},
    ST_KERNELS(ST_DRIVER)
#undef ST_DRIVER
};

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  int64_t driven = 0;
  for (const Driver& driver : drivers) {
    ++driven;
    for (int i = 0; i < cases; ++i) {
      Case c{driver.kernel, i, 1 + i % 3, {static_cast<uint64_t>(driven << 32 | i)}};
      driver.run(c);
    }
  }
  std::printf("%lld kernels, %d cases each\n", static_cast<long long>(driven), cases);
}
