#include <bit>
#include <cstring>

#include "quant/block.hpp"
#include "quant/decode.hpp"

namespace moesaic::quant {

void decode_f32(const std::byte* blocks, float* out, std::int64_t elems) {
  if (elems > 0) std::memcpy(out, blocks, static_cast<std::size_t>(elems) * sizeof(float));
}

void decode_f16(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<1, 2>(blocks, out, elems,
                       [](const std::uint8_t* b, float* y) { *y = load_f16(b); });
}

void decode_bf16(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<1, 2>(blocks, out, elems,
                       [](const std::uint8_t* b, float* y) { *y = bf16_to_f32(load_u16(b)); });
}

void decode_f64(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<1, 8>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const std::uint64_t bits = load_u32(b) | static_cast<std::uint64_t>(load_u32(b + 4)) << 32;
    *y = static_cast<float>(std::bit_cast<double>(bits));
  });
}

}  // namespace moesaic::quant
