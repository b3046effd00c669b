// ldmatrix and mma by their definition in the PTX ISA (Warp Level Matrix Instructions, with their
// fragment figures).
#include <cmath>
#include <cstring>

#include "half_bits.h"
#include "internal.h"

namespace simt::detail {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- ldmatrix -----------------------------------------------------------------------------------

struct Rows {  // what a lane brings: the row it names
  const void* row;
  Site site;
};

// Lane (g, q) receives elements [g][2q, 2q+1] of every matrix, or [2q, 2q+1][g] when transposing.
template <int Matrices, bool Trans>
void finish_ldmatrix(const void*, const void* const* in, void* const* out, unsigned) {
  const void* rows[8 * Matrices];
  std::uint16_t m[Matrices][8][8];
  for (int l = 0; l < 8 * Matrices; ++l) {
    rows[l] = static_cast<const Rows*>(in[l])->row;
    std::memcpy(m[l / 8][l % 8], rows[l], 16);
  }
  count_ldmatrix(rows, Matrices, static_cast<const Rows*>(in[0])->site);
  for (unsigned l = 0; l < 32; ++l) {
    const unsigned g = l / 4, q = l % 4;
    auto* r = static_cast<std::uint32_t*>(out[l]);
    for (int i = 0; i < Matrices; ++i) {
      const std::uint32_t low = Trans ? m[i][2 * q][g] : m[i][g][2 * q];
      const std::uint32_t high = Trans ? m[i][2 * q + 1][g] : m[i][g][2 * q + 1];
      r[i] = low | high << 16;
    }
  }
}

template <int Matrices, bool Trans>
void load_matrices(const char* what, std::uint32_t* r, const void* row, Site site) {
  const AtWork guard;
  if (lane() < 8 * Matrices) check_ldmatrix_row(row, site);
  const Rows in{row, site};
  meet(what, kAllLanes, &in, r, finish_ldmatrix<Matrices, Trans>, nullptr, false, site);
}

// ---- mma ----------------------------------------------------------------------------------------

struct Operands {
  const float* c;
  const std::uint32_t *a, *b;
};

// Element i of a register: two 16-bit elements, the lower first, or one tf32, whose low 13 bits do
// not count.
template <Mma Type>
double element(std::uint32_t word, unsigned i) {
  if (Type == Mma::tf32) return bits_as<float>(word & 0xffffe000u);
  const auto bits = static_cast<std::uint16_t>(word >> 16 * i);
  return Type == Mma::bf16 ? bf16_value(bits) : f16_value(bits);
}

float round_toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f)
                                                                : nearest;
}

template <Mma Type>
void finish_mma(const void*, const void* const* in, void* const* out, unsigned) {
  constexpr unsigned kDepth = Type == Mma::tf32 ? 8 : 16;
  constexpr unsigned kPerWord = Type == Mma::tf32 ? 1 : 2;
  double a[16][kDepth], b[kDepth][8], d[16][8];
  for (unsigned l = 0; l < 32; ++l) {
    const auto& lane = *static_cast<const Operands*>(in[l]);
    const unsigned g = l / 4, q = l % 4;
    for (unsigned i = 0; i < kPerWord; ++i) {
      const unsigned k = kPerWord * q + i;
      a[g][k] = element<Type>(lane.a[0], i);
      a[g + 8][k] = element<Type>(lane.a[1], i);
      a[g][k + kDepth / 2] = element<Type>(lane.a[2], i);
      a[g + 8][k + kDepth / 2] = element<Type>(lane.a[3], i);
      b[k][g] = element<Type>(lane.b[0], i);
      b[k + kDepth / 2][g] = element<Type>(lane.b[1], i);
    }
    for (unsigned i = 0; i < 4; ++i)
      d[g + i / 2 * 8][2 * q + i % 2] = static_cast<double>(lane.c[i]);
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < kDepth; ++k) {
      for (unsigned column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned l = 0; l < 32; ++l) {
    auto* result = static_cast<float*>(out[l]);
    for (unsigned i = 0; i < 4; ++i)
      result[i] = round_toward_zero(d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2]);
  }
  ++current_stats().mma;
}

}  // namespace

void ldmatrix(int matrices, bool trans, std::uint32_t* r, const void* row, Site site) {
  if (matrices == 4) {
    trans ? load_matrices<4, true>("ldmatrix.x4.trans", r, row, site)
          : load_matrices<4, false>("ldmatrix.x4", r, row, site);
  } else {
    trans ? load_matrices<2, true>("ldmatrix.x2.trans", r, row, site)
          : load_matrices<2, false>("ldmatrix.x2", r, row, site);
  }
}

void mma(Mma type, float* d, const std::uint32_t* a, const std::uint32_t* b, Site site) {
  const AtWork guard;
  const Operands in{d, a, b};  // finish reads every lane's d before it writes any
  switch (type) {
    case Mma::bf16:
      return meet("mma.m16n8k16.bf16", kAllLanes, &in, d, finish_mma<Mma::bf16>, nullptr, false,
                  site);
    case Mma::f16:
      return meet("mma.m16n8k16.f16", kAllLanes, &in, d, finish_mma<Mma::f16>, nullptr, false,
                  site);
    case Mma::tf32:
      return meet("mma.m16n8k8.tf32", kAllLanes, &in, d, finish_mma<Mma::tf32>, nullptr, false,
                  site);
  }
}

}  // namespace simt::detail
