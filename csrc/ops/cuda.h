// What the CUDA operators share: the current stream, a device guard, working memory of torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

// Only CUDA builds of torch have it; under the ABI of torch 2.10 there is no other way to the
// stream's handle. Weak, so that the extension also loads where torch is without CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace smt_ext {

// The tensor's device is current while this lives; stream() is torch's current one there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "smt_ext: this torch has no CUDA streams; install a CUDA build of torch");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Uninitialised bytes on the tensor's device. torch's allocator hands memory that is freed on the
// host out again in stream order, so that it may go before the kernel that uses it has run.
inline Tensor workspace(const Tensor& like, std::size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace smt_ext
