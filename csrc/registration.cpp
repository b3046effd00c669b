// Every operator of smt_ext: schemas here, contracts in smt_ext/ops.py, kernels under kernels/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(smt_ext, m) {
  m.def(
      "gather_columns(Tensor x, Tensor col_blocks, int block_size, int width, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "block_grad(Tensor dy, Tensor x_cols, Tensor rows, Tensor slots, int block_size, "
      "ScalarType? out_dtype=None, bool allow_tf32=False, Tensor? tiles=None, "
      "Tensor? lone=None) -> Tensor");
  m.def(
      "block_grad_siblings(Tensor[] dys, Tensor x_cols, Tensor rows, Tensor slots, int block_size, "
      "ScalarType? out_dtype=None, bool allow_tf32=False, Tensor? tiles=None, "
      "Tensor? lone=None) -> Tensor");
  m.def(
      "block_grad_acc_(Tensor(a!) out, Tensor dy, Tensor x_cols, Tensor rows, Tensor slots, "
      "int block_size, bool allow_tf32=False, Tensor? tiles=None, Tensor? lone=None) -> ()");
  m.def(
      "gather_blocks(Tensor w, Tensor rows, Tensor cols, int block_size, "
      "ScalarType? dtype=None) -> Tensor");
  m.def("scatter_blocks_(Tensor(a!) w, Tensor blocks, Tensor rows, Tensor cols) -> ()");
  m.def(
      "sparse_adamw_step_(Tensor(a!)[] weights, Tensor(b!)[] blocks, Tensor[] grads, "
      "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] masters, Tensor[] rows, "
      "Tensor[] cols, Tensor step, Tensor lr, Tensor grad_scale, Tensor found_inf, float beta1, "
      "float beta2, float eps, float weight_decay, int seed, Tensor[] origins) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def("block_score(Tensor g, int block_size, str metric) -> Tensor");
  m.def(
      "block_score_fused(Tensor dy, Tensor x, int block_size, str metric, "
      "bool allow_tf32=False) -> Tensor");
  m.def(
      "dequantize_4bit_with_blocks(Tensor packed, Tensor absmax, Tensor code, int group, int n, "
      "int k, Tensor blocks, Tensor rows, Tensor cols, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize_int8_with_blocks(Tensor q, Tensor absmax, Tensor blocks, Tensor rows, "
      "Tensor cols, ScalarType dtype) -> Tensor");
  m.def("cpu_capability() -> str");
  m.def("cuda_archs() -> str");
}
