#pragma once

/// Vectors of plain C++ operators, for unpacking that the named operations of simd.hpp do not
/// cover: one 32-bit word, or 4 bytes, of each row. Include after simd.hpp.

#include <cstdint>
#include <cstring>

namespace moesaic::cpu {
namespace {

using LaneWords = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using LaneBytes = std::uint8_t __attribute__((vector_size(4 * kLanes)));

MOESAIC_ALWAYS_INLINE LaneWords load_words(const std::uint8_t* p) {
  LaneWords w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
/// 16 bits of each row, the rows side by side.
MOESAIC_ALWAYS_INLINE LaneWords load_halves(const std::uint8_t* p) {
  std::uint16_t __attribute__((vector_size(2 * kLanes))) h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, LaneWords);
}
MOESAIC_ALWAYS_INLINE V to_vector(LaneWords w) { return __builtin_bit_cast(V, w); }
MOESAIC_ALWAYS_INLINE LaneBytes to_bytes(const V& v) { return __builtin_bit_cast(LaneBytes, v); }
MOESAIC_ALWAYS_INLINE V from_bytes(LaneBytes b) { return __builtin_bit_cast(V, b); }
/// Of words below 2^31.
MOESAIC_ALWAYS_INLINE F to_float(LaneWords w) { return to_float(__builtin_bit_cast(I, w)); }

}  // namespace
}  // namespace moesaic::cpu
