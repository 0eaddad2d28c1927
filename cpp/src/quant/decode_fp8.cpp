#include <bit>

#include "quant/block.hpp"
#include "quant/codebooks.hpp"
#include "quant/decode.hpp"

namespace moesaic::quant {

// f32 d@0, u8 codes[128]@4
void decode_e4m3(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<128, 132>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const auto d = std::bit_cast<float>(load_u32(b));
    for (int i = 0; i < 128; ++i) y[i] = e4m3(b[4 + i]) * d;
  });
}

}  // namespace moesaic::quant
