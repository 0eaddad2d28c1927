#pragma once

/// Vectors with C++ operators (a GCC and clang extension) that hold one 32-bit machine word, or 4
/// bytes, of each of kLanes rows: for unpacking that the named operations of simd.hpp do not cover.
/// Include after simd.hpp.

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
/// Loads 16 bits of each row, which lie side by side, into words.
MOESAIC_ALWAYS_INLINE LaneWords load_halves(const std::uint8_t* p) {
  std::uint16_t __attribute__((vector_size(2 * kLanes))) h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, LaneWords);
}
MOESAIC_ALWAYS_INLINE V to_vector(LaneWords w) { return __builtin_bit_cast(V, w); }
MOESAIC_ALWAYS_INLINE LaneBytes to_bytes(const V& v) { return __builtin_bit_cast(LaneBytes, v); }
MOESAIC_ALWAYS_INLINE V from_bytes(LaneBytes b) { return __builtin_bit_cast(V, b); }
/// Words must be below 2^31, because the conversion takes them as signed.
MOESAIC_ALWAYS_INLINE F to_float(LaneWords w) { return to_float(__builtin_bit_cast(I, w)); }

}  // namespace
}  // namespace moesaic::cpu
