#pragma once

/// P4, a packed INT4 layout for GPUs: units of 16 rows x 64 k in 512 bytes, whose 16-byte pieces
/// are the A fragments of mma.m16n8k16 and of wgmma alike. Host code only, with its exact inverse.
/// The CUDA backend packs its units with code of its own (cuda/formats); their nibbles lie as here.

#include <cstdint>
#include <vector>

#include "moesaic/marlin_stack.hpp"

namespace moesaic::int4 {

inline constexpr std::int64_t kP4Rows = 16;
inline constexpr std::int64_t kP4Cols = 64;
inline constexpr std::int64_t kP4UnitBytes = kP4Rows * kP4Cols / 2;

/// One expert. Rows are padded to 16 and k to 64, with code 8 (or the zero point, where there is
/// one) and scale 0. Rows [gate | up] are interleaved by 8 when asked: rows 0 .. 7 of a unit are
/// gate rows 8j .. 8j + 7 and rows 8 .. 15 the up rows of the same numbers, so that both halves of
/// an activation meet in one thread.
///
/// `bytes` holds, for each row block of 16 rows, its chunks one behind the other:
///
///   chunk    128 k when the group size is 128, else 64 k
///     units         [k / 64][512 bytes]
///     scales        [groups of the chunk][16]   f16 or f32
///     zero points   [groups of the chunk][16]   u8, if there are any
///
/// Scales and zero points are in row order 0, 8, 1, 9, .., 7, 15, so that the four lanes 4g .. 4g +
/// 3 read those of rows g and g + 8 as one word. When the layer has one group, scales and zero
/// points lie in side tables [row blocks][16] instead.
struct P4Matrix {
  std::int64_t k = 0, n = 0, group_size = 0, groups = 0;
  std::int64_t packed_rows = 0, packed_cols = 0;
  std::int64_t row_block_bytes = 0;
  bool interleaved = false, scale_f32 = false, asymmetric = false;
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint8_t> side_scales, side_zeros;
  std::vector<std::int32_t> perm;   ///< [K] with act-order: x'[i] = x[perm[i]]; else empty
  std::vector<std::int32_t> g_idx;  ///< [K], or empty
};

/// Errors: UnsupportedError for a group size other than 32, 64, 128 or K, for a g_idx whose groups
/// are not of one size, and for interleaving 2I columns where I is not a multiple of 8.
P4Matrix to_p4(const Int4Matrix& matrix, bool interleave_gate_up);
/// The exact inverse of to_p4.
Int4Matrix from_p4(const P4Matrix& matrix);

}  // namespace moesaic::int4
