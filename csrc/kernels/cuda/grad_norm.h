// L2 norm over all elements of several gradients, for clipping and for the inf/NaN guard.
//
// Squares are summed in float64, so that float32 gradients cannot overflow: the norm is inf or NaN
// only if an element is (or, for float64, beyond 1e154). Two launches for all gradients: a block of
// the grid sums 16384 elements into the workspace, then one block sums those sums; all in a fixed
// order, so that the bits never change. Reads each element once, 16 bytes an access where the
// address is a multiple.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../cpu/dtype.h"

namespace smt_ext::cuda {

struct Gradient {
  const void* data;  // contiguous
  int64_t numel;
  DType dtype;
};

// Bytes of device memory, 16-byte aligned, that a call works in.
std::size_t grad_norm_workspace_bytes(const Gradient* grads, int64_t n);

// norm: one float64 on the device.
void grad_norm(const Gradient* grads, int64_t n, double* norm, void* workspace,
               cudaStream_t stream);

}  // namespace smt_ext::cuda
