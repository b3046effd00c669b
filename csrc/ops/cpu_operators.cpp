// The operators on CPUs: torch's thread pool, and indices checked on the host.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/cpu/block_grad.h"
#include "../kernels/cpu/block_score.h"
#include "../kernels/cpu/dequantize.h"
#include "../kernels/cpu/gather_blocks.h"
#include "../kernels/cpu/gather_columns.h"
#include "../kernels/cpu/grad_norm.h"
#include "../kernels/cpu/sparse_adamw.h"
#include "operators.h"

namespace smt_ext {

class TorchParallel final : public cpu::Parallel {
 public:
  void run(int64_t n, int64_t grain,
           const std::function<void(int64_t, int64_t)>& body) const override {
    torch::stable::parallel_for(0, n, grain, body);
  }
};

class Cpu {
 public:
  explicit Cpu(const Tensor& /*like*/) {}

  static void check_range(const int32_t* index, int64_t count, int64_t limit, const char* name) {
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < limit, name, ": expected indices in [0, ", limit,
                      "), got ", index[i], " at position ", i);
    }
  }

  static void check_columns(const int32_t* blocks, int64_t C, int64_t K, int64_t L, int64_t width) {
    check_range(blocks, C, ceil_div(K, L), "col_blocks");
    int64_t expected = 0;
    for (int64_t s = 0; s < C; ++s) {
      STD_TORCH_CHECK(s == 0 || blocks[s - 1] < blocks[s],
                      "col_blocks: expected strictly increasing indices, got ", blocks[s],
                      " at position ", s);
      expected += std::min(L, K - blocks[s] * L);
    }
    STD_TORCH_CHECK(width == expected, "width: expected ", expected, " columns, got ", width);
  }

  void gather_columns(const GatherColumnsArgs& args) const { cpu::gather_columns(args, threads_); }
  void block_grad(const BlockGradArgs& args) const { cpu::block_grad(args, threads_); }
  void gather_blocks(const BlocksArgs& args) const { cpu::gather_blocks(args, threads_); }
  void scatter_blocks(const BlocksArgs& args) const { cpu::scatter_blocks(args, threads_); }
  void block_score(const BlockScoreArgs& args) const { cpu::block_score(args, threads_); }
  void block_score_fused(const BlockScoreFusedArgs& args) const {
    cpu::block_score_fused(args, threads_);
  }
  void dequantize_with_blocks(const DequantizeArgs& args) const {
    cpu::dequantize_with_blocks(args, threads_);
  }

  void sparse_adamw(const std::vector<AdamWLayer>& layers, const AdamWNumbers& on_host,
                    const AdamWConstants& c) const {
    if (*on_host.found_inf != 0) return;
    cpu::sparse_adamw(layers.data(), static_cast<int64_t>(layers.size()),
                      {*on_host.lr, c.beta1, c.beta2, c.eps, c.weight_decay, *on_host.grad_scale,
                       *on_host.step, c.seed},
                      threads_);
  }

  void grad_norm(const std::vector<Gradient>& grads, double* norm) const {
    *norm = cpu::grad_norm(grads.data(), static_cast<int64_t>(grads.size()), threads_);
  }

 private:
  TorchParallel threads_;
};

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CPU, m) { smt_ext::implement<smt_ext::Cpu>(m); }
