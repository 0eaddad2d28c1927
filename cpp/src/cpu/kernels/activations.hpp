#pragma once

/// The activations of a bundle of T tokens, as the kernels read them (one broadcast after another).
///
/// For each record of up to 256 columns (n blocks of 32):
///   int8  q       [8n][T][planes][4]   4 columns of a token; plane 0 is the high one when there
///   are two f32   scale   [n][T] i32   negsum  [n][T]               minus the sum of the block's
///   integers (hi * 256 + lo) f32   sum     [n][T] i32   negsum16[2n][T], f32 sum16[2n][T]   the
///   same of 16 columns
/// For the f32 formats: f32 [cols][T].
/// Internal linkage: each instruction set compiles its own copy.

#include <cstdint>

namespace moesaic::cpu {
namespace {

constexpr int kActBlock = 32;  // columns that share a scale

/// Bytes of one block of one token.
[[maybe_unused]] constexpr std::int64_t act_block_bytes(int planes) { return 32 * planes + 28; }

/// Bytes of one token of a bundle.
[[maybe_unused]] constexpr std::int64_t act_token_bytes(std::int64_t cols, int planes) {
  return planes == 0 ? cols * 4 : cols / kActBlock * act_block_bytes(planes);
}

/// Pointers into one record of a bundle.
struct ActRecord {
  const std::int32_t* q;
  const float* scale;
  const std::int32_t* negsum;
  const float* sum;
  const std::int32_t* negsum16;
  const float* sum16;
};

[[maybe_unused]] inline ActRecord act_record(const std::uint8_t* bundle, int tokens, int planes,
                                             std::int64_t record, int blocks) {
  const std::uint8_t* base = bundle + record * 8 * act_block_bytes(planes) * tokens;
  const std::int64_t step = std::int64_t{blocks} * tokens;
  ActRecord a;
  a.q = reinterpret_cast<const std::int32_t*>(base);
  a.scale = reinterpret_cast<const float*>(base + step * 32 * planes);
  a.negsum = reinterpret_cast<const std::int32_t*>(a.scale + step);
  a.sum = reinterpret_cast<const float*>(a.negsum + step);
  a.negsum16 = reinterpret_cast<const std::int32_t*>(a.sum + step);
  a.sum16 = reinterpret_cast<const float*>(a.negsum16 + 2 * step);
  return a;
}

}  // namespace
}  // namespace moesaic::cpu
