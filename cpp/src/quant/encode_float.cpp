#include <cstring>

#include "quant/block.hpp"
#include "quant/encode.hpp"

namespace moesaic::quant {

void encode_f32(const float* values, const float*, std::byte* blocks, std::int64_t elems) {
  if (elems > 0) std::memcpy(blocks, values, static_cast<std::size_t>(elems) * sizeof(float));
}

void encode_f16(const float* values, const float* importance, std::byte* blocks,
                std::int64_t elems) {
  for_each_block<1, 2>(
      values, importance, blocks, elems,
      [](const float* x, const float*, std::uint8_t* b) { store_u16(b, f32_to_f16(*x)); });
}

void encode_bf16(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<1, 2>(
      values, importance, blocks, elems,
      [](const float* x, const float*, std::uint8_t* b) { store_u16(b, f32_to_bf16(*x)); });
}

}  // namespace moesaic::quant
