// sparseticket._C: argument checks, scratch memory and GIL release around the kernels. No
// arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../core/core.h"
#include "dlpack.h"

namespace py = pybind11;
using st::Tensor;

namespace {

struct Level {
  const char* name;
  const st::Kernels* kernels;
};

std::vector<Level> supported_levels() {
  std::vector<Level> levels{{"base", &st::base::table()}};
#ifdef ST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("popcnt"))
    levels.push_back({"avx2", &st::avx2::table()});
  if (levels.size() == 2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    levels.push_back({"avx512", &st::avx512::table()});
#endif
  return levels;
}

Level level;  // chosen once at import, changed only by set_isa

const st::Kernels& kernels() { return *level.kernels; }

void set_isa(const std::string& name) {
  std::string known;
  for (const Level& candidate : supported_levels()) {
    if (name == candidate.name) {
      level = candidate;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
  }
  throw py::value_error("SPARSETICKET_ISA: got '" + name + "', this machine has: " + known);
}

void choose_isa() {
  const char* wanted = std::getenv("SPARSETICKET_ISA");
  if (wanted && *wanted)
    set_isa(wanted);
  else
    level = supported_levels().back();
}

int checked_threads(int nthreads) {
  if (nthreads < 1) throw py::value_error("sparseticket._C: nthreads: need at least 1");
  return nthreads;
}

st::Dtype dtype_of(const Tensor& t) {
  if (t.is(st::kFloat, 32)) return st::Dtype::f32;
  if (t.is(st::kBfloat, 16)) return st::Dtype::bf16;
  t.fail("need float32 or bfloat16");
}

const Tensor& same_dtype(const Tensor& t, st::Dtype dtype) {
  if (dtype_of(t) != dtype) t.fail("has another dtype than its companions");
  return t;
}

template <typename T>
const T* optional_data(const std::optional<Tensor>& t) {
  return t ? t->data<T>() : nullptr;
}

std::optional<Tensor> maybe(const py::object& capsule, const char* name) {
  if (capsule.is_none()) return std::nullopt;
  return Tensor(capsule, name);
}

st::Layout layout_of(int64_t rows, int64_t channels, int64_t taps) {
  if (rows < 0 || channels < 0 || taps < 1)
    throw py::value_error("sparseticket._C: layout: sizes must not be negative");
  return {rows, channels, taps};
}

void pack_mask(py::object mask, py::object words, int64_t rows, int64_t channels, int64_t taps,
               int nthreads) {
  const st::Layout layout = layout_of(rows, channels, taps);
  const Tensor m(mask, "mask"), w(words, "words");
  const uint8_t* in = m.sized(rows * st::columns_of(layout)).bools();
  uint32_t* out = w.sized(rows * st::row_words(layout)).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().pack_mask(in, out, layout, nthreads);
}

void unpack_mask(py::object words, py::object mask, int64_t rows, int64_t channels, int64_t taps,
                 int nthreads) {
  const st::Layout layout = layout_of(rows, channels, taps);
  const Tensor w(words, "words"), m(mask, "mask");
  const uint32_t* in = w.sized(rows * st::row_words(layout)).words();
  uint8_t* out = m.sized(rows * st::columns_of(layout)).bools();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().unpack_mask(in, out, layout, nthreads);
}

void mask_logical(py::object a, py::object b, py::object out, int op, int nthreads) {
  const Tensor ta(a, "a"), tb(b, "b"), to(out, "out");
  const uint32_t* pa = ta.words();
  const uint32_t* pb = tb.sized(ta.size()).words();
  uint32_t* po = to.sized(ta.size()).words();
  if (op < 0 || op > 3) throw py::value_error("sparseticket._C: op: need 0..3");
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().mask_logical(pa, pb, po, ta.size(), static_cast<st::Logical>(op), nthreads);
}

int64_t mask_count(py::object a, py::object b, bool hamming, int nthreads) {
  const Tensor ta(a, "a"), tb(b, "b");
  const uint32_t* pa = ta.words();
  const uint32_t* pb = tb.sized(ta.size()).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  return kernels().mask_count(pa, pb, ta.size(), hamming, nthreads);
}

void apply_mask(py::object dense, py::object words, py::object out, int64_t rows, int64_t channels,
                int64_t taps, int nthreads) {
  const st::Layout layout = layout_of(rows, channels, taps);
  const Tensor d(dense, "dense"), w(words, "words"), o(out, "out");
  const int64_t bytes = d.item_bytes();
  if (bytes != 2 && bytes != 4 && bytes != 8) d.fail("need 2-, 4- or 8-byte elements");
  if (o.item_bytes() != bytes) o.fail("has another dtype than dense");
  const void* in = d.sized(rows * st::columns_of(layout)).data<void>();
  void* to = o.sized(rows * st::columns_of(layout)).data<void>();
  const uint32_t* bits = w.sized(rows * st::row_words(layout)).words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().apply_mask(in, bits, to, bytes, layout, nthreads);
}

void sign_words(py::object words, uint32_t key, uint32_t high, int nthreads) {
  const Tensor w(words, "words");
  uint32_t* out = w.words();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().sign_words(out, w.size() / 2, key, high, nthreads);
}

void regenerate(py::object out, py::object words, py::object table, int64_t rows, int64_t channels,
                int64_t taps, int dist, float scale, uint32_t key, uint32_t high, int nthreads) {
  const st::Layout layout = layout_of(rows, channels, taps);
  const Tensor o(out, "out");
  const auto w = maybe(words, "words");
  const auto t = maybe(table, "table");
  const st::Dtype dtype = dtype_of(o);
  void* to = o.sized(rows * st::columns_of(layout)).data<void>();
  if (w) w->of(st::kInt, 32).sized(rows * st::row_words(layout));
  if (dist < 0 || dist > 2) throw py::value_error("sparseticket._C: dist: need 0..2");
  if ((dist == 2) != t.has_value())
    throw py::value_error("sparseticket._C: table: for dist 2 only");
  if (t) t->of(st::kFloat, 32).sized(65536);
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().regenerate(to, dtype, optional_data<uint32_t>(w), optional_data<float>(t), layout,
                       static_cast<st::Dist>(dist), scale, key, high, nthreads);
}

struct ScoreList {
  std::vector<st::Scores> scores;
  std::vector<std::unique_ptr<uint8_t[]>> eligible;  // expanded `within` masks
  std::vector<int64_t> candidates;
};

using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, bool>;

ScoreList score_list(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                     const std::vector<py::object>& words,
                     const std::optional<std::vector<py::object>>& within, int nthreads) {
  if (layouts.size() != scores.size() || words.size() != scores.size() ||
      (within && within->size() != scores.size()))
    throw py::value_error("sparseticket._C: select_mask: lists differ in length");
  ScoreList list;
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto [rows, channels, taps, canonical] = layouts[i];
    const st::Layout layout = layout_of(rows, channels, taps);
    const Tensor s(scores[i], "scores"), w(words[i], "words");
    const int64_t n = rows * st::columns_of(layout);
    st::Scores entry{s.sized(n).floats(),
                     nullptr,
                     nullptr,
                     w.sized(rows * st::row_words(layout)).words(),
                     layout,
                     canonical};
    list.candidates.push_back(n);
    if (within) {
      const Tensor mask((*within)[i], "within");
      entry.within = mask.sized(rows * st::row_words(layout)).words();
      list.eligible.emplace_back(new uint8_t[static_cast<size_t>(n)]);
      entry.eligible = list.eligible.back().get();
      const st::Layout memory = canonical ? st::Layout{rows, channels * taps, 1} : layout;
      kernels().unpack_mask(entry.within, list.eligible.back().get(), memory, nthreads);
      list.candidates.back() =
          kernels().mask_count(entry.within, entry.within, w.size(), false, nthreads);
    }
    list.scores.push_back(entry);
  }
  return list;
}

void select_mask(const std::vector<py::object>& scores, const std::vector<LayoutTuple>& layouts,
                 const std::vector<py::object>& words,
                 const std::optional<std::vector<py::object>>& within,
                 const std::vector<int64_t>& kept, bool abs, bool global, py::object hints,
                 py::object state, int nthreads) {
  checked_threads(nthreads);
  ScoreList list = score_list(scores, layouts, words, within, nthreads);
  const size_t groups = global ? 1 : list.scores.size();
  const Tensor out(state, "state");
  const auto hint = maybe(hints, "hints");
  uint32_t* results = out.sized(static_cast<int64_t>(2 * groups)).words();
  const uint32_t* hinted = hint ? hint->sized(static_cast<int64_t>(2 * groups)).words() : nullptr;
  if (kept.size() != groups) throw py::value_error("sparseticket._C: kept: one count per group");
  for (size_t g = 0; g < groups; ++g) {
    int64_t eligible = 0;
    for (size_t i = global ? 0 : g; i < (global ? list.scores.size() : g + 1); ++i)
      eligible += list.candidates[i];
    if (kept[g] < 0 || kept[g] > eligible)
      throw py::value_error("sparseticket._C: kept: need 0 to the number of candidates");
  }

  py::gil_scoped_release release;
  const auto samples = std::make_unique<uint32_t[]>(st::kSelectSamples);
  for (size_t g = 0; g < groups; ++g) {
    const size_t first = global ? 0 : g, count = global ? list.scores.size() : 1;
    int64_t eligible = 0, total = 0;
    for (size_t i = first; i < first + count; ++i) {
      eligible += list.candidates[i];
      total += list.scores[i].layout.rows * st::columns_of(list.scores[i].layout);
    }
    const int threads = st::threads_for(total, nthreads);
    const int64_t capacity = total / 8 + 65536 * threads;
    const std::unique_ptr<uint32_t[]> candidates(new uint32_t[static_cast<size_t>(capacity)]);
    const std::unique_ptr<int64_t[]> counts(
        new int64_t[static_cast<size_t>(st::kSelectBins * threads)]);
    const st::SelectScratch scratch{samples.get(), candidates.get(), capacity, counts.get()};
    const st::Selection selection =
        kernels().select_mask(list.scores.data() + first, static_cast<int64_t>(count), eligible,
                              kept[g], abs, hinted ? hinted[2 * g] : 0, scratch, threads);
    results[2 * g] = selection.threshold;
    results[2 * g + 1] = selection.nan;
  }
}

int64_t rice_encode(py::object words, int64_t k, int parameter, py::object payload) {
  const Tensor w(words, "words");
  const auto p = maybe(payload, "payload");
  const uint32_t* in = w.words();
  if (w.ndim() != 2) w.fail("needs two dimensions");
  if (parameter < 0 || parameter > 30) throw py::value_error("sparseticket._C: parameter: 0 to 30");
  const int64_t rows = w.dim(0);
  if (k < 0 || w.size() != rows * st::row_words(k)) w.fail("does not fit k");
  uint8_t* out = p ? p->bytes() : nullptr;
  py::gil_scoped_release release;
  if (out && p->size() < (kernels().rice_encode(in, rows, k, parameter, nullptr) + 7) / 8) {
    py::gil_scoped_acquire acquire;
    p->fail("is too short");
  }
  return kernels().rice_encode(in, rows, k, parameter, out);
}

bool rice_decode(py::object payload, py::object words, int64_t k, int64_t kept, int parameter) {
  const Tensor p(payload, "payload"), w(words, "words");
  const uint8_t* in = p.bytes();
  uint32_t* out = w.words();
  if (w.ndim() != 2) w.fail("needs two dimensions");
  if (parameter < 0 || parameter > 30) throw py::value_error("sparseticket._C: parameter: 0 to 30");
  const int64_t rows = w.dim(0);
  if (k < 0 || w.size() != rows * st::row_words(k)) w.fail("does not fit k");
  py::gil_scoped_release release;
  return kernels().rice_decode(in, p.size(), out, rows, k, kept, parameter);
}

struct Linear {
  const void* x;
  const uint32_t* words;
  const void* bias;
  void* y;
  st::Dtype dtype;
  int64_t batch, rows, k;
};

Linear linear_of(const Tensor& x, const Tensor& words, const std::optional<Tensor>& bias,
                 const Tensor& y) {
  if (x.ndim() != 2 || y.ndim() != 2) x.fail("x and y need two dimensions");
  Linear l{};
  l.dtype = dtype_of(x);
  l.batch = x.dim(0), l.k = x.dim(1), l.rows = y.dim(1);
  l.x = x.data<void>();
  l.y = same_dtype(y, l.dtype).sized(l.batch * l.rows).data<void>();
  l.words = words.sized(l.rows * st::row_words(l.k)).words();
  l.bias = bias ? same_dtype(*bias, l.dtype).sized(l.rows).data<void>() : nullptr;
  return l;
}

void masked_linear(py::object x, py::object weight, py::object words, py::object bias, py::object y,
                   int nthreads) {
  const Tensor tx(x, "x"), tw(weight, "weight"), tm(words, "words"), ty(y, "y");
  const Linear l = linear_of(tx, tm, maybe(bias, "bias"), ty);
  const void* w = same_dtype(tw, l.dtype).sized(l.rows * l.k).data<void>();
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().masked_linear(l.x, w, l.words, l.bias, l.y, l.dtype, l.batch, l.rows, l.k, nthreads);
}

void ticket_linear(py::object x, py::object words, py::object signs, py::object bias, py::object y,
                   float sigma, uint32_t key, uint32_t high, int nthreads) {
  const Tensor tx(x, "x"), tm(words, "words"), ty(y, "y");
  const auto ts = maybe(signs, "signs");
  const Linear l = linear_of(tx, tm, maybe(bias, "bias"), ty);
  if (ts) ts->of(st::kInt, 32).sized(tm.size());
  checked_threads(nthreads);
  py::gil_scoped_release release;
  kernels().ticket_linear(l.x, l.words, optional_data<uint32_t>(ts), l.bias, l.y, l.dtype, l.batch,
                          l.rows, l.k, sigma, key, high, nthreads);
}

using Geometry = std::array<int64_t, 9>;  // kernel, stride, padding, dilation (h, w each), groups

st::Conv conv_of(const Tensor& x, const Tensor& y, const Geometry& g) {
  if (x.ndim() != 4 || y.ndim() != 4) x.fail("x and y need four dimensions");
  for (const int64_t v : g)
    if (v < 0) x.fail("the geometry must not be negative");
  st::Conv c{x.dim(0), x.dim(1), x.dim(2), x.dim(3), y.dim(1), y.dim(2), y.dim(3), g[0],
             g[1],     g[2],     g[3],     g[4],     g[5],     g[6],     g[7],     g[8]};
  if (c.groups < 1 || c.channels % c.groups || c.outputs % c.groups || c.stride_h < 1 ||
      c.stride_w < 1 || c.dilation_h < 1 || c.dilation_w < 1 || y.dim(0) != c.batch)
    x.fail("does not fit the geometry");
  if (c.out_height <= 1) c.stride_h = 1;  // a stride that is never taken
  if (c.out_width <= 1) c.stride_w = 1;
  const auto fits = [](int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride,
                       int64_t out) {
    return out == 0 || (out - 1) * stride + dilation * (kernel - 1) < in + 2 * pad;
  };
  if (!fits(c.height, c.pad_h, c.dilation_h, c.kernel_h, c.stride_h, c.out_height) ||
      !fits(c.width, c.pad_w, c.dilation_w, c.kernel_w, c.stride_w, c.out_width))
    y.fail("is larger than the input allows");
  return c;
}

struct ConvCall {
  st::Conv conv;
  const float* x;
  const uint32_t* words;
  const float* bias;
  float* y;
  std::unique_ptr<float[]> planes;
  std::unique_ptr<st::Tap[]> taps;
};

ConvCall conv_call(const Tensor& x, const Tensor& words, const std::optional<Tensor>& bias,
                   const Tensor& y, const Geometry& geometry, int nthreads) {
  ConvCall call{};
  call.conv = conv_of(x, y, geometry);
  const st::Conv& c = call.conv;
  const int64_t columns = c.channels / c.groups * c.kernel_h * c.kernel_w;
  call.x = x.floats();
  call.y = y.floats();
  call.words = words.sized(c.outputs * st::row_words(columns)).words();
  call.bias = bias ? bias->sized(c.outputs).floats() : nullptr;
  checked_threads(nthreads);
  call.planes.reset(new float[static_cast<size_t>(st::conv_planes_floats(c))]);
  call.taps.reset(new st::Tap[static_cast<size_t>(columns * nthreads)]);
  return call;
}

void masked_conv2d(py::object x, py::object weight, py::object words, py::object bias, py::object y,
                   const Geometry& geometry, int nthreads) {
  const Tensor tx(x, "x"), tw(weight, "weight"), tm(words, "words"), ty(y, "y");
  const ConvCall c = conv_call(tx, tm, maybe(bias, "bias"), ty, geometry, nthreads);
  const float* w =
      tw.sized(c.conv.outputs * c.conv.channels / c.conv.groups * c.conv.kernel_h * c.conv.kernel_w)
          .floats();
  py::gil_scoped_release release;
  kernels().masked_conv2d(c.x, w, c.words, c.bias, c.y, c.conv, c.planes.get(), c.taps.get(),
                          nthreads);
}

void ticket_conv2d(py::object x, py::object words, py::object signs, py::object bias, py::object y,
                   const Geometry& geometry, float sigma, uint32_t key, uint32_t high,
                   int nthreads) {
  const Tensor tx(x, "x"), tm(words, "words"), ty(y, "y");
  const auto ts = maybe(signs, "signs");
  const ConvCall c = conv_call(tx, tm, maybe(bias, "bias"), ty, geometry, nthreads);
  if (ts) ts->of(st::kInt, 32).sized(tm.size());
  py::gil_scoped_release release;
  kernels().ticket_conv2d(c.x, c.words, optional_data<uint32_t>(ts), c.bias, c.y, c.conv, sigma,
                          key, high, c.planes.get(), c.taps.get(), nthreads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  choose_isa();
  m.attr("csrc_hash") = ST_CSRC_HASH;
  m.def("isa", [] { return std::string(level.name); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Level& l : supported_levels()) names.push_back(l.name);
    return names;
  });
  m.def("set_isa", &set_isa);
  m.def("pack_mask", &pack_mask);
  m.def("unpack_mask", &unpack_mask);
  m.def("mask_logical", &mask_logical);
  m.def("mask_count", &mask_count);
  m.def("apply_mask", &apply_mask);
  m.def("sign_words", &sign_words);
  m.def("regenerate", &regenerate);
  m.def("select_mask", &select_mask);
  m.def("rice_encode", &rice_encode);
  m.def("rice_decode", &rice_decode);
  m.def("masked_linear", &masked_linear);
  m.def("ticket_linear", &ticket_linear);
  m.def("masked_conv2d", &masked_conv2d);
  m.def("ticket_conv2d", &ticket_conv2d);
}
