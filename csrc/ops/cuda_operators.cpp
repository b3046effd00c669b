// The operators on CUDA: torch's current stream and allocator. Indices and numbers stay on the
// device, so that nothing waits for the host: the kernels stop at an index that is out of range.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/block_grad.h"
#include "../kernels/cuda/block_score.h"
#include "../kernels/cuda/dequantize.h"
#include "../kernels/cuda/gather_blocks.h"
#include "../kernels/cuda/gather_columns.h"
#include "../kernels/cuda/grad_norm.h"
#include "../kernels/cuda/sparse_adamw.h"
#include "operators.h"

// Only CUDA builds of torch have it; under the ABI of torch 2.10 there is no other way to the
// stream's handle. Weak, so that the extension also loads where torch is without CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace smt_ext {

// The tensor's device is current while this lives.
class Cuda {
 public:
  explicit Cuda(const Tensor& like)
      : like_(like), index_(like.get_device_index()), guard_(index_) {}

  static void check_range(const int32_t*, int64_t, int64_t, const char*) {}

  static void check_columns(const int32_t*, int64_t C, int64_t /*K*/, int64_t L, int64_t width) {
    STD_TORCH_CHECK(width <= C * L && (C == 0 || width > (C - 1) * L),
                    "width: expected the columns of ", C, " blocks of ", L, ", got ", width);
  }

  void gather_columns(const GatherColumnsArgs& args) const { cuda::gather_columns(args, stream()); }
  void block_grad(const BlockGradArgs& args) const {
    const Tensor memory = workspace(cuda::block_grad_workspace_bytes(args));
    cuda::block_grad(args, memory.mutable_data_ptr(), stream());
  }
  void gather_blocks(const BlocksArgs& args) const { cuda::gather_blocks(args, stream()); }
  void scatter_blocks(const BlocksArgs& args) const { cuda::scatter_blocks(args, stream()); }
  void block_score(const BlockScoreArgs& args) const { cuda::block_score(args, stream()); }
  void block_score_fused(const BlockScoreFusedArgs& args) const {
    const Tensor memory = workspace(cuda::block_score_fused_workspace_bytes(args));
    cuda::block_score_fused(args, memory.mutable_data_ptr(), stream());
  }
  void dequantize_with_blocks(const DequantizeArgs& args) const {
    cuda::dequantize_with_blocks(args, stream());
  }

  void sparse_adamw(const std::vector<AdamWLayer>& layers, const AdamWNumbers& on_device,
                    const AdamWConstants& c) const {
    const auto n = static_cast<int64_t>(layers.size());
    const Tensor memory = workspace(cuda::sparse_adamw_workspace_bytes(n));
    cuda::sparse_adamw(layers.data(), n,
                       {on_device.step, on_device.lr, on_device.grad_scale, on_device.found_inf,
                        c.beta1, c.beta2, c.eps, c.weight_decay, c.seed},
                       memory.mutable_data_ptr(), stream());
  }

  void grad_norm(const std::vector<Gradient>& grads, double* norm) const {
    const auto n = static_cast<int64_t>(grads.size());
    const Tensor memory = workspace(cuda::grad_norm_workspace_bytes(grads.data(), n));
    cuda::grad_norm(grads.data(), n, norm, memory.mutable_data_ptr(), stream());
  }

 private:
  cudaStream_t stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "smt_ext: this torch has no CUDA streams; install a CUDA build of torch");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  // Uninitialised bytes on the device. torch's allocator hands memory that is freed on the host out
  // again in stream order, so that it may go before the kernel that uses it has run.
  Tensor workspace(std::size_t bytes) const {
    return torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  }

  const Tensor& like_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CUDA, m) { smt_ext::implement<smt_ext::Cuda>(m); }
