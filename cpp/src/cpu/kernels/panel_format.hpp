#pragma once

/// How the bytes of 16 rows lie in a panel. Bits are those of the file, only moved.
///
/// A panel is a sequence of records of up to 256 columns. A record holds each field of the file's
/// quant block for all 16 rows:
///
///   record     field 0 | field 1 | ..
///   field      quant block 0 | quant block 1 | ..      (one, where a block has 256 columns)
///   block      chunk 0 | chunk 1 | ..                  the field's bytes, `chunk` at a time
///   chunk      row 0, row 1, .. row 15                 4 bytes each: a vector of 64 bytes
///
/// Records whose size is an odd number of half cache lines are marked `alternate`: the last field
/// (32 bytes) comes first in their odd records, so that the other fields always start on a line.
///
/// Everything here has internal linkage: each instruction set compiles its own copy.

#include <cstdint>
#include <cstring>

#include "moesaic/quant.hpp"

namespace moesaic::cpu {
namespace {

constexpr int kRows = 16;         // rows of a panel
constexpr int kRecordCols = 256;  // columns of a full record

struct Field {
  int offset;  // in the file's quant block
  int bytes;
  int chunk;
};

struct PanelFormat {
  QuantType type;
  int block_elems;
  int block_bytes;
  int num_fields;
  Field fields[4];
  bool alternate = false;
};

constexpr PanelFormat kPanelFormats[] = {
    {QuantType::F32, 1, 4, 1, {{0, 4, 4}}},
    {QuantType::F16, 1, 2, 1, {{0, 2, 2}}},
    {QuantType::BF16, 1, 2, 1, {{0, 2, 2}}},
    {QuantType::Q4_0, 32, 18, 2, {{2, 16, 4}, {0, 2, 2}}},
    {QuantType::Q4_1, 32, 20, 3, {{4, 16, 4}, {0, 2, 2}, {2, 2, 2}}},
    {QuantType::Q5_0, 32, 22, 3, {{6, 16, 4}, {2, 4, 4}, {0, 2, 2}}},
    {QuantType::Q5_1, 32, 24, 4, {{8, 16, 4}, {4, 4, 4}, {0, 2, 2}, {2, 2, 2}}},
    {QuantType::Q8_0, 32, 34, 2, {{2, 32, 4}, {0, 2, 2}}},
    {QuantType::Q2_K, 256, 84, 4, {{16, 64, 4}, {0, 16, 1}, {80, 2, 2}, {82, 2, 2}}},
    {QuantType::Q3_K, 256, 110, 4, {{0, 32, 4}, {32, 64, 4}, {96, 12, 4}, {108, 2, 2}}, true},
    {QuantType::Q4_K, 256, 144, 4, {{16, 128, 4}, {4, 12, 1}, {0, 2, 2}, {2, 2, 2}}},
    {QuantType::Q5_K, 256, 176, 4, {{48, 128, 4}, {16, 32, 4}, {4, 12, 1}, {0, 4, 2}}},
    {QuantType::Q6_K, 256, 210, 4, {{0, 128, 4}, {128, 64, 4}, {192, 16, 1}, {208, 2, 2}}, true},
    {QuantType::IQ4_NL, 32, 18, 2, {{2, 16, 4}, {0, 2, 2}}},
    {QuantType::IQ4_XS, 256, 136, 4, {{8, 128, 4}, {4, 4, 4}, {2, 2, 2}, {0, 2, 2}}},
    {QuantType::MXFP4, 32, 17, 2, {{1, 16, 4}, {0, 1, 1}}},
    {QuantType::NVFP4, 64, 36, 2, {{4, 32, 4}, {0, 4, 4}}},
    {QuantType::IQ2_XXS, 256, 66, 2, {{2, 64, 4}, {0, 2, 2}}, true},
    {QuantType::IQ2_XS, 256, 74, 2, {{2, 72, 4}, {0, 2, 2}}, true},
    {QuantType::IQ2_S, 256, 82, 2, {{2, 80, 4}, {0, 2, 2}}, true},
    {QuantType::IQ3_XXS, 256, 98, 2, {{2, 96, 4}, {0, 2, 2}}, true},
    {QuantType::IQ3_S, 256, 110, 2, {{2, 108, 4}, {0, 2, 2}}, true},
    {QuantType::IQ1_S, 256, 50, 2, {{2, 48, 4}, {0, 2, 2}}, true},
    {QuantType::IQ1_M, 256, 56, 1, {{0, 56, 4}}},
    {QuantType::TQ1_0, 256, 54, 2, {{0, 52, 4}, {52, 2, 2}}, true},
    {QuantType::TQ2_0, 256, 66, 2, {{0, 64, 4}, {64, 2, 2}}, true},
    {QuantType::Q1_0, 128, 18, 2, {{2, 16, 4}, {0, 2, 2}}},
    {QuantType::Q2_0, 64, 18, 2, {{2, 16, 4}, {0, 2, 2}}},
    {QuantType::E4M3, 128, 132, 2, {{4, 128, 2}, {0, 4, 4}}},
};

/// Null for types that are not weight formats.
[[maybe_unused]] constexpr const PanelFormat* find_panel_format(QuantType type) {
  for (const PanelFormat& format : kPanelFormats) {
    if (format.type == type) return &format;
  }
  return nullptr;
}

/// Quant blocks per row in record `record` of a row of `cols`.
[[maybe_unused]] constexpr int record_blocks(const PanelFormat& format, std::int64_t cols,
                                             std::int64_t record) {
  const std::int64_t left = cols - record * kRecordCols;
  return static_cast<int>((left < kRecordCols ? left : kRecordCols) / format.block_elems);
}

/// Bytes of a full record; record r of a panel starts at r times this.
[[maybe_unused]] constexpr std::int64_t record_bytes(const PanelFormat& format) {
  return std::int64_t{kRows} * format.block_bytes * (kRecordCols / format.block_elems);
}

/// Bytes from one panel to the next: whole cache lines.
[[maybe_unused]] constexpr std::int64_t panel_bytes(const PanelFormat& format, std::int64_t cols) {
  return (kRows * format.block_bytes * (cols / format.block_elems) + 63) / 64 * 64;
}

/// Where field `f` starts, in bytes from the start of record `record`, which has `blocks` blocks.
[[maybe_unused]] constexpr std::int64_t field_start(const PanelFormat& format, int f, int blocks,
                                                    std::int64_t record) {
  const int last = format.num_fields - 1;
  const bool last_first = format.alternate && record % 2 != 0;
  if (last_first && f == last) return 0;
  std::int64_t start = last_first ? kRows * blocks * format.fields[last].bytes : 0;
  for (int i = 0; i < f; ++i) start += kRows * blocks * format.fields[i].bytes;
  return start;
}

template <int kChunk>
inline void interleave_field(const std::uint8_t* const* blocks_of_row, std::int64_t block_bytes,
                             int blocks, const Field& field, std::uint8_t* out) {
  const std::int64_t chunk = kChunk != 0 ? kChunk : field.chunk;
  for (int b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * block_bytes + field.offset;
    for (std::int64_t c = begin; c < begin + field.bytes; c += chunk) {
      for (int row = 0; row < kRows; ++row, out += chunk) {
        std::memcpy(out, blocks_of_row[row] + c, static_cast<std::size_t>(chunk));
      }
    }
  }
}

/// Writes one record from `blocks` blocks of each of the 16 rows.
[[maybe_unused]] inline void interleave_record(const PanelFormat& format,
                                               const std::uint8_t* const* blocks_of_row, int blocks,
                                               std::int64_t record, std::uint8_t* out) {
  for (int f = 0; f < format.num_fields; ++f) {
    const Field& field = format.fields[f];
    std::uint8_t* to = out + field_start(format, f, blocks, record);
    switch (field.chunk) {
      case 1:
        interleave_field<1>(blocks_of_row, format.block_bytes, blocks, field, to);
        break;
      case 2:
        interleave_field<2>(blocks_of_row, format.block_bytes, blocks, field, to);
        break;
      case 4:
        interleave_field<4>(blocks_of_row, format.block_bytes, blocks, field, to);
        break;
      default:
        interleave_field<0>(blocks_of_row, format.block_bytes, blocks, field, to);
    }
  }
}

}  // namespace
}  // namespace moesaic::cpu
