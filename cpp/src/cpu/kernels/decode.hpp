#pragma once

/// What a decoder is. A format's decoder is a struct named as in kernels.inc with
///   kType    its QuantType
///   kSub     columns that share a scale: 16 or 32
///   kAdd     whether a constant is added per sub-block (minima: value = scale * integer + add)
///   kOffset  log2 of what is subtracted from the stored unsigned integers, or kNoOffset
///   kWide    whether stored integers exceed 127
///   kFused   whether unpacking is so cheap that few tokens do it in registers
///   scales(record, scale, add)            the f32 row vectors of all sub-blocks
/// and, if fused,
///   kPeriod  after how many steps of 32 columns the unpacking repeats
///   weights<S>(record, base, lane, w)     the 8 vectors of step base + S, rows from byte `lane`
/// else
///   decode(record, lane, q)               all steps of a full record, a vector per 64 bytes of q
/// Include after simd.hpp.

#include <cstdint>
#include <cstring>

#include "cpu/kernels/panel_format.hpp"

namespace moesaic::cpu {
namespace {

constexpr int kNoOffset = -1;
/// Of weights that fill 8 bits: they stay signed where the dot product is signed.
constexpr int kByteOffset = kSignedDot ? kNoOffset : 7;
constexpr int kVector = 64;         // bytes: 16 rows x 4 columns
constexpr int kStep = 8 * kVector;  // 32 columns, one byte each
constexpr int kNibbleStep = kStep / 2;

/// Bytes to start loading while working on something else: `bytes` for each step of 32 columns.
struct Ahead {
  const std::uint8_t* from = nullptr;
  int bytes = 0;
};

/// One record of a panel (panel_format.hpp).
struct Record {
  const std::uint8_t* p;
  int steps;  // of 32 columns
  bool odd;
  Ahead ahead{};

  // Of formats that alternate: odd records hold their last field in front.
  /// The fields before the last, which are on lines.
  const std::uint8_t* fields() const { return p + (odd ? 32 : 0); }
  /// The last field, behind `bytes` of others.
  const std::uint8_t* last_field(int bytes) const { return odd ? p : p + bytes; }
};

/// A decoded record: the loop's other input besides activations.
struct alignas(64) DecodedRecord {
  std::uint8_t q[8 * kStep];  // [k4][16 rows][4]
  float scale[16][kRows];     // by sub-block
  float add[16][kRows];
};

using Scales = float (*)[kRows];

/// fn(row) for each vector of rows.
template <class Fn>
MOESAIC_ALWAYS_INLINE void for_lanes(Fn fn) {
  for (int row = 0; row < kRows; row += kLanes) fn(row);
}

template <int S>
struct Step {
  static constexpr int value = S;
};
/// fn(Step<0>) .. fn(Step<N - 1>)
template <int N, int S = 0, class Fn>
MOESAIC_ALWAYS_INLINE void unroll(const Fn& fn) {
  if constexpr (S < N) {
    fn(Step<S>{});
    unroll<N, S + 1>(fn);
  }
}

}  // namespace
}  // namespace moesaic::cpu
