// The numbers of the emulated GPU: subnormal f32 numbers are flushed where something is computed, and
// only there. Without this, what other tests say of them would prove nothing.
#include <gtest/gtest.h>

#include <bit>
#include <cstdint>

// From here on the address spaces are words of the language.
#include "include/metal_stdlib"
#include "launch.hpp"

using namespace metal;

namespace {

struct Results {
  float product, sum, moved;
  bool positive;
  half small_half;
};

TEST(MetalNumbers, SubnormalsAreFlushed) {
  volatile float tiny = 1e-39f, small = 1e-30f, smaller = 1e-9f;
  volatile half half_tiny = static_cast<half>(6e-8f);
  Results got{};
  moesaic::emulation::metal_launch({1}, 32, [&](uint3, uint, uint lane) {
    if (lane != 0) return;
    got.product = small * smaller * 1e6f;  // 1e-33 by way of a subnormal number
    got.sum = tiny + 0.0f;
    got.moved = tiny;
    got.positive = tiny > 0.0f;
    got.small_half = half_tiny;
  });
  EXPECT_EQ(got.product, 0.0f);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(got.sum), 0u);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(got.moved), std::bit_cast<std::uint32_t>(1e-39f));
  EXPECT_FALSE(got.positive);
  EXPECT_GT(static_cast<float>(got.small_half), 5e-8f) << "f16 has subnormal numbers";
  EXPECT_GT(small * smaller * 1e6f, 0.0f) << "not where the host computes";
}

}  // namespace
