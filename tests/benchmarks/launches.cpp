// The launches that the CUDA launchers of smt_ext choose, without running a kernel: what
// benchmarks/roofline.py predicts from. Compiled as C++ with the SIMT checker's headers.
//
// Reads questions, a line each, and answers with the launches, "name blocks threads shared_bytes"
// each, separated by commas:
//   gather_columns T K U L            block_grad multiprocessors resident T N U L S dys
//   block_score N K L                 block_score_fused T N K L
//   sparse_adamw L S S S ...          grad_norm L S S S ...
//   tile rows columns                 (of MmaTile: threads, blocks, shared_bytes, stages, tokens)
//   block_columns multiprocessors resident T N L columns (by tall tiles where they are not few)
//   rows                              (of the copying kernels: threads, rows)
#include <iostream>
#include <sstream>

#include "block_grad.h"
#include "block_score.h"
#include "gather_columns.h"
#include "grad_norm.h"
#include "rows.cuh"
#include "sparse_adamw.h"
#include "tile_product.cuh"

namespace simt {

static Config the_config;
static std::string answer;

Config& config() { return the_config; }

namespace detail {
Builtins builtins;
void set_max_dynamic_shared(const void*, int) {}
int run(const Launch& launch) {
  std::ostringstream text;
  text << (answer.empty() ? "" : ",") << launch.name << ' '
       << std::size_t{launch.grid.x} * launch.grid.y * launch.grid.z << ' '
       << launch.block.x * launch.block.y * launch.block.z << ' ' << launch.smem_bytes;
  answer += text.str();
  return 0;
}
}  // namespace detail

}  // namespace simt

using namespace smt_ext;

// An aligned address that nobody follows.
template <typename T = void>
static T* somewhere() {
  return reinterpret_cast<T*>(std::uintptr_t{1} << 40);
}

template <int Rows, int Columns>
static void describe_tile() {
  using Tile = cuda::MmaTile<cuda::bf16, Rows, Columns>;
  std::ostringstream text;
  text << Tile::kThreads << ' ' << Tile::kBlocks << ' ' << Tile::kSharedBytes << ' '
       << Tile::kStages << ' ' << Tile::kTokens;
  simt::answer = text.str();
}

// What a device says of itself is asked once: one number for each number of resident blocks.
static void set_device(int64_t multiprocessors, int64_t resident) {
  simt::Device& device = simt::config().device;
  device.multiprocessors = static_cast<int>(multiprocessors);
  device.number = device.max_blocks_per_multiprocessor = static_cast<int>(resident);
}

static void ask(const std::string& kernel, const std::vector<int64_t>& n) {
  if (kernel == "tile") {
    if (n[0] == 256 && n[1] == 64) return describe_tile<256, 64>();
    if (n[0] == 256) return describe_tile<256, 32>();
    if (n[0] == 128) return describe_tile<128, 128>();
    if (n[0] == 64) return describe_tile<64, 64>();
    return describe_tile<32, 32>();
  }
  if (kernel == "rows") {
    simt::answer = std::to_string(cuda::kRowThreads) + " " + std::to_string(cuda::kRows);
  } else if (kernel == "gather_columns") {
    cuda::gather_columns({DType::bf16, DType::bf16, n[0], n[1], n[2], n[3], somewhere(), n[1], 1,
                          somewhere<int32_t>(), somewhere()},
                         nullptr);
  } else if (kernel == "block_grad") {
    set_device(n[0], n[1]);
    cuda::BlockGradArgs args{};
    args.dtype = DType::bf16;
    args.T = n[2], args.U = n[4], args.L = n[5], args.S = n[6];
    for (int64_t i = 0; i < n[7]; ++i) {
      args.dys[i] = {{somewhere(), n[3], 1}, n[3], static_cast<int32_t>(i * (n[3] / args.L))};
    }
    args.x_cols = {somewhere(), args.U, 1};
    args.rows = args.slots = somewhere<int32_t>(), args.out = somewhere();
    cuda::block_grad(args, somewhere(), nullptr);
  } else if (kernel == "block_columns") {
    set_device(n[0], n[1]);
    const int64_t T = n[2], N = n[3], L = n[4], columns = n[5];
    cuda::BlockGradArgs args{DType::bf16,
                             DType::f32,
                             T,
                             columns,
                             L,
                             N / L * (columns / L),
                             {{{somewhere(), N, 1}, N, 0}},
                             {somewhere(), columns, 1},
                             somewhere<int32_t>(),
                             somewhere<int32_t>(),
                             somewhere(),
                             false,
                             false};
    args.shape = {256, static_cast<int>(columns)};
    args.tiles = somewhere<int32_t>(), args.n_tiles = N / 256, args.lone = somewhere<int32_t>();
    cuda::block_grad(args, somewhere(), nullptr);
  } else if (kernel == "block_score") {
    cuda::block_score(
        {DType::bf16, Metric::mean_abs, n[0], n[1], n[2], somewhere(), n[1], 1, somewhere()},
        nullptr);
  } else if (kernel == "block_score_fused") {
    cuda::block_score_fused({DType::bf16, Metric::mean_abs, n[0], n[1], n[2], n[3], somewhere(),
                             n[1], 1, somewhere(), n[2], 1, somewhere(), false},
                            somewhere(), nullptr);
  } else if (kernel == "sparse_adamw") {
    std::vector<cuda::AdamWLayer> layers;
    for (std::size_t i = 1; i < n.size(); ++i) {
      layers.push_back({DType::bf16, DType::f32, 4096, 4096, n[0], n[i], somewhere(), 4096, 1,
                        somewhere<int32_t>(), somewhere<int32_t>(), somewhere(), somewhere(),
                        somewhere(), somewhere(), nullptr, nullptr, DType::bf16});
    }
    cuda::sparse_adamw(layers.data(), static_cast<int64_t>(layers.size()),
                       {somewhere<double>(), somewhere<double>(), somewhere<double>(),
                        somewhere<double>(), 0.9, 0.99, 1e-8, 0, -1},
                       somewhere(), nullptr);
  } else if (kernel == "grad_norm") {
    std::vector<cuda::Gradient> grads;
    for (std::size_t i = 1; i < n.size(); ++i) {
      grads.push_back({somewhere(), n[0] * n[0] * n[i], DType::f32});
    }
    cuda::grad_norm(grads.data(), static_cast<int64_t>(grads.size()), somewhere<double>(),
                    somewhere(), nullptr);
  } else {
    throw std::invalid_argument("unknown question: " + kernel);
  }
}

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string kernel;
    words >> kernel;
    std::vector<int64_t> numbers;
    for (int64_t n; words >> n;) numbers.push_back(n);
    simt::answer.clear();
    ask(kernel, numbers);
    std::cout << simt::answer << '\n';
  }
}
