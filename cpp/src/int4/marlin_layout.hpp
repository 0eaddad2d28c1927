#pragma once

/// The Marlin layout, which the kernels of IST-DASLab and of vLLM both take: tiles of 16 k x 64 n,
/// permuted so that a lane's tensor-core fragment is one 16-byte load. Host code only; every
/// function has its inverse.

#include <array>
#include <cstdint>
#include <vector>

#include "moesaic/marlin_stack.hpp"

namespace moesaic::int4 {

inline constexpr std::int64_t kMarlinTileK = 16;
inline constexpr std::int64_t kMarlinTileN = 64;

/// The permutation within 1024 codes (16 k x 64 n, as four tiles of 16 x 16): packed[i] =
/// tiles[perm[i]].
const std::array<std::int32_t, 1024>& marlin_weight_perm();
/// The permutation of scales, packed[i] = plain[perm[i]]: within 64 columns when the layer has
/// several groups (`grouped`), within 32 when it has one.
std::vector<std::int32_t> marlin_scale_perm(bool grouped);

/// One expert for a Marlin kernel. With act-order, rows of the codes are sorted by group and the
/// kernel's caller gathers activations: x'[i] = x[perm[i]].
struct MarlinMatrix {
  std::int64_t k = 0, n = 0, group_size = 0, groups = 0;
  std::vector<std::uint32_t> qweight;  ///< [K/16, 2N]
  std::vector<float> scales;           ///< [groups, N], permuted
  /// [groups, N/8], permuted and interleaved; empty when every zero point is 8.
  std::vector<std::uint32_t> qzeros;
  std::vector<std::int32_t> perm;   ///< [K], or empty
  std::vector<std::int32_t> g_idx;  ///< [K], or empty
};

/// Errors: UnsupportedError for K not a multiple of 16, N not a multiple of 64, a zero point of 16
/// (a nibble cannot hold it), and for a g_idx whose groups are not of one size.
MarlinMatrix to_marlin(const Int4Matrix& matrix);
/// The exact inverse of to_marlin.
Int4Matrix from_marlin(const MarlinMatrix& matrix);

/// Codes [K, N] to words [K/16, 2N], and back.
std::vector<std::uint32_t> pack_marlin_codes(const std::vector<std::uint8_t>& codes, std::int64_t k,
                                             std::int64_t n);
std::vector<std::uint8_t> unpack_marlin_codes(const std::vector<std::uint32_t>& words,
                                              std::int64_t k, std::int64_t n);
/// Zero points [groups, N] to words [groups, N/8] in the layout of the vLLM kernel, and back.
std::vector<std::uint32_t> pack_marlin_zeros(const std::vector<std::uint8_t>& zeros,
                                             std::int64_t groups, std::int64_t n);
std::vector<std::uint8_t> unpack_marlin_zeros(const std::vector<std::uint32_t>& words,
                                              std::int64_t groups, std::int64_t n);

}  // namespace moesaic::int4
