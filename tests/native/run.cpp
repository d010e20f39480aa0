// Drives every kernel of one ISA level over random shapes, in heap blocks of the exact size, and
// holds the results against naive loops; tests/test_sanitize.py builds it with AddressSanitizer and
// UBSan. Each kernel has its drive_NAME: the list at the end is made from ST_KERNELS, so that a
// kernel without one does not compile. argv[1]: cases a kernel.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <sys/mman.h>
#endif

#include "core.h"
#include "philox.h"
#include "simd.h"
#include "sparse_pattern.h"

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
  const auto encode = [&](uint8_t* to, int64_t capacity) {
    return kernels.rice_encode(words.data(), l.rows, l.channels, parameter, to, capacity);
  };
  const int64_t bits = encode(nullptr, 0);
  const int64_t room = (bits + 7) / 8 + 8;  // the writer's last eight bytes
  const Buffer<uint8_t> payload(c.random, room), shorter(c.random, (bits + 7) / 8 / 2);
  payload.zero();
  shorter.zero();
  CHECK(encode(payload.data(), payload.n) == bits);
  CHECK(bits == 0 || encode(shorter.data(), shorter.n) < 0);
  back.zero();
  for (int64_t i = 0; i < words.n; ++i) words[i] &= weight_bits(l.channels, i % row_words(l));
  CHECK(kernels.rice_decode(payload.data(), (bits + 7) / 8, back.data(), l.rows, l.channels,
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
  const Buffer<uint32_t> scratch(c.random, regenerate_sign_words(l) * c.threads);
  kernels.regenerate(out.data(), dtype, masked ? words.data() : nullptr,
                     dist == Dist::normal ? table.data() : nullptr, l, dist, 0.5f, key.low,
                     key.high, scratch.data(), c.threads);
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

  int64_t at(int64_t row, int64_t k) const {
    return row * columns_of(layout) + (canonical ? k : dense_column(layout, k));
  }
};

std::vector<ScoreTensor> score_tensors(Random& random) {
  std::vector<ScoreTensor> out;
  for (int64_t i = 1 + random.below(3); i > 0; --i) {
    const Layout l = layout_of(random);
    out.push_back({l, random.one_in(2), values<float>(random, numel(l)),
                   mask_words(random, l, false), Buffer<uint32_t>(random, words_of(l))});
    const Buffer<float>& scores = out.back().scores;
    if (random.one_in(3))  // ties, and both zeros
      for (int64_t j = 0; j < scores.n; ++j) scores[j] = std::round(2 * scores[j]);
    if (random.one_in(4) && scores.n) scores[random.below(scores.n)] = INFINITY;
  }
  return out;
}

// What csrc/bind/select_scratch.h makes; sometimes with less room for keys.
struct SelectRoom {
  Buffer<int32_t> samples, keys;
  Buffer<SelectUnit> units;
  Buffer<SelectPart> parts;
  Buffer<int64_t> counts;
  Buffer<uint32_t> row;
  SelectScratch scratch;

  SelectRoom(Case& c, int64_t units_in_all, int64_t longest, int64_t room)
      : samples(c.random, 2 * kSelectSamples),
        keys(c.random, (room + kSelectSlack) * c.threads),
        units(c.random, units_in_all),
        parts(c.random, c.threads),
        counts(c.random, kSelectBins * c.threads),
        row(c.random, longest * c.threads),
        scratch{samples.data(), keys.data(), units.data(), parts.data(),
                counts.data(),  row.data(),  room,         longest} {}
};

SelectRoom select_room(Case& c, const std::vector<ScoreTensor>& tensors) {
  int64_t units = 0, longest = 0;
  for (const ScoreTensor& t : tensors) {
    units += t.words.n / 2;
    if (t.layout.taps > 1 && row_words(t.layout) > longest) longest = row_words(t.layout);
  }
  const int64_t share = (units / c.threads + 1) * 64;
  return {c, units, longest, c.random.one_in(3) ? 64 + c.random.below(share) : share};
}

std::vector<Scores> scores_of(const std::vector<ScoreTensor>& tensors, bool within) {
  std::vector<Scores> out;
  for (const ScoreTensor& t : tensors)
    out.push_back({t.scores.data(), within ? t.within.data() : nullptr, t.words.data(), t.layout,
                   t.canonical});
  return out;
}

void check_selection(Case& c, const std::vector<ScoreTensor>& tensors, bool within, bool abs,
                     int64_t kept, Selection made) {
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
        const float raw = t.scores[t.at(row, k)], score = abs ? std::fabs(raw) : raw;
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

void drive_select_mask(Case& c) {
  const std::vector<ScoreTensor> tensors = score_tensors(c.random);
  const bool within = c.random.one_in(2), abs = c.random.one_in(2);
  const std::vector<Scores> scores = scores_of(tensors, within);
  int64_t candidates = 0;
  for (const ScoreTensor& t : tensors) candidates += within ? count(t.within) : numel(t.layout);
  const int64_t kept = c.random.one_in(4) ? candidates : c.random.below(candidates + 1);
  const uint32_t hint = c.random.one_in(2) ? static_cast<uint32_t>(c.random.next()) : 0;
  const SelectRoom room = select_room(c, tensors);
  const Selection made = kernels.select_mask(scores.data(), static_cast<int64_t>(scores.size()),
                                             candidates, kept, abs, hint, room.scratch, c.threads);
  check_selection(c, tensors, within, abs, kept, made);
}

void drive_popup_step(Case& c) {
  const std::vector<ScoreTensor> tensors = score_tensors(c.random);
  const bool abs = c.random.one_in(2), adam = c.random.one_in(2), seeded = c.random.one_in(2);
  const ScoreRule rule{adam, c.random.one_in(2), 0.1f, 0.01f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-8f, 1};
  std::vector<Buffer<float>> grads, momenta, variances, before;
  std::vector<Buffer<uint32_t>> signs;
  std::vector<ScoreState> states;
  int64_t candidates = 0;
  for (const ScoreTensor& t : tensors) {
    for (int64_t i = 0; i < t.scores.n; ++i)
      if (!std::isfinite(t.scores[i])) t.scores[i] = 0;
    candidates += t.scores.n;
    before.emplace_back(c.random, t.scores.n);
    std::memcpy(before.back().data(), t.scores.data(), 4 * static_cast<size_t>(t.scores.n));
    grads.push_back(values<float>(c.random, t.scores.n));
    momenta.emplace_back(c.random, t.scores.n);
    momenta.back().zero();
    variances.emplace_back(c.random, adam ? t.scores.n : 0);
    variances.back().zero();
    signs.push_back(mask_words(c.random, t.layout, true));
    states.push_back({t.scores.data(), grads.back().data(), momenta.back().data(),
                      adam ? variances.back().data() : nullptr,
                      seeded ? signs.back().data() : nullptr, 0.5f});
  }
  const int64_t kept = c.random.below(candidates + 1);
  const uint32_t hint = c.random.one_in(2) ? static_cast<uint32_t>(c.random.next()) : 0;
  const SelectRoom room = select_room(c, tensors);
  const Selection made = kernels.popup_step(scores_of(tensors, false).data(), states.data(),
                                            static_cast<int64_t>(states.size()), rule, kept, abs,
                                            hint, room.scratch, c.threads);
  check_selection(c, tensors, false, abs, kept, made);
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t row = 0; row < tensors[i].layout.rows; ++row)
      for (int64_t k = 0; k < columns_of(tensors[i].layout); ++k) {
        const int64_t at = tensors[i].at(row, k);
        const float was = before[i][at], sign = abs ? (was > 0) - (was < 0) : 1;
        const float weight = bit(signs[i], tensors[i].layout, row, k) ? -0.5f : 0.5f;
        const float grad = seeded ? grads[i][at] * weight * sign : grads[i][at];
        // With fresh moments AdamW's step is lr * 0.1 g / (sqrt(0.01 g^2) + eps).
        const float step = adam ? grad / (std::fabs(grad) + 1e-7f)
                                : (grad + 0.01f * was) * (rule.nesterov ? 1.9f : 1.0f);
        const float expected = (adam ? 0.01f * was : was) - 0.1f * step;
        CHECK(std::fabs(tensors[i].scores[at] - expected) < 1e-5f);
      }
}

void drive_masked_step(Case& c) {
  const bool adam = c.random.one_in(2), held = adam || c.random.one_in(2);
  const ScoreRule rule{adam, c.random.one_in(2), 0.1f, 0.01f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-8f, 1};
  const Layout layout = layout_of(c.random);
  const int64_t n = numel(layout);
  const Buffer<float> weights = values<float>(c.random, n), grads = values<float>(c.random, n);
  Buffer<float> before(c.random, n), momentum(c.random, held ? n : 0),
      variance(c.random, adam ? n : 0);
  std::memcpy(before.data(), weights.data(), 4 * static_cast<size_t>(n));
  momentum.zero();
  variance.zero();
  Buffer<bf16> shadow(c.random, n);
  const Buffer<uint32_t> words = mask_words(c.random, layout, true);
  const MaskedTensor tensor{weights.data(),
                            grads.data(),
                            held ? momentum.data() : nullptr,
                            adam ? variance.data() : nullptr,
                            shadow.data(),
                            words.data(),
                            layout};
  kernels.masked_step(&tensor, 1, rule, c.threads);
  for (int64_t row = 0; row < layout.rows; ++row)
    for (int64_t k = 0; k < columns_of(layout); ++k) {
      const int64_t at = row * columns_of(layout) + dense_column(layout, k);
      if (!bit(words, layout, row, k)) {
        CHECK(weights[at] == before[at] && shadow[at].bits == 0);
        CHECK(!(held && momentum[at] != 0) && !(adam && variance[at] != 0));
        continue;
      }
      const float was = before[at], grad = grads[at];
      // With fresh moments AdamW's step is lr * 0.1 g / (sqrt(0.01 g^2) + eps).
      const float step = adam ? grad / (std::fabs(grad) + 1e-7f)
                              : (grad + 0.01f * was) * (held && rule.nesterov ? 1.9f : 1.0f);
      CHECK(std::fabs(weights[at] - ((adam ? 0.01f * was : was) - 0.1f * step)) < 1e-5f);
      CHECK(std::fabs(to_float(shadow[at]) - weights[at]) <= 0.005f * std::fabs(weights[at]));
    }
}

// ------------------------------------------------------------------ linear layers
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

// Both directions: y = x W^T, or transposed x W.
template <typename T>
void masked_linear_live(Case& c, Dtype dtype) {
  const Layout l = linear_of(c.random);
  const bool transposed = c.random.one_in(2);
  const int64_t width = transposed ? l.rows : l.channels;
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<T> weight = values<T>(c.random, numel(l));
  const Layout seen{transposed ? l.channels : l.rows, width, 1};
  check_linear<T>(
      c, seen,
      [&](const T* x, const T* bias, T* y, int64_t batch) {
        const Buffer<float> scratch(c.random,
                                    masked_linear_floats(batch, width, transposed, c.threads));
        kernels.masked_linear_live(x, weight.data(), words.data(), bias, y, dtype, batch, l.rows,
                                   l.channels, transposed, scratch.data(), c.threads);
      },
      [&](int64_t out, int64_t in) {
        const int64_t row = transposed ? in : out, k = transposed ? out : in;
        return bit(words, l, row, k) ? to_float(weight[row * l.channels + k]) : 0.0f;
      });
}

void drive_masked_linear_live(Case& c) {
  c.random.one_in(2) ? masked_linear_live<float>(c, Dtype::f32)
                     : masked_linear_live<bf16>(c, Dtype::bf16);
}

// The weight of a ticket; its sign plane is given or left to the kernel.
struct Ticket {
  Layout layout;
  Key key;
  bool plane, full;
  Buffer<uint32_t> words, made;

  Ticket(Random& random, const Layout& l)
      : layout(l),
        key(key_of(random)),
        plane(random.one_in(2)),
        full(random.one_in(4)),
        words(mask_words(random, l, true)),
        made(made_signs(random, words_of(l), key)) {
    if (full) std::memset(words.data(), 0xFF, 4 * static_cast<size_t>(words.n));
  }
  const uint32_t* signs() const { return plane ? made.data() : nullptr; }
  const uint32_t* kept() const { return full ? nullptr : words.data(); }  // null: all of them
  float weight(int64_t row, int64_t k) const {
    return !bit(words, layout, row, k) ? 0.0f : bit(made, layout, row, k) ? -0.25f : 0.25f;
  }
};

template <typename T>
void ticket_linear(Case& c, Dtype dtype) {
  const Layout l = linear_of(c.random);
  const Ticket ticket(c.random, l);
  const Buffer<float> tables(c.random, ticket_tables_floats(l.channels));
  check_linear<T>(
      c, l,
      [&](const T* x, const T* bias, T* y, int64_t batch) {
        kernels.ticket_linear(x, ticket.kept(), ticket.signs(), bias, y, dtype, batch, l.rows,
                              l.channels, 0.25f, ticket.key.low, ticket.key.high, tables.data(),
                              c.threads);
      },
      [&](int64_t row, int64_t k) { return ticket.weight(row, k); });
}

void drive_ticket_linear(Case& c) {
  c.random.one_in(2) ? ticket_linear<float>(c, Dtype::f32) : ticket_linear<bf16>(c, Dtype::bf16);
}

Buffer<uint32_t> ticket_codes(Case& c, const Ticket& ticket, bool transposed) {
  const int64_t rows = ticket.layout.rows, k = ticket.layout.channels;
  Buffer<uint32_t> codes(
      c.random, transposed ? code_chunks(rows) * code_rows(k) : code_chunks(k) * code_rows(rows));
  kernels.ticket_codes(ticket.kept(), ticket.signs(), codes.data(), rows, k, transposed,
                       ticket.key.low, ticket.key.high, c.threads);
  return codes;
}

void drive_ticket_codes(Case& c) {
  const Ticket ticket(c.random, linear_of(c.random));
  const bool transposed = c.random.one_in(2);
  const Buffer<uint32_t> codes = ticket_codes(c, ticket, transposed);
  const int64_t across = transposed ? ticket.layout.channels : ticket.layout.rows;
  for (int64_t row = 0; row < ticket.layout.rows; ++row)
    for (int64_t k = 0; k < ticket.layout.channels; ++k) {
      const int64_t along = transposed ? row : k, i = along % 16;  // of the code's weights
      const uint32_t code = codes[along / 16 * code_rows(across) + (transposed ? k : row)];
      const uint32_t low = code >> (i / 4 * 5) & 31, fourth = code >> (20 + i / 4 * 2) & 3;
      const uint32_t digits[] = {low % 3, low / 3 % 3, low / 9, fourth};
      const float weight = ticket.weight(row, k);
      CHECK(digits[i % 4] == (weight < 0 ? 0u : weight > 0 ? 2u : 1u));
    }
}

template <typename T>
void lookup_linear(Case& c, Dtype dtype) {
  const Layout l = linear_of(c.random);
  const Ticket ticket(c.random, l);
  const Buffer<uint32_t> codes = ticket_codes(c, ticket, false);
  const Buffer<float> sums(c.random, lookup_sums_floats(c.threads));
  check_linear<T>(
      c, l,
      [&](const T* x, const T* bias, T* y, int64_t batch) {
        kernels.lookup_linear(x, codes.data(), bias, y, dtype, batch, l.rows, l.channels, 0.25f,
                              sums.data(), c.threads);
      },
      [&](int64_t row, int64_t k) { return ticket.weight(row, k); });
}

void drive_lookup_linear(Case& c) {
  c.random.one_in(2) ? lookup_linear<float>(c, Dtype::f32) : lookup_linear<bf16>(c, Dtype::bf16);
}

void drive_popup_linear_ds(Case& c) {
  const Layout l = linear_of(c.random);
  const Ticket ticket(c.random, l);
  const bool abs = c.random.one_in(2);
  const Buffer<float> scores = values<float>(c.random, numel(l));
  const Buffer<float> grad = values<float>(c.random, numel(l)), out(c.random, numel(l));
  std::memcpy(out.data(), grad.data(), 4 * static_cast<size_t>(grad.n));
  kernels.popup_linear_ds(out.data(), scores.data(), l.rows, l.channels, abs, 0.25f, ticket.key.low,
                          ticket.key.high, c.threads);
  for (int64_t i = 0; i < out.n; ++i) {
    const bool negative = bit(ticket.made, l, i / l.channels, i % l.channels);
    const float sign = abs ? (scores[i] > 0) - (scores[i] < 0) : 1;
    CHECK(out[i] == grad[i] * (negative ? -0.25f : 0.25f) * sign);
  }
}

// ------------------------------------------------------------------ live values
Buffer<int64_t> starts_of(Random& random, const Buffer<uint32_t>& words, const Layout& l) {
  Buffer<int64_t> starts(random, l.rows + 1);
  kernels.live_starts(words.data(), l.rows, columns_of(l), starts.data());
  return starts;
}

void drive_live_starts(Case& c) {
  const Layout l = layout_of(c.random);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<int64_t> starts = starts_of(c.random, words, l);
  int64_t before = 0;
  for (int64_t row = 0; row < l.rows; ++row) {
    CHECK(starts[row] == before);
    for (int64_t k = 0; k < columns_of(l); ++k) before += bit(words, l, row, k);
  }
  CHECK(starts[l.rows] == before);
}

template <typename T>
void live_values(Case& c, bool scatter) {
  const Layout l = layout_of(c.random);
  const Buffer<uint32_t> words = mask_words(c.random, l, true);
  const Buffer<int64_t> starts = starts_of(c.random, words, l);
  const Buffer<T> dense(c.random, numel(l)), live(c.random, starts[l.rows]);
  for (int64_t i = 0; i < dense.n; ++i) dense[i] = static_cast<T>(c.random.next());
  for (int64_t i = 0; i < live.n; ++i) live[i] = static_cast<T>(c.random.next());
  const auto kernel = scatter ? kernels.scatter_live : kernels.gather_live;
  kernel(scatter ? live.data() : dense.data(), words.data(), scatter ? dense.data() : live.data(),
         starts.data(), sizeof(T), l, c.threads);
  int64_t at = 0;
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < columns_of(l); ++k) {
      const T element = dense[row * columns_of(l) + dense_column(l, k)];
      if (bit(words, l, row, k))
        CHECK(element == live[at++]);
      else
        CHECK(!scatter || element == 0);
    }
}

