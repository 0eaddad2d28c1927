#pragma once

/// Encoded weights that come in as bytes: whether they are numbers.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "moesaic/quant.hpp"

namespace moesaic::weights {

/// Kernels take E4M3's two codes of NaN for numbers, so they are refused where weights come in.
/// Throws ConfigError that names the first one's row and column, `cols` of which are a row. Other
/// types have no such codes.
void check_codes(const char* operation, const std::string& what, QuantType type,
                 std::span<const std::byte> rows, std::int64_t cols);

}  // namespace moesaic::weights
