#include "moesaic/types.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "moesaic/error.hpp"
#include "moesaic/quant.hpp"

namespace moesaic {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }

// ---- f16 and bf16

/// An f16 by its definition, in double.
double f16_value(std::uint32_t bits) {
  const std::uint32_t exponent = bits >> 10 & 31u;
  const double mantissa = (bits & 1023u) / 1024.0;
  const double magnitude = exponent == 0
                               ? std::ldexp(mantissa, -14)
                               : std::ldexp(1 + mantissa, static_cast<int>(exponent) - 15);
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

TEST(Half, EveryF16ToF32AndBack) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = f16_to_f32(half);
    if ((bits & 0x7fffu) > 0x7c00u) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      const std::uint16_t back = f32_to_f16(value);
      ASSERT_GT(back & 0x7fffu, 0x7c00u) << bits;
      ASSERT_EQ(back & 0x8000u, bits & 0x8000u) << bits;
      continue;
    }
    if ((bits & 0x7fffu) == 0x7c00u) {
      ASSERT_EQ(value, bits == 0x7c00u ? kInf : -kInf);
    } else {
      ASSERT_EQ(value, f16_value(bits)) << bits;
      ASSERT_EQ(std::signbit(value), (bits & 0x8000u) != 0) << bits;
    }
    ASSERT_EQ(f32_to_f16(value), half);
  }
}

/// Between each two neighbours: the middle goes to the even one, anything else to the nearer one.
TEST(Half, EveryTieAndItsNeighboursRoundToNearestEven) {
  for (std::uint32_t low = 0; low < 0x7c00u; ++low) {
    const std::uint32_t high = low + 1;  // 0x7c00, infinity, stands for 2^16 here
    const double middle = 0.5 * (f16_value(low) + f16_value(high));
    const auto tie = static_cast<float>(middle);
    ASSERT_EQ(tie, middle) << "f32 holds every middle";
    const std::uint32_t even = (low & 1u) == 0 ? low : high;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      ASSERT_EQ(f32_to_f16(s * tie), sign | even) << low;
      ASSERT_EQ(f32_to_f16(s * std::nextafter(tie, 0.0f)), sign | low) << low;
      ASSERT_EQ(f32_to_f16(s * std::nextafter(tie, kInf)), sign | high) << low;
    }
  }
}

TEST(Half, F32ToF16Extremes) {
  EXPECT_EQ(f32_to_f16(kInf), 0x7c00u);
  EXPECT_EQ(f32_to_f16(-kInf), 0xfc00u);
  EXPECT_EQ(f32_to_f16(3e38f), 0x7c00u);
  EXPECT_EQ(f32_to_f16(-0.0f), 0x8000u);
  EXPECT_EQ(f32_to_f16(1e-45f), 0u);
  EXPECT_EQ(f32_to_f16(-1e-45f), 0x8000u);
  // A NaN whose payload lies below the bits of f16.
  EXPECT_GT(f32_to_f16(std::bit_cast<float>(0x7f800001u)) & 0x7fffu, 0x7c00u);
  EXPECT_GT(f32_to_f16(std::bit_cast<float>(0xffffffffu)) & 0x7fffu, 0x7c00u);
}

TEST(Half, Bf16) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = bf16_to_f32(half);
    ASSERT_EQ(bits_of(value), bits << 16);
    const std::uint16_t back = f32_to_bf16(value);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(bf16_to_f32(back))) << bits;
      continue;
    }
    ASSERT_EQ(back, half);
    if (std::isinf(value)) continue;
    const std::uint32_t even = bits + (bits & 1u);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x7fffu)), bits);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x8000u)), even);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x8001u)), bits + 1);
  }
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

// ---- names

TEST(Types, SizesAndNames) {
  const std::pair<DType, std::pair<const char*, std::size_t>> want[] = {
      {DType::F32, {"f32", 4}}, {DType::F16, {"f16", 2}}, {DType::BF16, {"bf16", 2}},
      {DType::F64, {"f64", 8}}, {DType::I32, {"i32", 4}}, {DType::I64, {"i64", 8}},
      {DType::U8, {"u8", 1}},   {DType::U16, {"u16", 2}}, {DType::Bool, {"bool", 1}},
  };
  for (const auto& [dtype, facts] : want) {
    EXPECT_STREQ(moesaic::name_of(dtype), facts.first);
    EXPECT_EQ(size_of(dtype), facts.second) << facts.first;
  }
}

TEST(Types, Describe) {
  EXPECT_EQ(describe(ConstTensorView(nullptr, DType::F32, {4, 2048})), "f32[4, 2048]");
  EXPECT_EQ(describe(ConstTensorView(nullptr, DType::I32, {7})), "i32[7]");
  EXPECT_EQ(describe(ConstTensorView{}), "f32[]");
}

TEST(Types, Devices) {
  for (const Device device : {Device{DeviceType::Cpu, 0}, Device{DeviceType::Cuda, 0},
                              Device{DeviceType::Cuda, 12}, Device{DeviceType::Metal, 0}}) {
    EXPECT_EQ(parse_device(to_string(device)), device);
  }
  EXPECT_EQ(to_string({DeviceType::Cuda, 1}), "cuda:1");
  EXPECT_EQ(parse_device("cuda"), (Device{DeviceType::Cuda, 0}));
  for (const char* text : {"", "gpu", "CPU", "cuda:", "cuda:x", "cuda:1x", "cuda:-1", "cuda: 1",
                           "cuda:99999999999", "cpu:0"}) {
    EXPECT_THROW(parse_device(text), ConfigError) << text;
  }
}

}  // namespace
}  // namespace moesaic
