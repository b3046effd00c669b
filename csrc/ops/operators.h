// Every operator, once for all devices: checks, allocation, and the launch of the device's kernel.
//
// A Device is made of the tensor whose device it is; it checks what it can see of indices and calls
// its kernels: Cpu in cpu_operators.cpp, Cuda in cuda_operators.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "blocks.h"
#include "optim.h"
#include "quantized.h"
#include "score.h"

namespace smt_ext {

template <typename Device>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("gather_columns", TORCH_BOX(&gather_columns<Device>));
  m.impl("block_grad", TORCH_BOX(&block_grad<Device>));
  m.impl("block_grad_siblings", TORCH_BOX(&block_grad_siblings<Device>));
  m.impl("block_grad_acc_", TORCH_BOX(&block_grad_acc_<Device>));
  m.impl("gather_blocks", TORCH_BOX(&gather_blocks<Device>));
  m.impl("scatter_blocks_", TORCH_BOX(&scatter_blocks_<Device>));
  m.impl("sparse_adamw_step_", TORCH_BOX(&sparse_adamw_step_<Device>));
  m.impl("grad_norm", TORCH_BOX(&grad_norm<Device>));
  m.impl("block_score", TORCH_BOX(&block_score<Device>));
  m.impl("block_score_fused", TORCH_BOX(&block_score_fused<Device>));
  m.impl("dequantize_4bit_with_blocks", TORCH_BOX(&dequantize_4bit_with_blocks<Device>));
  m.impl("dequantize_int8_with_blocks", TORCH_BOX(&dequantize_int8_with_blocks<Device>));
}

}  // namespace smt_ext