void drive_gather_live(Case& c) {
  const int64_t kind = c.random.below(3);
  kind == 0   ? live_values<uint16_t>(c, false)
  : kind == 1 ? live_values<uint32_t>(c, false)
              : live_values<uint64_t>(c, false);
}

void drive_scatter_live(Case& c) {
  const int64_t kind = c.random.below(3);
  kind == 0   ? live_values<uint16_t>(c, true)
  : kind == 1 ? live_values<uint32_t>(c, true)
              : live_values<uint64_t>(c, true);
}

// A masked matrix [rows, k] and its pattern, of the transposed matrix if so asked.
struct Sparse {
  Layout layout;
  bool transposed;
  Buffer<uint32_t> words;
  int64_t kept;
  Pattern shape;
  Buffer<uint32_t> pattern;

  Sparse(Random& random, bool transposed)
      : layout(linear_of(random)),
        transposed(transposed),
        words(mask_words(random, layout, true)),
        kept(starts_of(random, words, layout)[layout.rows]),
        shape(transposed ? pattern_of(layout.channels, layout.rows, kept)
                         : pattern_of(layout.rows, layout.channels, kept)),
        pattern(random, shape.words_of(transposed)) {
    const Buffer<int32_t> places(random, kLongestBlock + 1);
    kernels.sparse_pattern(words.data(), shape.rows, shape.k, kept, transposed, pattern.data(),
                           places.data());
  }
  bool live(int64_t row, int64_t k) const {  // of the pattern's matrix
    return transposed ? bit(words, layout, k, row) : bit(words, layout, row, k);
  }
};

