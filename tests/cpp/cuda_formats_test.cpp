// Units of the CUDA kernels: packed and read back bit for bit, in the layout that layout.h
// promises.

#include <gtest/gtest.h>

#include <bit>

#include "cuda/formats/pack.hpp"
#include "cuda/formats/units.hpp"
#include "int4_role.hpp"

namespace moesaic::testing {
namespace {

using namespace moesaic::cuda;

std::vector<QuantType> packed_types() {
  std::vector<QuantType> types;
  for (const FormatRow& row : kFormats) types.push_back(static_cast<QuantType>(row.type));
  return types;
}

/// A role of random bytes: every bit pattern, NaN scales included.
TestRole random_bytes_role(QuantType type, std::int64_t rows, std::int64_t cols,
                           std::uint32_t seed) {
  TestRole role = make_role(2, rows, cols, type, seed, false);
  Random random(seed);
  for (std::byte& b : *role.bytes) b = random.byte();
  return role;
}

/// A pack with guard bytes behind it.
std::vector<std::byte> packed_expert(const WeightRef& source, const WeightRef* other,
                                     const WeightRef& packed, std::int32_t expert) {
  constexpr std::size_t kGuard = 256;
  const auto bytes = static_cast<std::size_t>(packed.expert_stride);
  std::vector<std::byte> memory(bytes + kGuard, std::byte{0xA5});
  pack_expert(source, other, expert, memory.data());
  EXPECT_TRUE(std::all_of(memory.begin() + packed.expert_stride, memory.end(),
                          [](std::byte b) { return b == std::byte{0xA5}; }));
  memory.resize(bytes);
  return memory;
}

void expect_same_bytes(const WeightRef& source, const WeightRef& packed, std::int32_t e,
                       const std::vector<std::byte>& expert) {
  const auto bytes = static_cast<std::size_t>(row_bytes(source.type, source.cols));
  std::vector<std::byte> row(bytes);
  for (std::int64_t r = 0; r < source.rows; ++r) {
    std::fill(row.begin(), row.end(), std::byte{0xFF});
    unpack_row_bytes(packed, expert.data(), r, row.data());
    ASSERT_EQ(std::memcmp(row.data(), source.expert(e) + r * source.row_stride, bytes), 0)
        << traits(source.type).name << " row " << r;
  }
}

void expect_same_values(const WeightRef& source, const WeightRef& packed, std::int32_t e,
                        const std::vector<std::byte>& expert) {
  const auto cols = static_cast<std::size_t>(source.cols);
  Floats want(cols), got(cols);
  for (std::int64_t r = 0; r < source.rows; ++r) {
    std::fill(got.begin(), got.end(), kPoison);
    dequantize_expert_row(source, e, r, want.data());
    unpack_row(packed, expert.data(), r, got.data(), e);
    ASSERT_EQ(std::memcmp(want.data(), got.data(), cols * sizeof(float)), 0)
        << traits(source.type).name << " row " << r;
  }
}

struct Shape {
  std::int64_t rows, blocks;
};

TEST(CudaFormats, EveryTypeComesBackBitForBit) {
  for (const QuantType type : packed_types()) {
    for (const Shape shape : {Shape{16, 2}, Shape{1, 1}, Shape{37, 3}}) {
      const std::int64_t cols = shape.blocks * std::max(8, traits(type).block_elems);
      const TestRole role = random_bytes_role(type, shape.rows, cols, 3);
      const WeightRef packed = packed_ref(role.weights.ref, UnitHalf::Alone);
      EXPECT_EQ(packed.expert_stride % 128, 0);
      for (std::int32_t e = 0; e < 2; ++e) {
        const auto expert = packed_expert(role.weights.ref, nullptr, packed, e);
        expect_same_bytes(role.weights.ref, packed, e, expert);
        expect_same_values(role.weights.ref, packed, e, expert);
      }
    }
  }
}

TEST(CudaFormats, GateAndUpShareUnits) {
  for (const QuantType type : packed_types()) {
    const std::int64_t cols = traits(type).block_elems == 1 ? 72 : 2 * traits(type).block_elems;
    const TestRole gate = random_bytes_role(type, 21, cols, 4);
    const TestRole up = random_bytes_role(type, 21, cols, 5);
    ASSERT_TRUE(can_share_units(gate.weights.ref, up.weights.ref));
    const WeightRef first = packed_ref(gate.weights.ref, UnitHalf::First);
    const WeightRef second = packed_ref(up.weights.ref, UnitHalf::Second);
    EXPECT_EQ(first.expert_stride, second.expert_stride);
    const auto expert = packed_expert(gate.weights.ref, &up.weights.ref, first, 1);
    expect_same_bytes(gate.weights.ref, first, 1, expert);
    expect_same_bytes(up.weights.ref, second, 1, expert);
  }
}

TEST(CudaFormats, Int4ComesBackBitForBit) {
  for (const Int4Recipe& recipe :
       std::vector<Int4Recipe>{{},
                               {.group_size = 32, .zeros = true},
                               {.group_size = 64, .scale_f32 = true},
                               {.group_size = 128, .zeros = true, .scale_f32 = true},
                               {.group_size = -1},
                               {.group_size = -1, .zeros = true},
                               {.group_size = 32, .scale_f32 = true, .order = Int4Recipe::Shared},
                               {.group_size = 64, .zeros = true, .order = Int4Recipe::PerExpert},
                               {.group_size = 40, .zeros = true}}) {
    for (const std::int64_t cols : {256, 416, 72}) {
      const TestRole role = make_int4_role(2, 24, cols, recipe, 6, false);
      const TestRole other = make_int4_role(2, 24, cols, recipe, 6, false);
      const WeightRef& source = role.weights.ref;
      ASSERT_EQ(pack_refusal(source), "");
      const WeightRef alone = packed_ref(source, UnitHalf::Alone);
      const WeightRef first = packed_ref(source, UnitHalf::First);
      const WeightRef second = packed_ref(other.weights.ref, UnitHalf::Second);
      for (std::int32_t e = 0; e < 2; ++e) {
        expect_same_values(source, alone, e, packed_expert(source, nullptr, alone, e));
        const auto both = packed_expert(source, &other.weights.ref, first, e);
        expect_same_values(source, first, e, both);
        expect_same_values(other.weights.ref, second, e, both);
      }
    }
  }
}

TEST(CudaFormats, NibblesLieAsTheFragmentsOfAnMma) {
  // Straight from the PTX definition of the A fragment of m16n8k16: register r of lane 4 g + t
  // holds row g + 8 (r & 1), and of the columns the pair that register r >> 1 of B has in x: a lane
  // reads those of two steps as 8 elements side by side.
  const UnitMap& map = UnitMap::of(QuantType::Q4_K);
  for (int g = 0; g < 8; ++g) {
    for (int t = 0; t < 4; ++t) {
      for (int s = 0; s < 4; ++s) {
        for (int r = 0; r < 4; ++r) {
          for (int h = 0; h < 2; ++h) {
            const int row = g + 8 * (r & 1);
            const int col = 32 * (s / 2) + 8 * t + 4 * (s % 2) + 2 * (r >> 1) + h;
            cuda::Codes codes = {};
            codes[row * kUnitCols + col] = 15;
            std::vector<std::uint32_t> unit(128);
            map.write(codes, reinterpret_cast<std::uint8_t*>(unit.data()));
            // The first nibble stands where the mantissa of a bf16 wants it.
            EXPECT_EQ(unit[static_cast<std::size_t>((4 * g + t) * 4 + s)],
                      std::rotl(15U, 3 + 4 * (r + 4 * h)));
          }
        }
      }
    }
  }
}

TEST(CudaFormats, EveryBitOfAUnitHasOneUse) {
  for (const FormatRow& row : kFormats) {
    const UnitMap& map = UnitMap::of(static_cast<QuantType>(row.type));
    ASSERT_EQ(map.words(), row.unit_bytes / 4) << row.name;
    for (int w = 0; w < map.words(); ++w) {
      std::uint32_t used = 0;
      for (const CodeBits* p = map.begin(w); p != map.end(w); ++p) {
        EXPECT_EQ(used & p->mask << p->bit, 0U) << row.name;
        used |= p->mask << p->bit;
      }
      EXPECT_EQ(used, ~0U) << row.name << " word " << w;
    }
  }
}

TEST(CudaFormats, PackedSizeStaysNearTheFile) {
  const auto bits = [](QuantType type, std::int64_t cols) {
    const PackedLayout layout = packed_layout({.type = static_cast<std::int32_t>(type),
                                               .half = UnitHalf::Alone,
                                               .rows = 64,
                                               .cols = cols,
                                               .scale_cols = 128,
                                               .scale_f32 = false,
                                               .zeros = false});
    return 8.0 * static_cast<double>(layout.expert_bytes) / static_cast<double>(64 * cols);
  };
  EXPECT_DOUBLE_EQ(bits(QuantType::Q4_K, 2048), 4.625);
  EXPECT_DOUBLE_EQ(bits(QuantType::Q6_K, 2048), 6.5625);
  EXPECT_DOUBLE_EQ(bits(QuantType::Q8_0, 2048), 8.5);
  EXPECT_DOUBLE_EQ(bits(QuantType::MXFP4, 2880), 4.25);
  EXPECT_DOUBLE_EQ(bits(QuantType::INT4, 2048), 4.125);
}

TEST(CudaFormats, RefusalsSayWhy) {
  TestRole role = make_role(1, 16, 256, QuantType::Q4_K, 1, false);
  WeightRef ref = role.weights.ref;
  EXPECT_EQ(pack_refusal(ref), "");
  ref.layout = WeightLayout::Panels;
  EXPECT_NE(pack_refusal(ref), "");
  ref = role.weights.ref;
  ref.type = QuantType::IQ2_XS;
  EXPECT_NE(pack_refusal(ref), "");
  const TestRole up = make_role(1, 16, 256, QuantType::Q5_K, 1, false);
  EXPECT_FALSE(can_share_units(role.weights.ref, up.weights.ref));
}

}  // namespace
}  // namespace moesaic::testing
