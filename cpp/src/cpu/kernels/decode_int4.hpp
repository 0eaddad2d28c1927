#pragma once

/// The decoder of INT4 groups (int4/int4_format.hpp): nibbles as in Q4_0, a scale per scale group
/// of up to 256 columns and, where the stack has any, zero points: value = scale * code - scale *
/// zero.

#include "cpu/kernels/decode_block32.hpp"
#include "cpu/kernels/records.hpp"
#include "int4/int4_format.hpp"

namespace moesaic::cpu {
namespace {

using moesaic::int4::Int4Layout, moesaic::int4::int4_record_bytes, moesaic::int4::int4_scales_at,
    moesaic::int4::int4_zeros_at, moesaic::int4::kInt4StepCols;

/// A record together with what the position of its scales depends on.
struct Int4Record : Record {
  Int4Layout layout;
};

template <bool kZeros>
struct int4 : Block32 {
  static constexpr QuantType kType = QuantType::INT4;
  static constexpr bool kAdd = kZeros;
  static constexpr int kOffset = kZeros ? kNoOffset : 3;  // without zero points: code - 8
  static constexpr bool kWide = false;

  /// `record` is an Int4Record. Each stored scale serves all steps of its scale group.
  static MOESAIC_ALWAYS_INLINE void scales(const Record& record, Scales scale, Scales add) {
    const Int4Layout& layout = static_cast<const Int4Record&>(record).layout;
    const std::uint8_t* s = record.p + int4_scales_at(record.steps);
    const std::uint8_t* z = record.p + int4_zeros_at(layout, record.steps);
    const int steps_per_scale = layout.scale_cols / kInt4StepCols;
    for (int first = 0; first < record.steps; first += steps_per_scale) {
      const int last =
          first + steps_per_scale < record.steps ? first + steps_per_scale : record.steps;
      for_lanes([&](int row) __attribute__((always_inline)) {
        const F v = layout.scale_f32 ? load_f32(s + 4 * row) : load_f16(s + 2 * row);
        for (int step = first; step < last; ++step) store_f(scale[step] + row, v);
        if constexpr (kZeros) {
          const F minus = sub(set_f(0.0F), mul(v, load_u8(z + row)));
          for (int step = first; step < last; ++step) store_f(add[step] + row, minus);
        }
      });
      s += kRows * (layout.scale_f32 ? 4 : 2);
      z += kRows;
    }
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    nibbles(r.p + base * kNibbleStep + lane, w);
  }

 private:
  static MOESAIC_ALWAYS_INLINE F load_f32(const std::uint8_t* p) {
    float values[kLanes];
    std::memcpy(values, p, sizeof values);
    return load_f(values);
  }
};

/// over_records of an INT4 panel.
template <bool kZeros, class Loop>
MOESAIC_ALWAYS_INLINE void over_int4_records(const PanelTask& task, const Loop& loop) {
  const Int4Layout layout{task.scale_cols, task.scale_f32, kZeros};
  const std::int64_t bytes = int4_record_bytes(layout, 8);
  loop([&](std::int64_t index, int steps) __attribute__((always_inline)) {
    Int4Record record{{task.weights + index * bytes, steps, false}, layout};
    look_ahead(task, bytes, index, record);
    return record;
  });
}

}  // namespace
}  // namespace moesaic::cpu