void drive_sparse_pattern(Case& c) {
  const Sparse s(c.random, c.random.one_in(2));
  const uint32_t *starts = s.pattern.data() + 16, *columns = s.pattern.data() + s.shape.columns;
  int64_t at = 0;
  for (int64_t row = 0; row < s.shape.rows; ++row) {
    CHECK(starts[row] == at);
    for (int64_t k = 0; k < s.shape.k; ++k)
      if (s.live(row, k)) {
        uint16_t narrow;
        std::memcpy(&narrow, reinterpret_cast<const char*>(columns) + 2 * at, 2);
        CHECK((s.shape.wide() ? columns[at] : narrow) == k);
        ++at;
      }
  }
  CHECK(starts[s.shape.rows] == at && at == s.kept);
}

// The element of feature f of a sample.
int64_t place_in(const Batch& b, int64_t features, int64_t group, int64_t sample, int64_t f) {
  return b.inner ? (group * features + f) * b.samples + sample
                 : (group * b.samples + sample) * features + f;
}

Batch batch_of(Random& random) {  // often whole vectors of samples
  Batch b{1 + random.below(2), 1 + random.below(random.one_in(3) ? 150 : 20), random.one_in(2)};
  if (random.one_in(2)) b.samples = 16 * (1 + random.below(6));
  return b;
}

