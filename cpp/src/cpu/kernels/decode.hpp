#pragma once

/// What a decoder is. The decoder of an integer format is a struct, named as in kernels.inc, with
///
///   kType     its QuantType
///   kSub      columns of a scale group: 16 or 32
///   kAdd      whether each scale group has a constant to add (value = scale * integer + add)
///   kOffset   log2 of what is subtracted from the stored unsigned integers, or kNoOffset
///   kWide     whether stored integers exceed 127
///   kFused    whether unpacking is so cheap that few tokens do it in registers
///   scales(record, scale, add)           writes the f32 scales (and constants) of all scale
///                                        groups, for 16 rows each
/// If kFused:
///   kPeriod   after how many steps the unpacking repeats
///   weights<S>(record, base, lane, w)    gives the 8 vectors of step base + S
/// Otherwise:
///   decode(record, lane, q)              writes all 8 steps of a full record, one vector per 64
///                                        bytes of q
///
/// A vector covers kLanes of the 16 rows; `lane` is the byte where its rows begin in the 64 bytes
/// of 16 rows x 4 columns. Include this file after simd.hpp.

#include <cstdint>
#include <cstring>

#include "cpu/kernels/panel_format.hpp"

namespace moesaic::cpu {
namespace {

constexpr int kNoOffset = -1;
/// kOffset of weights that fill 8 bits: a signed dot product takes them as they are, an unsigned
/// one takes them + 128.
constexpr int kByteOffset = kSignedDot ? kNoOffset : 7;
constexpr int kVector = 64;         // bytes: 16 rows x 4 columns
constexpr int kStep = 8 * kVector;  // 32 columns, one byte each
constexpr int kNibbleStep = kStep / 2;

/// Memory whose loads are started while a record is worked on: `bytes` of it with each step.
struct Ahead {
  const std::uint8_t* from = nullptr;
  int bytes = 0;
};

/// One record of a panel (panel_format.hpp).
struct Record {
  const std::uint8_t* p;
  int steps;  // of 32 columns: 8, or fewer in the last record of a panel
  bool odd;   // whether its number in the panel is odd
  Ahead ahead{};

  // For formats whose records are an odd number of half cache lines (PanelFormat::alternate): their
  // odd records hold the last field in front, so that the others start on a line.

  /// Where the fields before the last one start.
  const std::uint8_t* fields() const { return p + (odd ? 32 : 0); }
  /// Where the last field starts, when the others take `bytes`.
  const std::uint8_t* last_field(int bytes) const { return odd ? p : p + bytes; }
};

/// A record decoded to one byte per weight, which more than a few tokens share. It stays in the
/// first cache while all bundles of a task are multiplied with it.
struct alignas(64) DecodedRecord {
  std::uint8_t q[8 * kStep];  // [k4][16 rows][4]
  float scale[16][kRows];     // by scale group
  float add[16][kRows];
};

using Scales = float (*)[kRows];

template <class D>
concept IntegerDecoder = requires { D::kSub; };

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
