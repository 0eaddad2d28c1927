#pragma once

/// Element types, devices and non-owning strided views.

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "moesaic/names.hpp"
#include "moesaic/operands.hpp"

namespace moesaic {

std::size_t size_of(DType dtype) noexcept;

enum class DeviceType : std::uint8_t { Cpu, Cuda, Metal };

struct Device {
  DeviceType type = DeviceType::Cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

/// "cpu", "cuda:0", "metal".
std::string to_string(Device device);
/// Inverse of to_string; "cuda" means "cuda:0". Throws ConfigError.
Device parse_device(const std::string& text);

inline constexpr int kMaxRank = 4;

/// Pointer, element type, device, shape and strides in elements. Owns nothing. A stride of 0
/// broadcasts. `T` is `void` or `const void`.
template <class T>
struct BasicTensorView {
  T* data = nullptr;
  DType dtype = DType::F32;
  Device device{};
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  BasicTensorView() = default;
  /// A dense row-major view.
  BasicTensorView(T* pointer, DType type, std::initializer_list<std::int64_t> dims,
                  Device where = {})
      : data(pointer), dtype(type), device(where), rank(static_cast<int>(dims.size())) {
    int i = 0;
    for (auto d : dims) shape[static_cast<std::size_t>(i++)] = d;
    std::int64_t step = 1;
    for (i = rank - 1; i >= 0; --i) {
      strides[static_cast<std::size_t>(i)] = step;
      step *= shape[static_cast<std::size_t>(i)];
    }
  }
  /// A mutable view converts to a read-only one.
  template <class U>
    requires(!std::is_same_v<U, T>)
  BasicTensorView(const BasicTensorView<U>& other)  // NOLINT(google-explicit-constructor)
      : data(other.data),
        dtype(other.dtype),
        device(other.device),
        rank(other.rank),
        shape(other.shape),
        strides(other.strides) {}

  std::int64_t dim(int i) const { return shape[static_cast<std::size_t>(i)]; }
  std::int64_t stride(int i) const { return strides[static_cast<std::size_t>(i)]; }
  std::int64_t num_elements() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dim(i);
    return n;
  }
  bool empty() const { return num_elements() == 0; }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

/// Whether the ranges from the first to the last element of two views share memory.
bool overlap(const ConstTensorView& a, const ConstTensorView& b);

/// "f32[4, 2048]".
std::string describe(const ConstTensorView& view);

/// Float16 and bfloat16 bit patterns, converted with round to nearest even (NaN stays NaN).
float f16_to_f32(std::uint16_t bits) noexcept;
std::uint16_t f32_to_f16(float value) noexcept;
float bf16_to_f32(std::uint16_t bits) noexcept;
std::uint16_t f32_to_bf16(float value) noexcept;

}  // namespace moesaic
