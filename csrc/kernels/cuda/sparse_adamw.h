// On CUDA: ../common/sparse_adamw.h has the formula.
//
// rows and cols are on the device; an index beyond the weight stops the kernel (trap).
//
// One launch for all layers. A block of the grid takes about 4096 neighbouring entries of a layer,
// a thread 16 bytes of moments at a time, where L, K, the weight's strides and all addresses allow
// it; else single entries.
//
// step, lr, grad_scale and found_inf are read on the device, once, by a kernel of one thread that
// prepares the coefficients in float64: nothing waits for the host, and a captured graph follows
// their values.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/sparse_adamw.h"

namespace smt_ext::cuda {

using smt_ext::AdamWLayer;

struct AdamWOptions {
  // One number each, on the device. step is that of this update, the first one is 1; nothing but
  // the workspace is written where found_inf is not 0.
  const double *step, *lr, *grad_scale, *found_inf;
  double beta1, beta2, eps, weight_decay;
  int64_t seed;  // >= 0: bfloat16 blocks without master are rounded stochastically
};

// Bytes of device memory, 16-byte aligned, that a call with n layers works in.
std::size_t sparse_adamw_workspace_bytes(int64_t n);

void sparse_adamw(const AdamWLayer* layers, int64_t n, const AdamWOptions& options, void* workspace,
                  cudaStream_t stream);

}  // namespace smt_ext::cuda
