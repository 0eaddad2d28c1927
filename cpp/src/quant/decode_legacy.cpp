#include "quant/block.hpp"
#include "quant/decode.hpp"

namespace moesaic::quant {
namespace {

// 16 bytes hold 32 codes: the low nibbles are weights 0..15, the high nibbles 16..31. In the 5-bit
// types bit i of a 32-bit word is the fifth bit of weight i.

/// Calls `put(i, code)` for 32 codes of 4 bits.
template <class Put>
inline void unpack4(const std::uint8_t* nibbles, Put&& put) {
  for (int i = 0; i < 16; ++i) {
    put(i, nibbles[i] & 15);
    put(i + 16, nibbles[i] >> 4);
  }
}

/// Calls `put(i, code)` for 32 codes of 5 bits.
template <class Put>
inline void unpack5(const std::uint8_t* nibbles, std::uint32_t high_bits, Put&& put) {
  unpack4(nibbles,
          [&](int i, int low) { put(i, low | static_cast<int>((high_bits >> i & 1u) << 4)); });
}

}  // namespace

// f16 d@0, u8 codes[16]@2
void decode_q4_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 18>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    unpack4(b + 2, [&](int i, int q) { y[i] = d * static_cast<float>(q - 8); });
  });
}

// f16 d@0, f16 m@2, u8 codes[16]@4
void decode_q4_1(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 20>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    const float m = load_f16(b + 2);
    unpack4(b + 4, [&](int i, int q) { y[i] = d * static_cast<float>(q) + m; });
  });
}

// f16 d@0, u32 high bits@2, u8 codes[16]@6
void decode_q5_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 22>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    unpack5(b + 6, load_u32(b + 2), [&](int i, int q) { y[i] = d * static_cast<float>(q - 16); });
  });
}

// f16 d@0, f16 m@2, u32 high bits@4, u8 codes[16]@8
void decode_q5_1(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 24>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    const float m = load_f16(b + 2);
    unpack5(b + 8, load_u32(b + 4), [&](int i, int q) { y[i] = d * static_cast<float>(q) + m; });
  });
}

// f16 d@0, i8 codes[32]@2
void decode_q8_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 34>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(static_cast<std::int8_t>(b[2 + i]));
  });
}

}  // namespace moesaic::quant