template <typename T>
void sparse_linear(Case& c, Dtype dtype) {
  const Sparse s(c.random, c.random.one_in(2));
  const Batch b = batch_of(c.random);
  const int64_t rows = s.shape.rows, k_end = s.shape.k, kept = s.kept;
  const bool biased = c.random.one_in(2);
  const Buffer<T> live = values<T>(c.random, kept), bias = values<T>(c.random, rows);
  const Buffer<T> x = values<T>(c.random, b.groups * b.samples * k_end);
  const Buffer<T> y(c.random, b.groups * b.samples * rows);
  const Buffer<float> scratch(c.random, sparse_linear_floats(s.shape, c.threads));
  kernels.sparse_linear(s.pattern.data(), live.data(), x.data(), biased ? bias.data() : nullptr,
                        y.data(), dtype, b, scratch.data(), c.threads);
  std::vector<double> weight(static_cast<size_t>(rows * k_end));
  for (int64_t o = 0, at = 0; o < s.layout.rows; ++o)
    for (int64_t k = 0; k < s.layout.channels; ++k)
      if (bit(s.words, s.layout, o, k))
        weight[static_cast<size_t>(s.transposed ? k * k_end + o : o * k_end + k)] =
            to_float(live[at++]);
  for (int64_t i = 0; i < b.groups * b.samples * rows; ++i) {
    const int64_t row = i % rows, sample = i / rows % b.samples, group = i / rows / b.samples;
    double sum = biased ? to_float(bias[row]) : 0, bound = std::fabs(sum);
    for (int64_t k = 0; k < k_end; ++k) {
      const double product = weight[static_cast<size_t>(row * k_end + k)] *
                             to_float(x[place_in(b, k_end, group, sample, k)]);
      sum += product;
      bound += std::fabs(product);
    }
    CHECK(near(y[place_in(b, rows, group, sample, row)], sum, bound));
  }
}

