#pragma once

/// Rows of one type encoded and decoded, for tests.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "moesaic/quant.hpp"

namespace moesaic::testing {

/// What lies behind a row, which nothing may write over.
inline constexpr float kBehindRow = 12345.678f;

inline std::string type_name(QuantType type) { return std::string(traits(type).name); }

inline std::vector<std::byte> encoded(QuantType type, const std::vector<float>& values) {
  const auto cols = static_cast<std::int64_t>(values.size());
  std::vector<std::byte> row(static_cast<std::size_t>(row_bytes(type, cols)), std::byte{0xa5});
  quantize_row(type, values.data(), row.data(), cols);
  return row;
}

inline std::vector<float> decoded(QuantType type, const std::vector<std::byte>& row,
                                  std::int64_t cols) {
  std::vector<float> out(static_cast<std::size_t>(cols) + 1, kBehindRow);
  dequantize_row(type, row.data(), out.data(), cols);
  EXPECT_EQ(out.back(), kBehindRow) << "wrote past the row";
  out.pop_back();
  return out;
}

inline std::vector<float> round_trip(QuantType type, const std::vector<float>& values) {
  return decoded(type, encoded(type, values), static_cast<std::int64_t>(values.size()));
}

inline std::vector<QuantType> types_with_encoder() {
  std::vector<QuantType> types;
  for (const QuantTraits& t : quant_table()) {
    if (has_encoder(t.type)) types.push_back(t.type);
  }
  return types;
}

}  // namespace moesaic::testing
