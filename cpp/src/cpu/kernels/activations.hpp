#pragma once

/// The activations of a bundle of T tokens, in the order in which the kernels broadcast them.
///
/// The integer formats: record after record of up to 256 columns, that is n <= 8 steps of 32. A
/// record holds these arrays, one behind the other:
///
///   q         int8  [8n][T][planes][4]   4 columns of a token; with two planes the high one first
///   scale     f32   [n][T]               of the step's integers
///   negsum    i32   [n][T]               minus the sum of the step's integers (256 * high + low)
///   sum       f32   [n][T]               that sum itself
///   negsum16  i32   [2n][T]              minus the sum of each 16 columns
///   sum16     f32   [2n][T]              that sum itself
///
/// Where the kernels multiply by tiles (gemm_tile.hpp), a row of a tile is a plane of a token, the
/// order is another one, and negative sums are not written:
///
///   q         int8  [n][T][planes][32]   with two planes the high one first
///   scale, sum [T][n], sum16 [T][2n]     at the same places
///
/// The f32 formats: f32 [cols][T].
///
/// The sums are there because weights are stored unsigned: a kernel starts its accumulator at
/// negsum * offset, and multiplies minima by sum, instead of subtracting from every weight.
///
/// Everything here has internal linkage: each instruction set compiles its own copy.

#include <cstdint>

namespace moesaic::cpu {
namespace {

constexpr int kActBlock = 32;  // columns that share an activation scale: one step

/// Bytes of one step of one token: 32 * planes integers and 28 bytes of scale and sums.
[[maybe_unused]] constexpr std::int64_t act_block_bytes(int planes) { return 32 * planes + 28; }

/// Bytes of one token of a bundle; planes 0 means f32.
[[maybe_unused]] constexpr std::int64_t act_token_bytes(std::int64_t cols, int planes) {
  return planes == 0 ? cols * 4 : cols / kActBlock * act_block_bytes(planes);
}

/// Where the arrays of one record of a bundle start.
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
