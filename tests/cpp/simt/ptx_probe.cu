// One kernel for each wrapper of ptx.cuh; test_sass.py checks which machine instruction each
// becomes.
#include "launch.cuh"
#include "ptx.cuh"

namespace ptx = smt_ext::cuda::ptx;

extern "C" {

__global__ void cp_async_16(const uint4* in, bool pred) {
  ptx::cp_async_16(ptx::dynamic_smem<uint4>() + threadIdx.x, in, pred);
}
__global__ void cp_async_8(const uint4* in, int n) {
  ptx::cp_async<8>(ptx::dynamic_smem<uint2>() + threadIdx.x, in, n);
}
__global__ void cp_async_4(const uint4* in, int n) {
  ptx::cp_async<4>(ptx::dynamic_smem<int>() + threadIdx.x, in, n);
}
__global__ void cp_async_commit_wait(const uint4* in) {
  ptx::cp_async_16(ptx::dynamic_smem<uint4>(), in);
  ptx::cp_async_commit();
  ptx::cp_async_wait<3>();
}

__global__ void ldmatrix_x4(uint4* out) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::dynamic_smem<uint4>() + threadIdx.x);
  *out = make_uint4(r[0], r[1], r[2], r[3]);
}
__global__ void ldmatrix_x4_trans(uint4* out) {
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, ptx::dynamic_smem<uint4>() + threadIdx.x);
  *out = make_uint4(r[0], r[1], r[2], r[3]);
}
__global__ void ldmatrix_x2(uint2* out) {
  uint32_t r[2];
  ptx::ldmatrix_x2(r, ptx::dynamic_smem<uint4>() + threadIdx.x);
  *out = make_uint2(r[0], r[1]);
}
__global__ void ldmatrix_x2_trans(uint2* out) {
  uint32_t r[2];
  ptx::ldmatrix_x2_trans(r, ptx::dynamic_smem<uint4>() + threadIdx.x);
  *out = make_uint2(r[0], r[1]);
}

struct Fragments {
  float d[4];
  uint32_t a[4], b[2];
};
__global__ void mma_bf16(Fragments* f) { ptx::mma_m16n8k16_bf16(f->d, f->a, f->b); }
__global__ void mma_f16(Fragments* f) { ptx::mma_m16n8k16_f16(f->d, f->a, f->b); }
__global__ void mma_tf32(Fragments* f) { ptx::mma_m16n8k8_tf32(f->d, f->a, f->b); }
__global__ void cvt_rna_tf32(const float* in, uint32_t* out) { *out = ptx::cvt_rna_tf32(*in); }

__global__ void ld_global_16(const float4* in, float4* out) {
  *out = ptx::ld_global(in + threadIdx.x);
}
__global__ void ld_global_nc_16(const float4* in, float4* out) {
  *out = ptx::ld_global_nc(in + threadIdx.x);
}
__global__ void ld_global_nc_2(const unsigned short* in, unsigned short* out) {
  *out = ptx::ld_global_nc(in + threadIdx.x);
}
__global__ void ld_global_stream_16(const float4* in, float4* out) {
  *out = ptx::ld_global_stream(in + threadIdx.x);
}
__global__ void st_global_16(float4* out) {
  ptx::st_global(out + threadIdx.x, make_float4(1, 2, 3, 4));
}
__global__ void st_global_8(double* out) { ptx::st_global(out + threadIdx.x, 1); }
__global__ void st_global_stream_16(float4* out) {
  ptx::st_global_stream(out + threadIdx.x, make_float4(1, 2, 3, 4));
}
__global__ void ld_st_shared_16(float4* out) {
  auto* s = ptx::dynamic_smem<float4>();
  ptx::st_shared(s + threadIdx.x, make_float4(1, 2, 3, 4));
  __syncthreads();
  *out = ptx::ld_shared(s + (threadIdx.x ^ 1));
}
__global__ void shared_array(float* out) {
  SMT_EXT_SHARED(float, values, 64);
  ptx::st_shared(&values[threadIdx.x], 1.0f);
  __syncthreads();
  *out = values[threadIdx.x ^ 1];
}
__global__ void block_index_x(unsigned* out) { *out = ptx::block_index_x(); }
__global__ void prefetch_l2(const uint4* in) { ptx::prefetch_l2(in + threadIdx.x); }
}

// launch() with arguments that convert, and the launcher's queries.
void launch_one(const uint4* in, cudaStream_t stream) {
  smt_ext::cuda::launch("cp_async_16", cp_async_16, dim3(smt_ext::cuda::multiprocessor_count()), 32,
                        smt_ext::cuda::max_shared_bytes(), stream, const_cast<uint4*>(in), 1);
}
