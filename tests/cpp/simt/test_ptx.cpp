// The PTX wrappers against naive references that go from matrix element to lane, not from lane to
// element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "testing.h"

using namespace simt_test;

namespace {

// ---- mma ----------------------------------------------------------------------------------------

struct Place {
  int lane, word, half;
};

// Where an element lives, read off the figures of the PTX ISA: 8 x 8 quadrants; in each, a row of A
// (a column of B) is held by four neighbouring lanes.
Place place_of_a16(int row, int k) { return {row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2}; }
Place place_of_b16(int k, int column) { return {column * 4 + k % 8 / 2, k / 8, k % 2}; }
Place place_of_a_tf32(int row, int k) { return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0}; }
Place place_of_b_tf32(int k, int column) { return {column * 4 + k % 4, k / 4, 0}; }
Place place_of_d(int row, int column) {
  return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, 0};
}

struct Fragments {
  uint32_t a[32][4] = {}, b[32][2] = {};
  float d[32][4] = {};
};

enum class Type { bf16, f16, tf32 };

uint16_t encode16(Type type, float x) {
  return type == Type::bf16 ? __bfloat16_as_ushort(x) : __half_as_ushort(x);
}

void put(uint32_t& word, int half, Type type, float x) {
  word = type == Type::tf32 ? ptx::cvt_rna_tf32(x)
                            : word | static_cast<uint32_t>(encode16(type, x)) << 16 * half;
}

__global__ void mma_kernel(Fragments* f, Type type) {
  const unsigned lane = threadIdx.x;
  switch (type) {
    case Type::bf16:
      ptx::mma_m16n8k16_bf16(f->d[lane], f->a[lane], f->b[lane]);
      break;
    case Type::f16:
      ptx::mma_m16n8k16_f16(f->d[lane], f->a[lane], f->b[lane]);
      break;
    case Type::tf32:
      ptx::mma_m16n8k8_tf32(f->d[lane], f->a[lane], f->b[lane]);
      break;
  }
}

// D (16 x 8) of A (16 x depth), B (depth x 8), C.
std::vector<float> run_mma(Type type, const std::vector<float>& a, const std::vector<float>& b,
                           const std::vector<float>& c) {
  const int depth = type == Type::tf32 ? 8 : 16;
  Fragments f;
  for (int k = 0; k < depth; ++k) {
    for (int row = 0; row < 16; ++row) {
      const Place p = type == Type::tf32 ? place_of_a_tf32(row, k) : place_of_a16(row, k);
      put(f.a[p.lane][p.word], p.half, type, a[row * depth + k]);
    }
    for (int column = 0; column < 8; ++column) {
      const Place p = type == Type::tf32 ? place_of_b_tf32(k, column) : place_of_b16(k, column);
      put(f.b[p.lane][p.word], p.half, type, b[k * 8 + column]);
    }
  }
  const auto d_of = [](Fragments& fragments, int i) -> float& {
    const Place p = place_of_d(i / 8, i % 8);
    return fragments.d[p.lane][p.word];
  };
  for (int i = 0; i < 128; ++i) d_of(f, i) = c[i];
  simt::Buffer<Fragments> device({f});
  launch("mma", mma_kernel, 1, 32, 0, nullptr, device.data(), type);
  Fragments result = device.values()[0];
  std::vector<float> d(128);
  for (int i = 0; i < 128; ++i) d[i] = d_of(result, i);
  return d;
}

class Mma : public testing::TestWithParam<Type> {
 protected:
  int depth() const { return GetParam() == Type::tf32 ? 8 : 16; }
};

TEST_P(Mma, MultipliesMatrices) {
  const auto a = small_integers(16 * depth(), 1), b = small_integers(depth() * 8, 2),
             c = small_integers(128, 3);
  const auto d = run_mma(GetParam(), a, b, c);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float expected = c[row * 8 + column];
      for (int k = 0; k < depth(); ++k) expected += a[row * depth() + k] * b[k * 8 + column];
      EXPECT_EQ(d[row * 8 + column], expected) << row << ", " << column;
    }
  }
}

TEST_P(Mma, PutsEveryElementInItsPlace) {  // one non-zero in A and in B at a time
  for (int row : {0, 3, 8, 15}) {
    for (int k = 0; k < depth(); ++k) {
      for (int column : {0, 5, 7}) {
        std::vector<float> a(16 * depth()), b(depth() * 8), expected(128);
        a[row * depth() + k] = 3;
        b[k * 8 + column] = 5;
        expected[row * 8 + column] = 15;
        EXPECT_EQ(run_mma(GetParam(), a, b, std::vector<float>(128)), expected)
            << row << ", " << k << ", " << column;
      }
    }
  }
}

