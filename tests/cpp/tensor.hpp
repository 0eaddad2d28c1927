#pragma once

/// Arrays for calls under test: tensors of any float type, poisoned results, guarded memory.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "moesaic/quant.hpp"
#include "moesaic/types.hpp"
#include "random.hpp"

namespace moesaic::testing {

/// What results hold before a call, so that a value that nobody wrote is seen.
inline constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

inline Floats poisoned(std::int64_t count) {
  return Floats(static_cast<std::size_t>(count), kPoison);
}

/// A view of dense f32 rows.
inline ConstTensorView rows_of(const Floats& values, std::int64_t cols) {
  return {values.data(), DType::F32, {static_cast<std::int64_t>(values.size()) / cols, cols}};
}
inline TensorView rows_of(Floats& values, std::int64_t cols) {
  return {values.data(), DType::F32, {static_cast<std::int64_t>(values.size()) / cols, cols}};
}

/// Elements of any float type, poisoned or from f32.
struct Tensor {
  DType dtype;
  std::int64_t rows, cols;
  std::vector<std::byte> bytes;

  Tensor(DType type, std::int64_t r, std::int64_t c)
      : dtype(type), rows(r), cols(c), bytes(static_cast<std::size_t>(r * c) * size_of(type)) {
    std::fill(bytes.begin(), bytes.end(), std::byte{0xFF});  // NaN in every float type
  }
  Tensor(DType type, std::int64_t r, std::int64_t c, const Floats& values) : Tensor(type, r, c) {
    for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void set(std::size_t i, float value) {
    if (dtype == DType::F32) {
      std::memcpy(bytes.data() + i * 4, &value, 4);
      return;
    }
    const std::uint16_t bits = dtype == DType::F16 ? f32_to_f16(value) : f32_to_bf16(value);
    std::memcpy(bytes.data() + i * 2, &bits, 2);
  }
  float get(std::size_t i) const {
    if (dtype == DType::F32) {
      float value;
      std::memcpy(&value, bytes.data() + i * 4, 4);
      return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + i * 2, 2);
    return dtype == DType::F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
  }
  Floats values() const {
    Floats out(static_cast<std::size_t>(rows * cols));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = get(i);
    return out;
  }
  /// The bytes of one row.
  std::vector<std::byte> row(std::int64_t r) const {
    const auto size = cols * static_cast<std::int64_t>(size_of(dtype));
    return {bytes.begin() + r * size, bytes.begin() + (r + 1) * size};
  }
  TensorView view() { return {bytes.data(), dtype, {rows, cols}}; }
  ConstTensorView view() const { return {bytes.data(), dtype, {rows, cols}}; }
  /// A view of `count` rows from `first` on.
  TensorView slice(std::int64_t first, std::int64_t count) {
    return {bytes.data() + first * cols * static_cast<std::int64_t>(size_of(dtype)),
            dtype,
            {count, cols}};
  }
};

/// Poisoned memory, aligned to 64 bytes, between guard bytes.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes) : bytes_(bytes), memory_(bytes + 3 * kGuard, kUnused) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    data_ = memory_.data() + (2 * kGuard - address % kGuard);
    std::fill(data_, data_ + bytes_, std::byte{0xFF});  // NaN, should anyone read it first
  }
  std::byte* data() { return data_; }
  bool guard_untouched() const {
    const auto unused = [](std::byte b) { return b == kUnused; };
    return std::all_of(data_ - kGuard, data_, unused) &&
           std::all_of(data_ + bytes_, data_ + bytes_ + kGuard, unused);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr std::byte kUnused{0xA5};
  std::size_t bytes_;
  std::vector<std::byte> memory_;
  std::byte* data_;
};

}  // namespace moesaic::testing
