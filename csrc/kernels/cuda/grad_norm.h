// On CUDA: ../common/grad_norm.h has the formula.
//
// Two launches for all gradients: a block of the grid sums 16384 elements into the workspace, then
// one block sums those sums; all in a fixed order, so that the bits never change. 16 bytes an
// access where the address is a multiple.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/grad_norm.h"

namespace smt_ext::cuda {

using smt_ext::Gradient;

// Bytes of device memory, 16-byte aligned, that a call works in.
std::size_t grad_norm_workspace_bytes(const Gradient* grads, int64_t n);

// norm: one float64 on the device.
void grad_norm(const Gradient* grads, int64_t n, double* norm, void* workspace,
               cudaStream_t stream);

}  // namespace smt_ext::cuda
