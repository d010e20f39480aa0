// Machine code of masks (csrc/core/conv_code.cpp): pages that are written, then made executable,
// never both; kept in a table by an int64 handle, 0 being none.
#include <memory>
#include <vector>

#include "conv.h"

#ifdef ST_X86
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <unordered_map>

namespace st {
namespace {

struct Code {
  Conv conv{};  // of a batch of any size
  int64_t live = 0;
  uint8_t* pages = nullptr;
  size_t bytes = 0;
  std::vector<int64_t> entries;
  std::vector<int32_t> values, order;

  Code() = default;
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() {
#ifdef ST_X86
    if (pages) munmap(pages, bytes);
#endif
  }
  CodeParts parts() const {
    auto& self = const_cast<Code&>(*this);  // kernels that run the code only read
    return {nullptr, nullptr, self.entries.data(), self.values.data(), self.order.data()};
  }
};

std::mutex mutex;
std::unordered_map<int64_t, std::shared_ptr<const Code>> codes;
int64_t last_handle = 0;

bool enabled() {
#ifdef ST_X86
  const char* wanted = std::getenv("SPARSETICKET_JIT");
  return &kernels() == &avx512::table() && !(wanted && std::string(wanted) == "0");
#else
  return false;
#endif
}

bool map(Code& code, size_t bytes) {
#ifdef ST_X86
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return false;
  code.pages = static_cast<uint8_t*>(pages);
  code.bytes = bytes;
  return true;
#else
  return code.pages && bytes;
#endif
}

bool make_executable(const Code& code) {
#ifdef ST_X86
  return mprotect(code.pages, code.bytes, PROT_READ | PROT_EXEC) == 0;
#else
  return code.pages;
#endif
}

std::shared_ptr<Code> generate(const uint32_t* mask, const Conv& conv, int64_t live) {
  const ConvPlan plan = plan_of(conv, live);
  auto code = std::make_shared<Code>();
  code->conv = conv;
  code->live = live;
  code->entries.resize(static_cast<size_t>(conv_strips(conv)));
  code->values.resize(code->entries.size());
  code->order.resize(static_cast<size_t>(live));
  std::vector<Column> columns(static_cast<size_t>(conv_columns(conv)));
  std::vector<int32_t> ranks(static_cast<size_t>(conv.outputs));
  CodeParts parts = code->parts();
  parts.columns = columns.data();
  parts.ranks = ranks.data();
  const int64_t bytes = kernels().conv_code(mask, conv, plan, parts, nullptr);
  if (!map(*code, static_cast<size_t>(bytes))) return nullptr;
  kernels().conv_code(mask, conv, plan, parts, code->pages);
  return make_executable(*code) ? code : nullptr;
}

// 0 where the tier is switched off, not for this machine, or refused by the system.
int64_t compile_conv(py::object words, const Shape& x, const Shape& y, const Geometry& geometry) {
  const Tensor tm(words, "words");
  const Conv conv = conv_of(x, y, geometry);
  const uint32_t* mask = mask_of(tm, conv);
  const int64_t live = count_of(tm, 1);
  if (!enabled() || live == 0) return 0;
  py::gil_scoped_release release;
  const auto code = generate(mask, conv, live);
  if (!code) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  codes.emplace(++last_handle, code);
  return last_handle;
}

void release_code(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  codes.erase(handle);
}

int64_t code_bytes() {  // of all that is kept
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t bytes = 0;
  for (const auto& entry : codes) bytes += static_cast<int64_t>(entry.second->bytes);
  return bytes;
}

bool same_geometry(const Conv& a, const Conv& b) {
  return a.channels == b.channels && a.height == b.height && a.width == b.width &&
         a.outputs == b.outputs && a.out_height == b.out_height && a.out_width == b.out_width &&
         a.kernel_h == b.kernel_h && a.kernel_w == b.kernel_w && a.stride_h == b.stride_h &&
         a.stride_w == b.stride_w && a.pad_h == b.pad_h && a.pad_w == b.pad_w &&
         a.dilation_h == b.dilation_h && a.dilation_w == b.dilation_w && a.groups == b.groups;
}

// A call in flight keeps the code alive though its module dies.
std::shared_ptr<const Code> code_of(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = codes.find(handle);
  if (found == codes.end())
    throw py::value_error("sparseticket._C: code: no machine code has handle " +
                          std::to_string(handle));
  return found->second;
}

void run_code(py::object x, py::object values, int64_t handle, py::object bias, py::object y,
              const Geometry& geometry, int nthreads) {
  const Tensor tx(x, "x"), tv(values, "values"), ty(y, "y");
  const auto code = code_of(handle);
  const float* v = tv.sized(code->live).floats();
  const ConvCall c = conv_call(tx, code->live, maybe(bias, "bias"), ty, geometry, nthreads);
  if (!same_geometry(c.conv, code->conv)) tx.fail("is not what the code was made for");
  float* stream = kept_scratch(Slot::stream, code->live);
  py::gil_scoped_release release;
  kernels().run_conv_code(c.x, v, c.bias, c.y, c.conv, c.plan, c.scratch, code->parts(),
                          code->pages, stream, code->live, nthreads);
}

}  // namespace

void bind_conv_code(py::module_& m) {
  m.def("compile_conv", &compile_conv);
  m.def("release_code", &release_code);
  m.def("code_bytes", &code_bytes);
  m.def("run_conv_code", &run_code);
}

}  // namespace st
