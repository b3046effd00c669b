// Helpers of the checker's own tests.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "launch.cuh"
#include "ptx.cuh"

namespace simt_test {

namespace ptx = smt_ext::cuda::ptx;
using smt_ext::cuda::launch;

// The error of f; "" when there is none.
template <typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_ERROR(statement, ...)                                                             \
  do {                                                                                           \
    const std::string message = simt_test::error_of([&] { statement; });                         \
    EXPECT_FALSE(message.empty()) << "not caught: " #statement;                                  \
    for (const char* part : {__VA_ARGS__}) {                                                     \
      EXPECT_NE(message.find(part), std::string::npos) << "no '" << part << "' in: " << message; \
    }                                                                                            \
  } while (false)

// Values that are exact in bf16, f16 and tf32, and whose products of a few hundred add up exactly
// in float.
inline std::vector<float> small_integers(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(static_cast<int>(random() % 17) - 8);
  return values;
}

}  // namespace simt_test
