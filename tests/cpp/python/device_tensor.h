// A torch tensor on the checker's device. It is known by its attributes in Python (address, sizes,
// strides, dtype), so that nothing of torch is compiled or linked in.
//
// The copy has the tensor's strides and its address modulo 64, hence kernels take the path that
// they would take on a GPU. Only elements of the tensor are there: what lies between them (the rest
// of the rows that a view was cut from) may be neither read nor written. An empty tensor has no
// memory and the address nullptr, as torch gives it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../../../csrc/kernels/common/dtype.h"
#include "simt.h"

namespace smt_ext::testing {

namespace py = pybind11;

// Exactly that many bytes of device memory, poisoned; nullptr for none.
struct Release {
  void operator()(void* p) const { simt::detail::release(p); }
};
using Memory = std::unique_ptr<void, Release>;

inline Memory allocate(std::size_t bytes, std::size_t element_bytes, const std::string& name) {
  return Memory(bytes == 0 ? nullptr : simt::detail::allocate(bytes, element_bytes, name));
}

enum class Use {
  input,    // copied in; a kernel that writes it is wrong
  output,   // starts as unwritten memory; every element must be written
  in_place  // copied in, and back
};

class DeviceTensor {
 public:
  DeviceTensor(const py::handle& tensor, const std::string& name, Use use)
      : name_(name),
        use_(use),
        type_(py::str(tensor.attr("dtype"))),
        element_bytes_(tensor.attr("element_size")().cast<std::size_t>()),
        host_(reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<std::uintptr_t>())),
        sizes_(tensor.attr("shape").cast<std::vector<int64_t>>()),
        strides_(tensor.attr("stride")().cast<std::vector<int64_t>>()) {
    if (tensor.attr("device").attr("type").cast<std::string>() != "cpu") {
      throw py::value_error(name + ": expected a tensor on the CPU");
    }
    if (numel() == 0) return;
    int64_t reach = 1;
    for (std::size_t d = 0; d < sizes_.size(); ++d) reach += (sizes_[d] - 1) * strides_[d];
    skew_ = reinterpret_cast<std::uintptr_t>(host_) % 64;
    bytes_ = skew_ + static_cast<std::size_t>(reach) * element_bytes_;
    memory_ = allocate(bytes_, element_bytes_, name);
    if (use == Use::output) return;
    for_each_run([&](std::size_t at, std::size_t bytes) {
      simt::detail::copy_in(device() + at, host_ + at, bytes);
    });
  }

  int64_t size(std::size_t dim) const { return sizes_.at(dim); }
  int64_t stride(std::size_t dim) const { return strides_.at(dim); }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes_) n *= size;
    return n;
  }

  DType dtype() const {
    if (type_ == "torch.float32") return DType::f32;
    if (type_ == "torch.bfloat16") return DType::bf16;
    if (type_ == "torch.float16") return DType::f16;
    if (type_ == "torch.float64") return DType::f64;
    throw py::type_error(name_ + ": expected a floating-point tensor, got " + type_);
  }

  // For kernels that are told the strides.
  void* data() const { return memory_ ? device() : nullptr; }

  // For kernels that take elements one after another, in row-major order.
  template <typename T = void>
  T* packed() const {
    int64_t stride = 1;
    for (std::size_t d = sizes_.size(); d-- > 0; stride *= sizes_[d]) {
      if (sizes_[d] > 1 && strides_[d] != stride && numel() > 0) {
        throw py::value_error(name_ + ": expected a contiguous tensor");
      }
    }
    return static_cast<T*>(data());
  }
  int32_t* indices() const { return of_type<int32_t>("torch.int32"); }
  double* number() const { return of_type<double>("torch.float64"); }

  // After the launch: results to the tensor. Throws simt::Error where an output was not written,
  // or where something was written that is not the kernel's to write.
  void finish() const {
    if (!memory_) return;
    check_gaps();
    for_each_run([&](std::size_t at, std::size_t bytes) {
      if (use_ == Use::input) {
        if (std::memcmp(device() + at, host_ + at, bytes) != 0) {
          throw simt::Error("the kernel wrote its input " + name_);
        }
      } else {
        simt::detail::copy_out(host_ + at, device() + at, bytes);
      }
    });
  }

 private:
  char* device() const { return static_cast<char*>(memory_.get()) + skew_; }

  template <typename T>
  T* of_type(const char* type) const {
    if (type_ != type) throw py::type_error(name_ + ": expected " + type + ", got " + type_);
    return packed<T>();
  }

  // f(first byte, bytes), counted from the first element, for elements that lie together.
  template <typename F>
  void for_each_run(const F& f) const {
    const bool joined = !strides_.empty() && strides_.back() == 1;
    const std::size_t outer = sizes_.size() - (joined ? 1 : 0);
    const int64_t run = joined ? sizes_.back() : 1;
    for (int64_t i = 0; i < numel() / run; ++i) {
      int64_t rest = i, at = 0;
      for (std::size_t d = outer; d-- > 0; rest /= sizes_[d]) at += rest % sizes_[d] * strides_[d];
      f(static_cast<std::size_t>(at) * element_bytes_,
        static_cast<std::size_t>(run) * element_bytes_);
    }
  }

  void check_gaps() const {
    if (static_cast<std::size_t>(numel()) * element_bytes_ == bytes_) return;
    std::vector<bool> own(bytes_);
    for_each_run([&](std::size_t at, std::size_t bytes) {
      for (std::size_t i = 0; i < bytes; ++i) own[skew_ + at + i] = true;
    });
    for (std::size_t i = 0; i < bytes_; ++i) {
      if (!own[i] && simt::detail::is_written(static_cast<char*>(memory_.get()) + i, 1)) {
        throw simt::Error("the kernel wrote between the elements of " + name_ + ", a view");
      }
    }
  }

  std::string name_;
  Use use_;
  std::string type_;
  std::size_t element_bytes_;
  char* host_;
  std::vector<int64_t> sizes_, strides_;
  std::size_t skew_ = 0, bytes_ = 0;
  Memory memory_;
};

}  // namespace smt_ext::testing
