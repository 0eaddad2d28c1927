#pragma once

/// Values of GGUF metadata: type facts and checked conversions.

#include <cstdint>
#include <span>
#include <string_view>

#include "moesaic/gguf.hpp"

namespace moesaic::gguf {

/// Bytes of one value; 0 for strings and arrays.
std::uint64_t scalar_bytes(GgufType type);

/// Null when absent.
const GgufEntry* find_entry(std::span<const GgufEntry> entries, std::string_view key);
/// Throws FormatError unless the value is an integer that fits.
std::int64_t integer_of(const GgufEntry& entry);

}  // namespace moesaic::gguf