TEST_P(Mma, AccumulatesTowardZero) {
  std::vector<float> a(16 * depth()), b(depth() * 8), c(128, 1.0f);
  a[0] = 0x1.8p-12f;  // times 2^-12: three quarters of the last bit of 1
  b[0] = 0x1p-12f;
  EXPECT_EQ(run_mma(GetParam(), a, b, c)[0], 1.0f);
  c.assign(128, -1.0f);
  a[0] = -0x1.8p-12f;
  EXPECT_EQ(run_mma(GetParam(), a, b, c)[0], -1.0f);
}

TEST_P(Mma, CountsOnePerWarp) {
  run_mma(GetParam(), std::vector<float>(16 * depth()), std::vector<float>(depth() * 8),
          std::vector<float>(128));
  EXPECT_EQ(simt::last_stats("mma").mma, 1u);
}

INSTANTIATE_TEST_SUITE_P(Types, Mma, testing::Values(Type::bf16, Type::f16, Type::tf32),
                         [](const auto& info) {
                           return std::string(info.param == Type::bf16  ? "bf16"
                                              : info.param == Type::f16 ? "f16"
                                                                        : "tf32");
                         });

TEST(Tf32, RoundsToNearestTiesAway) {
  const auto value = [](float x) { return __uint_as_float(ptx::cvt_rna_tf32(x)); };
  EXPECT_EQ(value(1.0f), 1.0f);
  EXPECT_EQ(value(1.0f + 0x1p-11f), 1.0f + 0x1p-10f);  // a tie
  EXPECT_EQ(value(-1.0f - 0x1p-11f), -1.0f - 0x1p-10f);
  EXPECT_EQ(value(1.0f + 0x1.fp-12f), 1.0f);
  EXPECT_EQ(value(INFINITY), INFINITY);
  EXPECT_TRUE(std::isnan(value(NAN)));
}

// ---- ldmatrix -----------------------------------------------------------------------------------

enum class Load { x4, x4_trans, x2, x2_trans };