void drive_sparse_linear(Case& c) {
  c.random.one_in(2) ? sparse_linear<float>(c, Dtype::f32) : sparse_linear<bf16>(c, Dtype::bf16);
}

template <typename T>
void sparse_linear_dw(Case& c, Dtype dtype) {
  const Sparse s(c.random, false);
  const Batch b = batch_of(c.random);
  const Layout& l = s.layout;
  const Buffer<T> x = values<T>(c.random, b.groups * b.samples * l.channels);
  const Buffer<T> grad = values<T>(c.random, b.groups * b.samples * l.rows);
  const Buffer<T> out(c.random, s.kept);
  const Buffer<float> scratch(c.random, sparse_linear_dw_floats(s.shape));
  kernels.sparse_linear_dw(s.pattern.data(), grad.data(), x.data(), out.data(), dtype, b,
                           scratch.data(), c.threads);
  for (int64_t row = 0, at = 0; row < l.rows; ++row)
    for (int64_t k = 0; k < l.channels; ++k) {
      if (!bit(s.words, l, row, k)) continue;
      double sum = 0, bound = 0;
      for (int64_t i = 0; i < b.groups * b.samples; ++i) {
        const int64_t group = i / b.samples, sample = i % b.samples;
        const double product =
            static_cast<double>(to_float(grad[place_in(b, l.rows, group, sample, row)])) *
            to_float(x[place_in(b, l.channels, group, sample, k)]);
        sum += product;
        bound += std::fabs(product);
      }
      CHECK(near(out[at++], sum, bound));
    }
}

