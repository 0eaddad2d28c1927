#include "cuda/formats/pack.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda/formats/blocks.hpp"
#include "cuda/formats/pack_int4.hpp"
#include "cuda/formats/units.hpp"

namespace moesaic::cuda {
namespace {

static_assert(static_cast<int>(QuantType::INT4) == kInt4Type);

std::uint8_t* bytes_of(std::byte* p) { return reinterpret_cast<std::uint8_t*>(p); }
const std::uint8_t* bytes_of(const std::byte* p) {
  return reinterpret_cast<const std::uint8_t*>(p);
}

/// Kernels count pairs of bytes in 32 bits (codes.cuh).
constexpr std::int64_t kMostBytes = std::int64_t{1} << 33;

/// Where a row of a role lies: its row block, and which of the 16 rows of a unit it is.
struct PackedRow {
  std::int64_t block;
  int unit_row;
};
PackedRow packed_row(UnitHalf half, std::int64_t row) {
  if (half == UnitHalf::Alone) return {row / kUnitRows, static_cast<int>(row % kUnitRows)};
  constexpr int kHalf = kUnitRows / 2;
  return {row / kHalf, static_cast<int>(row % kHalf) + (half == UnitHalf::Second ? kHalf : 0)};
}

/// Calls visit(byte of the row's block, pieces in that block, byte of the scale block, bytes) for
/// each scale value of a row that is row `unit_row` of its units.
template <class Visit>
void for_each_scale(const BlockBits& bits, int unit_row, std::int64_t cols, const Visit& visit) {
  const ScaleLayout& scale = find_format(static_cast<std::int32_t>(bits.type))->scale;
  // Where value i of the `count` values of this row lies among those of all 16 rows: ordered by g,
  // then by i, then row g before row g + 8.
  const auto value_index = [unit_row](int count, std::int64_t i) {
    return (unit_row % 8 * count + i) * 2 + unit_row / 8;
  };
  const std::int64_t blocks = cols / bits.elems;
  const auto values = static_cast<std::int64_t>(bits.values.size());
  for (std::int64_t i = 0; i < blocks * values; ++i) {
    const std::int64_t unit = i / scale.unit_values;
    visit(i / values * bits.bytes, bits.values[static_cast<std::size_t>(i % values)],
          unit / scale.span_units * scale.span_bytes() +
              scale.unit_at(static_cast<int>(unit % scale.span_units)) +
              value_index(scale.unit_values, i % scale.unit_values) * scale.value_bytes,
          scale.value_bytes);
  }
  for (std::int64_t i = 0; i < blocks * scale.span_halves; ++i) {
    const std::int64_t block = i / scale.span_halves, half = i % scale.span_halves;
    const auto at = static_cast<std::uint8_t>(bits.halves_at + 2 * half);
    const auto next = static_cast<std::uint8_t>(at + 1);
    visit(block * bits.bytes, Pieces{{{at, 0, 8, 0}, {next, 0, 8, 8}}},
          block * scale.span_bytes() + value_index(scale.span_halves, half) * 2, 2);
  }
}

/// Codes and scales of rows as a file has them: one of the two sources that pack_rows takes.
class FileRows {
 public:
  explicit FileRows(const WeightRef& role) : bits_(*find_block_bits(role.type)), cols_(role.cols) {}

  void codes(const WeightRef& role, std::int32_t expert, std::int64_t row, std::int64_t unit,
             std::uint32_t* to) const {
    const std::int64_t first = unit * kUnitCols;
    read_codes(bits_, bytes_of(role.expert(expert) + row * role.row_stride), first,
               static_cast<int>(std::min<std::int64_t>(kUnitCols, cols_ - first)), to);
  }
  void scales(const WeightRef& role, std::int32_t expert, std::int64_t row, int unit_row,
              std::uint8_t* block) const {
    const std::uint8_t* from = bytes_of(role.expert(expert) + row * role.row_stride);
    for_each_scale(bits_, unit_row, cols_,
                   [&](std::int64_t at, const Pieces& pieces, std::int64_t to, int bytes) {
                     const std::uint32_t value = read_bits(pieces, from + at);
                     std::memcpy(block + to, &value, static_cast<std::size_t>(bytes));
                   });
  }