// Matrix i, row r lies at row order[8 i + r] of a buffer with rows of 8 elements; element = 100 *
// (row in the buffer) + column.
__global__ void ldmatrix_kernel(const int* order, uint32_t* out, Load load) {
  auto* rows = ptx::dynamic_smem<unsigned short>();
  const unsigned lane = threadIdx.x;
  for (unsigned c = 0; c < 8; ++c)
    ptx::st_shared(rows + lane * 8 + c, static_cast<unsigned short>(100 * lane + c));
  __syncwarp();
  const unsigned short* row = rows + order[lane] * 8;
  uint32_t r[4] = {}, two[2] = {};
  switch (load) {
    case Load::x4:
      ptx::ldmatrix_x4(r, row);
      break;
    case Load::x4_trans:
      ptx::ldmatrix_x4_trans(r, row);
      break;
    case Load::x2:
      ptx::ldmatrix_x2(two, row);
      break;
    case Load::x2_trans:
      ptx::ldmatrix_x2_trans(two, row);
      break;
  }
  if (load == Load::x2 || load == Load::x2_trans) r[0] = two[0], r[1] = two[1];
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

class Ldmatrix : public testing::TestWithParam<Load> {};

TEST_P(Ldmatrix, GivesEveryElementToItsLane) {
  const Load load = GetParam();
  const int matrices = load == Load::x4 || load == Load::x4_trans ? 4 : 2;
  const bool trans = load == Load::x4_trans || load == Load::x2_trans;
  std::vector<int> order(32);
  for (int i = 0; i < 32; ++i) order[i] = (7 * i + 3) % 32;
  const simt::Buffer<int> device_order(order);
  simt::Buffer<uint32_t> out(128);
  launch("ldmatrix", ldmatrix_kernel, 1, 32, 32 * 16, nullptr, device_order.data(), out.data(),
         load);
  const auto registers = out.values();
  for (int m = 0; m < matrices; ++m) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        // A row (of the transposed matrix: a column) is spread over four lanes, two elements each.
        const int major = trans ? column : row, minor = trans ? row : column;
        const uint32_t word = registers[(major * 4 + minor / 2) * 4 + m];
        EXPECT_EQ(word >> 16 * (minor % 2) & 0xFFFF,
                  static_cast<uint32_t>(100 * order[8 * m + row] + column))
            << "matrix " << m << " row " << row << " column " << column;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, Ldmatrix,
                         testing::Values(Load::x4, Load::x4_trans, Load::x2, Load::x2_trans));

// ---- ldmatrix and mma together: products as the kernels form them -------------------------------

// out (16 x 8) = dy (16 tokens x 16)^T x (16 tokens x 8): both operands with the reduction
// dimension outermost.
__global__ void transposed_product(const __nv_bfloat16* dy, const __nv_bfloat16* x, float* out) {
  auto* dy_s = ptx::dynamic_smem<__nv_bfloat16>();
  auto* x_s = dy_s + 16 * 16;
  const unsigned lane = threadIdx.x;
  ptx::cp_async_16(dy_s + lane * 8, dy + lane * 8);
  if (lane < 16) ptx::cp_async_16(x_s + lane * 8, x + lane * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[2];
  // Matrices of A in register order: (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15),
  // ...; stored [k][row].
  const unsigned matrix = lane / 8, j = lane % 8;
  ptx::ldmatrix_x4_trans(a, dy_s + (matrix / 2 * 8 + j) * 16 + matrix % 2 * 8);
  ptx::ldmatrix_x2_trans(b, x_s + lane % 16 * 8);
  float d[4] = {};
  ptx::mma_m16n8k16_bf16(d, a, b);
  const unsigned g = lane / 4, q = lane % 4;
  ptx::st_global(reinterpret_cast<float2*>(out + g * 8 + 2 * q), make_float2(d[0], d[1]));
  ptx::st_global(reinterpret_cast<float2*>(out + (g + 8) * 8 + 2 * q), make_float2(d[2], d[3]));
}

TEST(Product, OfTransposedOperands) {
  const auto dy = small_integers(256, 4), x = small_integers(128, 5);
  const simt::Buffer<__nv_bfloat16> device_dy({dy.begin(), dy.end()}),
      device_x({x.begin(), x.end()});
  simt::for_each_seed(6, [&] {
    simt::Buffer<float> out(128);
    launch("product", transposed_product, 1, 32, (256 + 128) * 2, nullptr, device_dy.data(),
           device_x.data(), out.data());
    const auto result = out.values();
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 8; ++k) {
        float expected = 0;
        for (int t = 0; t < 16; ++t) expected += dy[t * 16 + n] * x[t * 8 + k];
        EXPECT_EQ(result[n * 8 + k], expected);
      }
    }
  });
}

// ---- cp.async -----------------------------------------------------------------------------------

template <int Bytes>
__global__ void zero_fill(const unsigned char* in, unsigned char* out, int src_bytes) {
  auto* s = ptx::dynamic_smem();
  ptx::cp_async<Bytes>(s, in, src_bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < Bytes; ++i) out[i] = s[i];
}

template <int Bytes>
void check_zero_fill() {
  for (int src = 0; src <= Bytes; ++src) {
    std::vector<unsigned char> in(src);  // exact: one byte more would be out of bounds
    for (int i = 0; i < src; ++i) in[i] = static_cast<unsigned char>(i + 1);
    const simt::Buffer<unsigned char> device(in);
    simt::Buffer<unsigned char> out(Bytes);
    launch("zero_fill", zero_fill<Bytes>, 1, 1, Bytes, nullptr, device.data(), out.data(), src);
    in.resize(Bytes);
    EXPECT_EQ(out.values(), in);
  }
}

TEST(CpAsync, FillsWithZero) {
  check_zero_fill<4>();
  check_zero_fill<8>();
  check_zero_fill<16>();
}

__global__ void groups(const uint4* in, uint4* out) {
  auto* s = ptx::dynamic_smem<uint4>();
  for (int i = 0; i < 3; ++i) {
    ptx::cp_async_16(s + i, in + i);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<2>();
  out[0] = ptx::ld_shared(s);
  ptx::cp_async_commit();  // an empty group counts
  ptx::cp_async_wait<1>();
  out[1] = ptx::ld_shared(s + 1);
  out[2] = ptx::ld_shared(s + 2);
  ptx::cp_async_wait<0>();
}

TEST(CpAsync, WaitsForAllButTheLatestGroups) {
  const simt::Buffer<uint4> in({{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}});
  simt::Buffer<uint4> out(3);
  launch("groups", groups, 1, 1, 48, nullptr, in.data(), out.data());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(out.values()[i].w, 4u * (i + 1));
}

}  // namespace