void drive_sparse_linear_dw(Case& c) {
  c.random.one_in(2) ? sparse_linear_dw<float>(c, Dtype::f32)
                     : sparse_linear_dw<bf16>(c, Dtype::bf16);
}

// ------------------------------------------------------------------ convolutions
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

// Scratch of a convolution of a mask, as csrc/bind/conv*.cpp makes it.
struct ConvRoom {
  Conv conv;
  Layout layout;
  Buffer<uint32_t> words;
  int64_t live;
  ConvPlan plan;
  Buffer<float> planes, sums, stream;
  Buffer<Column> columns;
  Buffer<int32_t> starts, offsets;
  Buffer<float> taken;

  ConvRoom(Case& c, const Conv& v)
      : conv(v),
        layout(layout_of(v)),
        words(mask_words(c.random, layout, false)),
        live(count(words)),
        plan(make_conv_plan(v, live)),
        planes(c.random, conv_image_floats(v, plan) * c.threads),
        sums(c.random, conv_sums_floats(v) * c.threads),
        stream(c.random, live),
        columns(c.random, conv_columns(v)),
        starts(c.random, plan.blocks * v.outputs + 1),
        offsets(c.random, live),
        taken(c.random, live) {}
  ConvScratch scratch() const { return {planes.data(), sums.data()}; }
  TapScratch taps() const { return {columns.data(), starts.data(), offsets.data(), taken.data()}; }
};

// Weights with the mask's live values in canonical order.
struct LiveWeight {
  Buffer<float> live;
  std::vector<float> dense;

  LiveWeight(Random& random, const ConvRoom& room)
      : live(values<float>(random, room.live)), dense(static_cast<size_t>(numel(room.layout))) {
    for (int64_t i = 0, at = 0; i < numel(room.layout); ++i)
      if (bit(room.words, room.layout, i / columns_of(room.layout), i % columns_of(room.layout)))
        dense[static_cast<size_t>(i)] = live[at++];
  }
};

// run(x, bias or null, y): as check_linear.
template <typename Run, typename Weight>
void check_conv2d(Case& c, const Conv& v, const Run& run, const Weight& weight) {
  const int64_t image = v.channels * v.height * v.width, plane = v.out_height * v.out_width;
  const Buffer<float> x = values<float>(c.random, v.batch * image);
  const Buffer<float> bias = values<float>(c.random, v.outputs);
  const Buffer<float> y(c.random, v.batch * v.outputs * plane);
  const bool biased = c.random.one_in(2);
  run(x.data(), biased ? bias.data() : nullptr, y.data());
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
  const ConvRoom r(c, conv_of(c.random));
  const Layout& l = r.layout;
  const Buffer<float> weight = values<float>(c.random, numel(l));
  check_conv2d(
      c, r.conv,
      [&](const float* x, const float* bias, float* y) {
        kernels.masked_conv2d(x, weight.data(), r.words.data(), bias, y, r.conv, r.plan,
                              r.scratch(), r.taps(), c.threads);
      },
      [&](int64_t o, int64_t k) {
        return bit(r.words, l, o, k) ? weight[o * columns_of(l) + dense_column(l, k)] : 0.0f;
      });
}

