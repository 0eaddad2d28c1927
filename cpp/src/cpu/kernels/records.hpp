#pragma once

/// The records of a panel, as the loops of the integer formats walk them: where each one lies, what
/// is loaded meanwhile, and decoding a whole one. Include after simd.hpp.

#include "cpu/kernels/decode.hpp"
#include "cpu/kernels/kernel.hpp"
#include "cpu/kernels/lane_words.hpp"

#define MOESAIC_NOINLINE __attribute__((noinline))

namespace moesaic::cpu {
namespace {

/// Starts the loads of one step's share. All shares at once would wait for free line buffers, and
/// everything behind them would wait too.
MOESAIC_ALWAYS_INLINE void fetch(const Ahead& ahead, int step) {
  const std::uint8_t* from = ahead.from + step * ahead.bytes;
  for (int line = 0; line < ahead.bytes; line += 64) prefetch(from + line);
}

template <int kMinus>
MOESAIC_ALWAYS_INLINE V minus_bytes(const V& v) {
  return from_bytes(to_bytes(v) - static_cast<std::uint8_t>(kMinus));
}

/// Decodes a whole record. Weights are stored unsigned, as D says, or minus 2^kOffset: signed bytes
/// that need no correction by sums of activations.
template <class D, bool kSigned = false>
MOESAIC_NOINLINE void decode_record(const Record& record, DecodedRecord& decoded) {
  constexpr bool kShift = kSigned && D::kOffset != kNoOffset;
  D::scales(record, decoded.scale, decoded.add);
  for_lanes([&](int row) __attribute__((always_inline)) {
    if constexpr (!D::kFused) {
      D::decode(record, row * 4, decoded.q + row * 4);
      if constexpr (kShift) {
        for (int k = 0; k < 8 * record.steps; ++k) {
          std::uint8_t* q = decoded.q + k * kVector + row * 4;
          store(q, minus_bytes<(1 << D::kOffset)>(load(q)));
        }
      }
    } else {
      for (int base = 0; base < record.steps; base += D::kPeriod) {
        unroll<D::kPeriod>([&](auto s) __attribute__((always_inline)) {
          V w[8];
          D::template weights<decltype(s)::value>(record, base, row * 4, w);
          std::uint8_t* q = decoded.q + (base + decltype(s)::value) * kStep + row * 4;
          for (int k = 0; k < 8; ++k) {
            if constexpr (kShift) w[k] = minus_bytes<(1 << D::kOffset)>(w[k]);
            store(q + k * kVector, w[k]);
          }
        });
      }
    }
  });
}

/// Where record `index` of the panel lies. In the row layout its blocks are gathered into
/// `gathered` first, in the order of a panel, so the same code multiplies both.
MOESAIC_ALWAYS_INLINE const std::uint8_t* find_record(const PanelTask& task,
                                                      const PanelFormat& format, std::int64_t index,
                                                      std::uint8_t* gathered) {
  if (!task.rows_layout) return task.weights + index * record_bytes(format);
  const std::uint8_t* rows[kRows];
  for (int row = 0; row < kRows; ++row) {
    const int existing = row < task.rows ? row : task.rows - 1;
    rows[row] = task.weights + existing * task.row_stride +
                index * (kRecordCols / format.block_elems) * format.block_bytes;
  }
  interleave_record(format, rows, record_blocks(format, task.cols, index), index, gathered);
  return gathered;
}

constexpr int kPrefetchRecords = 3;  // how far ahead of the record in work loads are started

/// Tells the record what to load meanwhile: the panel's own later records, and behind its end those
/// of task.next_weights.
MOESAIC_ALWAYS_INLINE void look_ahead(const PanelTask& task, std::int64_t bytes, std::int64_t index,
                                      Record& record) {
  const std::int64_t records = (task.cols + kRecordCols - 1) / kRecordCols;
  const std::int64_t ahead = index + kPrefetchRecords;
  const std::uint8_t* base = ahead < records ? task.weights : task.next_weights;
  if (base == nullptr) return;
  record.ahead = {base + (ahead < records ? ahead : ahead - records) * bytes,
                  static_cast<int>(bytes / 8)};
}

/// loop(record_at), where record_at(index, steps) finds record `index` of the task's panel.
template <class D, class Loop>
MOESAIC_ALWAYS_INLINE void over_records(const PanelTask& task, const Loop& loop) {
  constexpr const PanelFormat& format = *find_panel_format(D::kType);
  constexpr std::int64_t kBytes = record_bytes(format);
  alignas(64) std::uint8_t gathered[kBytes];
  loop([&](std::int64_t index, int steps) __attribute__((always_inline)) {
    Record record{find_record(task, format, index, gathered), steps, index % 2 != 0};
    if (!task.rows_layout) look_ahead(task, kBytes, index, record);
    return record;
  });
}

}  // namespace
}  // namespace moesaic::cpu
