#pragma once

/// What follows a product: y = (W x) * scale[e] + bias[e], in place on the f32 rows that a kernel
/// gave.

#include <cstdint>

#include "moesaic/operands.hpp"

namespace moesaic::cpu {

class Epilogue {
 public:
  Epilogue(const RoleRef& weight, std::int32_t expert)
      : scaled_(weight.scale != nullptr),
        scale_(scaled_ ? weight.scale[expert] : 1.0F),
        bias_(weight.bias != nullptr ? weight.bias + expert * weight.ref.rows : nullptr) {}

  /// Finishes the products of rows [row, row + rows) of the expert.
  void apply(std::int64_t row, int rows, float* values) const {
    if (scaled_) {
      for (int i = 0; i < rows; ++i) values[i] *= scale_;
    }
    if (bias_ != nullptr) {
      for (int i = 0; i < rows; ++i) values[i] += bias_[row + i];
    }
  }

 private:
  bool scaled_;
  float scale_;
  const float* bias_;
};

}  // namespace moesaic::cpu