void drive_ticket_conv2d(Case& c) {
  const ConvRoom r(c, conv_of(c.random));
  const Key key = key_of(c.random);
  const Buffer<uint32_t> signs = made_signs(c.random, r.words.n, key);
  const bool plane = c.random.one_in(2);
  check_conv2d(
      c, r.conv,
      [&](const float* x, const float* bias, float* y) {
        kernels.ticket_conv2d(x, r.words.data(), plane ? signs.data() : nullptr, bias, y, r.conv,
                              0.25f, key.low, key.high, r.plan, r.scratch(), r.taps(), c.threads);
      },
      [&](int64_t o, int64_t k) {
        return !bit(r.words, r.layout, o, k) ? 0.0f : bit(signs, r.layout, o, k) ? -0.25f : 0.25f;
      });
}

Buffer<int32_t> conv2d_taps(Case& c, const ConvRoom& r) {
  Buffer<int32_t> taps(c.random, kTapHeader + r.plan.blocks * r.conv.outputs + 1 + 2 * r.live);
  kernels.conv2d_taps(r.words.data(), r.conv, r.plan, r.columns.data(), taps.data(), r.live);
  return taps;
}

void check_order(Case& c, const int32_t* order, int64_t n) {
  std::vector<bool> seen(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    CHECK(order[i] >= 0 && order[i] < n && !seen[static_cast<size_t>(order[i])]);
    seen[static_cast<size_t>(order[i])] = true;
  }
}

void drive_conv2d_taps(Case& c) {
  const ConvRoom r(c, conv_of(c.random));
  const Buffer<int32_t> taps = conv2d_taps(c, r);
  CHECK(taps[0] == r.conv.height && taps[1] == r.conv.width);
  check_order(c, taps.data() + taps.n - r.live, r.live);
}

void drive_sparse_conv2d(Case& c) {
  const ConvRoom r(c, conv_of(c.random));
  const Buffer<int32_t> taps = conv2d_taps(c, r);
  const LiveWeight weight(c.random, r);
  check_conv2d(
      c, r.conv,
      [&](const float* x, const float* bias, float* y) {
        kernels.sparse_conv2d(x, weight.live.data(), taps.data(), bias, y, r.conv, r.plan,
                              r.scratch(), r.stream.data(), r.live, c.threads);
      },
      [&](int64_t o, int64_t k) {
        return weight.dense[static_cast<size_t>(o * columns_of(r.layout) + k)];
      });
}

struct ConvCode {
  Buffer<int32_t> ranks, places, order;
  Buffer<int64_t> entries;
  CodeParts parts;
  Buffer<uint8_t> code;

  ConvCode(Case& c, const ConvRoom& r)
      : ranks(c.random, r.conv.outputs),
        places(c.random, conv_strips(r.conv)),
        order(c.random, r.live),
        entries(c.random, conv_strips(r.conv)),
        parts{r.columns.data(), ranks.data(), entries.data(), places.data(), order.data()},
        code(c.random, kernels.conv_code(r.words.data(), r.conv, r.plan, parts, nullptr)) {
    CHECK(kernels.conv_code(r.words.data(), r.conv, r.plan, parts, code.data()) == code.n);
  }
};

void drive_conv_code(Case& c) {
  const ConvRoom r(c, conv_of(c.random));
  check_order(c, ConvCode(c, r).order.data(), r.live);
}

// The code itself knows no sanitizer; what goes around it does.
void drive_run_conv_code(Case& c) {
  const ConvRoom r(c, conv_of(c.random));
  const ConvCode made(c, r);
  const LiveWeight weight(c.random, r);
#if defined(__AVX512F__)
  const size_t bytes = static_cast<size_t>(made.code.n);
  void* const pages =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(pages != MAP_FAILED);
  std::memcpy(pages, made.code.data(), bytes);
  CHECK(mprotect(pages, bytes, PROT_READ | PROT_EXEC) == 0);
  check_conv2d(
      c, r.conv,
      [&](const float* x, const float* bias, float* y) {
        kernels.run_conv_code(x, weight.live.data(), bias, y, r.conv, r.plan, r.scratch(),
                              made.parts, static_cast<const uint8_t*>(pages), r.stream.data(),
                              r.live, c.threads);
      },
      [&](int64_t o, int64_t k) {
        return weight.dense[static_cast<size_t>(o * columns_of(r.layout) + k)];
      });
  munmap(pages, bytes);
#endif
}

