#pragma once

/// Values of GGUF metadata: facts of their types, and checked conversions.

#include <cstdint>
#include <span>
#include <string_view>

#include "moesaic/gguf.hpp"

namespace moesaic::gguf {

/// Bytes of one value of a type; 0 for strings and arrays, whose size varies.
std::uint64_t scalar_bytes(GgufType type);

/// The entry of a key; null when absent.
const GgufEntry* find_entry(std::span<const GgufEntry> entries, std::string_view key);
/// The value as an integer. Throws FormatError unless it is one that fits.
std::int64_t integer_of(const GgufEntry& entry);

}  // namespace moesaic::gguf
