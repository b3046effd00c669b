// Bit patterns of bfloat16 and binary16, with the rounding of the hardware: to nearest, ties to
// even; NaN becomes 0x7FFF.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Rounds once, from any double, so that conversions from float and double and products of both are
// all exact until here.
template <int ExponentBits, int MantissaBits>
inline std::uint16_t round_to_half(double value) {
  constexpr int kMinExponent = 2 - (1 << (ExponentBits - 1));
  constexpr std::uint32_t kInfinity = ((1u << ExponentBits) - 1) << MantissaBits;
  if (std::isnan(value)) return 0x7FFF;
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return static_cast<std::uint16_t>(sign | kInfinity);
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent = exponent - 1 < kMinExponent ? kMinExponent : exponent - 1;
  if (exponent > 1 << (ExponentBits - 1)) return static_cast<std::uint16_t>(sign | kInfinity);
  // The hidden bit carries into the exponent field; so does rounding up to a power of two or to
  // infinity.
  const auto scaled =
      static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, MantissaBits - exponent)));
  const std::uint32_t bits =
      (static_cast<std::uint32_t>(exponent - kMinExponent) << MantissaBits) + scaled;
  return static_cast<std::uint16_t>(sign | (bits < kInfinity ? bits : kInfinity));
}

inline std::uint16_t bf16_bits(double value) { return round_to_half<8, 7>(value); }
inline std::uint16_t f16_bits(double value) { return round_to_half<5, 10>(value); }

inline float bf16_value(std::uint16_t bits) {
  return bits_as<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline float f16_value(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t rest = bits & 0x7FFF;
  if (rest >= 0x7C00) return bits_as<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  const float magnitude = bits_as<float>(rest << 13) *
                          0x1p112f;  // moves the exponent's bias; exact, subnormals included
  return bits_as<float>(sign | bits_as<std::uint32_t>(magnitude));
}

}  // namespace simt