void drive_sparse_conv2d_dw(Case& c) {
  ConvRoom r(c, conv_of(c.random));
  const Conv& v = r.conv;
  r.plan.block_channels = v.channels / v.groups;
  r.plan.blocks = 1;
  const int64_t image = v.channels * v.height * v.width, plane = v.out_height * v.out_width;
  const Buffer<float> x = values<float>(c.random, v.batch * image), out(c.random, r.live);
  const Buffer<float> grad = values<float>(c.random, v.batch * v.outputs * plane);
  const Buffer<int32_t> starts(c.random, v.outputs + 1);
  const Buffer<float> planes(c.random, grad_planes_floats(v, r.plan));
  const Buffer<float> flat(c.random, c.threads * 16 * r.plan.vectors);
  const Buffer<float> sums(c.random, c.threads * 16 * conv_columns(v));
  kernels.sparse_conv2d_dw(x.data(), grad.data(), r.words.data(), out.data(), v, r.plan,
                           {r.columns.data(), starts.data(), r.offsets.data(), nullptr},
                           {planes.data(), flat.data(), sums.data()}, r.live, c.threads);
  for (int64_t o = 0, at = 0; o < v.outputs; ++o)
    for (int64_t k = 0; k < columns_of(r.layout); ++k) {
      if (!bit(r.words, r.layout, o, k)) continue;
      double sum = 0, bound = 0;
      const auto only = [&](int64_t, int64_t other) { return other == k ? 1.0f : 0.0f; };
      for (int64_t i = 0; i < v.batch * plane; ++i) {
        const int64_t n = i / plane, pixel = i % plane;
        double unused = 0;
        const double seen = conv_pixel(v, x.data() + n * image, o, pixel / v.out_width,
                                       pixel % v.out_width, only, &unused);
        const double product = seen * grad[(n * v.outputs + o) * plane + pixel];
        sum += product;
        bound += std::fabs(product);
      }
      CHECK(near(out[at++], sum, bound));
    }
}

// ------------------------------------------------------------------ subset sums
template <typename T>
void subset_sum(Case& c) {
  Random& random = c.random;
  const int64_t rows = 1 + random.below(4), n = random.below(10), shared = 1 + random.below(3);
  const Buffer<T> base(random, rows * n), target(random, rows * shared);
  const Buffer<double> eps(random, 1), value(random, rows * shared), error(random, rows * shared);
  const Buffer<int64_t> lengths(random, rows), mask(random, rows * shared);
  const Buffer<int8_t> status(random, rows * shared);
  for (int64_t i = 0; i < base.n; ++i) base[i] = static_cast<T>(random.value());
  for (int64_t i = 0; i < target.n; ++i) target[i] = static_cast<T>(2 * random.value());
  for (int64_t i = 0; i < rows; ++i) lengths[i] = random.below(n + 1);
  eps[0] = random.one_in(3) ? 0 : 0.02;
  const bool least = random.one_in(3), fallback = random.one_in(2), ragged = random.one_in(2);
  const int max_card = 1 + static_cast<int>(random.below(4));
  const Buffer<int64_t> scratch(random, c.threads * subset_scratch(n, least, fallback));
  const Finite finite =
      kernels.subset_sum({base.data(), target.data(), eps.data(), ragged ? lengths.data() : nullptr,
                          mask.data(), value.data(), error.data(), status.data(), rows, n, shared,
                          sizeof(T) == 8, true, least, fallback, max_card},
                         scratch.data(), c.threads);
  CHECK(finite.base && finite.target);
  for (int64_t i = 0; i < rows * shared; ++i) {
    const int64_t count = ragged ? lengths[i / shared] : n;
    const auto sum = [&](int64_t subset) {
      double total = 0;
      for (int64_t k = 0; k < count; ++k)
        total += subset >> k & 1 ? static_cast<double>(base[i / shared * n + k]) : 0.0;
      return total;
    };
    CHECK(mask[i] >> count == 0 && value[i] == sum(mask[i]));
    CHECK(error[i] == std::fabs(value[i] - static_cast<double>(target[i])));
    CHECK(status[i] == (error[i] > eps[0]));
    const double rounding = 1e-5;
    for (int64_t subset = 0; subset < int64_t{1} << count; ++subset) {
      const double other = std::fabs(sum(subset) - static_cast<double>(target[i]));
      const int size = __builtin_popcountll(static_cast<uint64_t>(subset));
      if (least) CHECK(error[i] <= other + rounding);
      if (!least && size <= max_card && other <= eps[0] - rounding)
        CHECK(!status[i] && __builtin_popcountll(static_cast<uint64_t>(mask[i])) <= size);
    }
  }
}

void drive_subset_sum(Case& c) {
  c.random.one_in(2) ? subset_sum<float>(c) : subset_sum<double>(c);
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
