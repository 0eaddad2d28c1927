#include "cpu/ops/convert.hpp"

#include <bit>
#include <cstring>

namespace moesaic::cpu {
namespace {

/// All ones if `condition`: selections by mask vectorise in the baseline instruction set.
inline std::uint32_t mask(bool condition) { return condition ? ~0U : 0U; }
inline std::uint32_t select(std::uint32_t m, std::uint32_t a, std::uint32_t b) {
  return (m & a) | (~m & b);
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16;
  const std::uint32_t magnitude = half & 0x7fffU;
  const std::uint32_t normal = (magnitude << 13) + (112U << 23);
  const std::uint32_t special = normal + (112U << 23);  // infinity and NaN
  // A subnormal is m * 2^-24, the last bits of 0.5f.
  const auto subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(0x3f000000U | magnitude) - 0.5F);
  // Signed comparisons: the baseline has no unsigned ones.
  const auto m = static_cast<std::int32_t>(magnitude);
  const std::uint32_t value =
      select(mask(m < 0x400), subnormal, select(mask(m >= 0x7c00), special, normal));
  return std::bit_cast<float>(sign | value);
}

inline std::uint16_t float_to_half(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const auto m = static_cast<std::int32_t>(magnitude);
  const std::uint32_t nan = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
  const std::uint32_t small =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3f000000U;
  const std::uint32_t normal = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
  std::uint32_t half = select(mask(m < 0x38800000), small, normal);
  half = select(mask(m >= 0x47800000), 0x7c00U, half);
  half = select(mask(m > 0x7f800000), nan, half);
  return static_cast<std::uint16_t>(sign | half);
}

inline float brain_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

inline std::uint16_t float_to_brain(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto magnitude = static_cast<std::int32_t>(bits & 0x7fffffffU);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<std::uint16_t>(
      select(mask(magnitude > 0x7f800000), (bits >> 16) | 0x40U, rounded));
}

template <class From, class To, To (*Convert)(From)>
void convert(const From* __restrict from, std::int64_t count, To* __restrict to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = Convert(from[i]);
}

}  // namespace

void to_f32(const void* data, DType dtype, std::int64_t offset, std::int64_t count, float* out) {
  const auto* const words = static_cast<const std::uint16_t*>(data) + offset;
  if (dtype == DType::F16) {
    convert<std::uint16_t, float, half_to_float>(words, count, out);
  } else if (dtype == DType::BF16) {
    convert<std::uint16_t, float, brain_to_float>(words, count, out);
  } else if (count > 0) {
    std::memcpy(out, static_cast<const float*>(data) + offset,
                static_cast<std::size_t>(count) * sizeof(float));
  }
}

void from_f32(const float* values, std::int64_t count, DType dtype, void* data,
              std::int64_t offset) {
  auto* const words = static_cast<std::uint16_t*>(data) + offset;
  if (dtype == DType::F16) {
    convert<float, std::uint16_t, float_to_half>(values, count, words);
  } else if (dtype == DType::BF16) {
    convert<float, std::uint16_t, float_to_brain>(values, count, words);
  } else if (count > 0) {
    std::memcpy(static_cast<float*>(data) + offset, values,
                static_cast<std::size_t>(count) * sizeof(float));
  }
}

}  // namespace moesaic::cpu
