// AdamW over the selected blocks of all layers, written into the weights in the same pass.
//
//   g = clip(grad * grad_scale, -G, G)         p *= 1 - lr * weight_decay
//   m += (1 - beta1) * (g - m)                 v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   blocks = round(p)                          w[block] = round(p)
//
// p is the master value where there is one, else the block itself. Computed in float32 (float64
// for float64 blocks). Per layer, all (S, L, L) contiguous: blocks and grad of block_dtype, m, v
// and master of float32 (m, v float64 for float64 blocks); w is the (N, K) weight, any strides, of
// w_dtype, or nullptr where the blocks are the only copy; rows and cols (S,) on the device, an
// index beyond the weight stops the kernel (trap). Entries of the padding beyond a ragged edge are
// neither read nor written.
//
// One launch for all layers. A block of the grid takes about 4096 neighbouring entries of a layer,
// a thread 16 bytes of moments at a time, where L, K, the weight's strides and all addresses allow
// it; else single entries. Bytes a float32 entry: reads 16, writes 12 and the weight's 4 (or 2).
//
// step, lr, grad_scale and found_inf are read on the device, once, by a kernel of one thread that
// prepares the coefficients in float64: nothing waits for the host, and a captured graph follows
// their values.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../cpu/dtype.h"

namespace smt_ext::cuda {

struct AdamWLayer {
  DType w_dtype, block_dtype;
  int64_t N, K, L, S;
  void* w;  // or nullptr
  int64_t stride_n, stride_k;
  const int32_t* rows;
  const int32_t* cols;
  void* blocks;
  const void* grad;
  void* m;
  void* v;
  float* master;  // or nullptr
};

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
