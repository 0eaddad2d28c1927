#include "moesaic/types.hpp"

#include <bit>
#include <charconv>
#include <string_view>
#include <system_error>

#include "moesaic/error.hpp"

namespace moesaic {
namespace {

/// First and one-past-last byte that a view touches.
struct Extent {
  const std::byte* begin;
  const std::byte* end;
};
Extent extent_of(const ConstTensorView& view) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  std::int64_t low = 0, high = 0;
  for (int i = 0; i < view.rank; ++i) {
    const std::int64_t reach = (view.dim(i) - 1) * view.stride(i);
    (reach < 0 ? low : high) += reach;
  }
  const auto* data = static_cast<const std::byte*>(view.data);
  return {data + low * size, data + (high + 1) * size};
}

}  // namespace

std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::F16:
    case DType::BF16:
    case DType::U16:
      return 2;
    case DType::U8:
    case DType::Bool:
      return 1;
  }
  return 0;
}

std::string to_string(Device device) {
  std::string text = name_of(device.type);
  if (device.type == DeviceType::Cuda) text += ":" + std::to_string(device.index);
  return text;
}

Device parse_device(const std::string& text) {
  if (const auto type = find_name<DeviceType>(text)) return {*type, 0};
  constexpr std::string_view prefix = "cuda:";
  int index = -1;
  if (text.starts_with(prefix)) {
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + prefix.size(), end, index);
    if (error != std::errc{} || stop != end) index = -1;
  }
  require<ConfigError>(index >= 0, [&] {
    return Problem{"parse_device", "device", "\"cpu\", \"cuda\", \"cuda:<index>\" or \"metal\"",
                   '"' + text + '"', ""};
  });
  return {DeviceType::Cuda, index};
}

bool overlap(const ConstTensorView& a, const ConstTensorView& b) {
  if (a.data == nullptr || b.data == nullptr || a.empty() || b.empty()) return false;
  const Extent first = extent_of(a), second = extent_of(b);
  return first.begin < second.end && second.begin < first.end;
}

std::string describe(const ConstTensorView& view) {
  std::string text = name_of(view.dtype);
  text += '[';
  for (int i = 0; i < view.rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(view.dim(i));
  }
  text += ']';
  return text;
}

// f16 is 1 sign, 5 exponent (bias 15) and 10 mantissa bits; f32 is 1, 8 (bias 127) and 23. The
// exponents differ by 112 and the mantissas by 13 bits.

float f16_to_f32(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide = exponent == 0x1f ? 0xffu : exponent + 112u;
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

std::uint16_t f32_to_f16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN, made quiet so that the payload cannot become infinity
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14, the smallest normal f16
    // One unit in the last place of 0.5f is the smallest subnormal f16: the addition rounds.
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(rounded) - std::bit_cast<std::uint32_t>(0.5f);
  } else {  // a carry out of the mantissa moves the exponent, up to infinity
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    half = (magnitude - (112u << 23)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

float bf16_to_f32(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t f32_to_bf16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN, made quiet
    return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  }
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace moesaic
