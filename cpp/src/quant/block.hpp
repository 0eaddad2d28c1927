#pragma once

/// Reading and writing the fields of a quant block, and the loop over the blocks of a row. Blocks
/// have no alignment, so wider fields are put together from bytes, of which the compiler makes one
/// load.

#include <cstddef>
#include <cstdint>

#include "moesaic/types.hpp"

namespace moesaic::quant {

inline std::uint16_t load_u16(const std::uint8_t* p) {
  return static_cast<std::uint16_t>(p[0] | p[1] << 8);
}
inline std::uint32_t load_u32(const std::uint8_t* p) {
  return load_u16(p) | static_cast<std::uint32_t>(load_u16(p + 2)) << 16;
}
inline float load_f16(const std::uint8_t* p) { return f16_to_f32(load_u16(p)); }

inline void store_u16(std::uint8_t* p, std::uint16_t value) {
  p[0] = static_cast<std::uint8_t>(value);
  p[1] = static_cast<std::uint8_t>(value >> 8);
}

/// Calls `decode(block, y)` for each block of a row.
template <int kElems, int kBytes, class Decode>
inline void for_each_block(const std::byte* blocks, float* out, std::int64_t elems,
                           Decode&& decode) {
  const auto* block = reinterpret_cast<const std::uint8_t*>(blocks);
  for (std::int64_t i = 0; i < elems; i += kElems, block += kBytes) decode(block, out + i);
}

/// Calls `encode(x, importance, block)` for each block of a row; without importance it gets null.
template <int kElems, int kBytes, class Encode>
inline void for_each_block(const float* values, const float* importance, std::byte* blocks,
                           std::int64_t elems, Encode&& encode) {
  auto* block = reinterpret_cast<std::uint8_t*>(blocks);
  for (std::int64_t i = 0; i < elems; i += kElems, block += kBytes) {
    encode(values + i, importance != nullptr ? importance + i : nullptr, block);
  }
}

}  // namespace moesaic::quant
