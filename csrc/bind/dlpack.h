// The DLPack structs (v0.8 ABI, unversioned capsules) and a checked view of a capsule's tensor.
// Capsules are borrowed for a call: the caller's Python reference keeps the storage alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace st {

struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

enum DLCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

class Tensor {
 public:
  Tensor(const pybind11::handle& capsule, const char* name) : name_(name) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw pybind11::error_already_set();
    tensor_ = &managed->dl_tensor;
    if (tensor_->device.device_type != 1) fail("need a CPU tensor");
    const int64_t bytes = item_bytes();
    if (bytes > 1 && size() > 0 && reinterpret_cast<uintptr_t>(data<char>()) % bytes != 0)
      fail("its memory is not aligned to its elements: clone it");
    int64_t expected = 1;
    for (int i = tensor_->ndim - 1; i >= 0; --i) {
      if (tensor_->strides && tensor_->shape[i] > 1 && tensor_->strides[i] != expected &&
          size() > 0)
        fail("need a contiguous tensor");
      expected *= tensor_->shape[i];
    }
  }

  int64_t dim(int i) const { return tensor_->shape[i]; }
  int ndim() const { return tensor_->ndim; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < tensor_->ndim; ++i) n *= tensor_->shape[i];
    return n;
  }
  int64_t item_bytes() const { return tensor_->dtype.bits / 8; }
  bool is(DLCode code, int bits) const {
    return tensor_->dtype.code == code && tensor_->dtype.bits == bits && tensor_->dtype.lanes == 1;
  }

  const Tensor& of(DLCode code, int bits) const {
    if (!is(code, bits)) fail("has another dtype than the kernel takes");
    return *this;
  }
  const Tensor& sized(int64_t n) const {
    if (size() != n) fail("has " + std::to_string(size()) + " elements, need " + std::to_string(n));
    return *this;
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_->data) + tensor_->byte_offset);
  }
  uint32_t* words() const { return of(kInt, 32).data<uint32_t>(); }
  float* floats() const { return of(kFloat, 32).data<float>(); }
  uint8_t* bytes() const { return of(kUInt, 8).data<uint8_t>(); }
  uint8_t* bools() const { return of(kBool, 8).data<uint8_t>(); }

  [[noreturn]] void fail(const std::string& why) const {
    throw pybind11::value_error(std::string("sparseticket._C: ") + name_ + ": " + why);
  }

 private:
  const DLTensor* tensor_;
  const char* name_;
};

}  // namespace st