 private:
  const BlockBits& bits_;
  std::int64_t cols_;
};

/// Packs one expert from `rows`, which is FileRows or Int4Rows.
template <class Rows>
void pack_rows(const Rows& rows, const WeightRef& source, const WeightRef* other,
               const PackedLayout& layout, std::int32_t expert, std::uint8_t* out) {
  const UnitMap& map = UnitMap::of(source.type);
  for (std::int64_t block = 0; block < layout.row_blocks; ++block) {
    // Calls fill(role, row, unit_row) for each row of the block that is there.
    const auto each_row = [&](const auto& fill) {
      for (int unit_row = 0; unit_row < kUnitRows; ++unit_row) {
        const bool second = other != nullptr && unit_row >= kUnitRows / 2;
        const std::int64_t row = other == nullptr ? block * kUnitRows + unit_row
                                                  : block * (kUnitRows / 2) + unit_row % 8;
        if (row < source.rows) fill(second ? *other : source, row, unit_row);
      }
    };
    std::uint8_t* unit_bytes = out + block * layout.code_block_bytes;
    for (std::int64_t unit = 0; unit < layout.units; ++unit, unit_bytes += layout.unit_bytes) {
      Codes codes = {};
      each_row([&](const WeightRef& role, std::int64_t row, int unit_row) {
        rows.codes(role, expert, row, unit, codes + unit_row * kUnitCols);
      });
      map.write(codes, unit_bytes);
    }
    std::uint8_t* scales = out + layout.scales_at + block * layout.scale_block_bytes;
    each_row([&](const WeightRef& role, std::int64_t row, int unit_row) {
      rows.scales(role, expert, row, unit_row, scales);
    });
  }
}

}  // namespace

PackedFacts packed_facts(const WeightRef& weight, UnitHalf half) {
  const bool int4 = weight.type == QuantType::INT4;
  return {.type = static_cast<std::int32_t>(weight.type),
          .half = half,
          .rows = weight.rows,
          .cols = int4 ? weight.int4.packed_cols : weight.cols,
          .scale_cols = weight.int4.scale_cols,
          .scale_f32 = weight.int4.scale_f32,
          .zeros = weight.int4.zeros};
}

std::string_view pack_refusal(const WeightRef& source) {
  const bool known = source.type == QuantType::INT4 ||
                     find_format(static_cast<std::int32_t>(source.type)) != nullptr;
  if (known && packed_layout(packed_facts(source, UnitHalf::First)).expert_bytes >= kMostBytes) {
    return "experts of 8 GiB and more are not packed";
  }
  if (source.type == QuantType::INT4) {
    return source.layout == WeightLayout::Panels ? "" : "INT4 is packed from panels";
  }
  if (find_format(static_cast<std::int32_t>(source.type)) == nullptr) {
    return "no CUDA decoder for this type";
  }
  return source.layout == WeightLayout::Rows ? "" : "only rows as in a file can be packed";
}

bool can_share_units(const WeightRef& gate, const WeightRef& up) {
  const Int4Format &g = gate.int4, &u = up.int4;
  return gate.type == up.type && gate.rows == up.rows && gate.cols == up.cols &&
         gate.num_experts == up.num_experts && g.packed_cols == u.packed_cols &&
         g.scale_cols == u.scale_cols && g.scale_f32 == u.scale_f32 && g.zeros == u.zeros &&
         g.gather == u.gather && g.gather_stride == u.gather_stride;
}

WeightRef packed_ref(const WeightRef& source, UnitHalf half) {
  const PackedLayout layout = packed_layout(packed_facts(source, half));
  WeightRef ref = source;
  ref.base = nullptr;
  ref.table = nullptr;
  ref.slot_map = nullptr;
  ref.layout = WeightLayout::CudaUnits;
  ref.half = half;
  ref.expert_stride = layout.expert_bytes;
  ref.row_stride = layout.code_block_bytes;
  return ref;
}

void pack_expert(const WeightRef& source, const WeightRef* other, std::int32_t expert,
                 std::byte* out) {
  const UnitHalf half = other == nullptr ? UnitHalf::Alone : UnitHalf::First;
  const PackedLayout layout = packed_layout(packed_facts(source, half));
  std::fill_n(out + layout.scales_at, layout.expert_bytes - layout.scales_at, std::byte{0});
  if (source.type == QuantType::INT4) {
    pack_rows(Int4Rows(source), source, other, layout, expert, bytes_of(out));
  } else {
    pack_rows(FileRows(source), source, other, layout, expert, bytes_of(out));
  }
}

void unpack_row_bytes(const WeightRef& packed, const std::byte* expert, std::int64_t row,
                      std::byte* out) {
  const PackedLayout layout = packed_layout(packed_facts(packed, packed.half));
  const PackedRow at = packed_row(packed.half, row);
  const BlockBits& bits = *find_block_bits(packed.type);
  std::fill_n(out, row_bytes(packed.type, packed.cols), std::byte{0});
  const std::uint8_t* unit = bytes_of(expert) + at.block * layout.code_block_bytes;
  for (std::int64_t col = 0; col < packed.cols; col += kUnitCols, unit += layout.unit_bytes) {
    Codes codes;
    UnitMap::of(packed.type).read(unit, codes);
    write_codes(bits, codes + at.unit_row * kUnitCols, col,
                static_cast<int>(std::min<std::int64_t>(kUnitCols, packed.cols - col)),
                bytes_of(out));
  }
  const std::uint8_t* scales =
      bytes_of(expert) + layout.scales_at + at.block * layout.scale_block_bytes;
  for_each_scale(bits, at.unit_row, packed.cols,
                 [&](std::int64_t block, const Pieces& pieces, std::int64_t from, int bytes) {
                   std::uint32_t value = 0;
                   std::memcpy(&value, scales + from, static_cast<std::size_t>(bytes));
                   write_bits(pieces, value, bytes_of(out) + block);
                 });
}

void unpack_row(const WeightRef& packed, const std::byte* expert, std::int64_t row, float* out,
                std::int32_t index) {
  if (packed.type != QuantType::INT4) {
    std::vector<std::byte> blocks(static_cast<std::size_t>(row_bytes(packed.type, packed.cols)));
    unpack_row_bytes(packed, expert, row, blocks.data());
    dequantize_row(packed.type, blocks.data(), out, packed.cols);
    return;
  }
  const PackedLayout layout = packed_layout(packed_facts(packed, packed.half));
  const PackedRow at = packed_row(packed.half, row);
  const std::uint8_t* unit = bytes_of(expert) + at.block * layout.code_block_bytes;
  const std::uint8_t* scales =
      bytes_of(expert) + layout.scales_at + at.block * layout.scale_block_bytes;
  const std::int32_t* gather = packed.int4.gather_of(index);
  for (std::int64_t first = 0; first < packed.int4.packed_cols;
       first += kUnitCols, unit += layout.unit_bytes) {
    Codes codes;
    UnitMap::of(packed.type).read(unit, codes);
    const std::int64_t end = std::min(first + kUnitCols, packed.int4.packed_cols);
    for (std::int64_t i = first; i < end; ++i) {
      const std::int64_t col = gather != nullptr ? gather[i] : i;
      if (col < 0 || col >= packed.cols) continue;
      const std::uint32_t code = codes[at.unit_row * kUnitCols + (i - first)];
      out[col] = read_int4_value(packed.int4, layout, scales, at.unit_row, i, code);
    }
  }
}

}  // namespace moesaic::cuda
