// INT4 group weights: checkpoints in every format are read as they mean, and every layout gives the
// codes back.

#include "int4/marlin_layout.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "gptq_checkpoint.hpp"
#include "int4/columns.hpp"
#include "int4/p4_layout.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic::testing {
namespace {

TEST(Marlin, UnpacksEveryCheckpointFormat) {
  for (const Recipe& r : recipes()) {
    const Checkpoint c = make_checkpoint(r);
    for (std::int32_t e = 0; e < c.experts; ++e) {
      Int4Matrix expected = c.matrices[static_cast<std::size_t>(e)];
      const Int4Matrix got = unpack_gptq(c.tensors(), e);
      EXPECT_EQ(got.codes, expected.codes) << describe_recipe(r);
      EXPECT_EQ(got.g_idx, expected.g_idx) << describe_recipe(r);
      for (std::int64_t k = 0; k < c.k; ++k) {
        ASSERT_EQ(got.value(k, c.n - 1), expected.value(k, c.n - 1)) << describe_recipe(r);
      }
    }
  }
}

TEST(Marlin, StackGivesBackWhatItWasMadeOf) {
  for (const Recipe& r : recipes()) {
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
    EXPECT_EQ(stack.symmetric(), !r.zeros);
    EXPECT_EQ(stack.act_order(), r.order != Order::Plain);
    std::vector<float> row(static_cast<std::size_t>(c.k), kPoison);
    for (std::int32_t e = 0; e < c.experts; ++e) {
      const Int4Matrix& expected = c.matrices[static_cast<std::size_t>(e)];
      EXPECT_EQ(stack.unpack(e), expected) << describe_recipe(r);
      for (const std::int64_t n : {std::int64_t{0}, c.n / 2, c.n - 1}) {
        dequantize_expert_row(stack.weights().ref, e, n, row.data());
        for (std::int64_t k = 0; k < c.k; ++k) {
          ASSERT_EQ(row[static_cast<std::size_t>(k)], expected.value(k, n)) << describe_recipe(r);
        }
      }
    }
  }
}

TEST(Marlin, PartsFillAStackFromAnyColumn) {
  const Checkpoint gate = make_checkpoint({.experts = 2, .k = 64, .n = 24});
  const Checkpoint up = make_checkpoint({.experts = 2, .k = 64, .n = 24}, 2);
  MarlinExpertStack::Builder builder(
      {.num_experts = 2, .k = 64, .n_per_expert = 48, .group_size = 32, .zeros = true});
  for (std::int32_t e = 0; e < 2; ++e) {
    const auto part = [&](const Checkpoint& c) {
      GptqTensors t;
      t.qweight = ConstTensorView(c.qweight.data() + e * 8 * 24, DType::I32, {8, 24});
      t.scales = ConstTensorView(c.half_scales.data() + e * 2 * 24, DType::F16, {2, 24});
      t.qzeros = ConstTensorView(c.qzeros.data() + e * 2 * 3, DType::I32, {2, 3});
      return t;
    };
    builder.add(e, 24, part(up));
    builder.add(e, 0, part(gate));
  }
  const MarlinExpertStack stack = std::move(builder).build();
  const RoleWeights tail = stack.copy_columns(24, 24);
  std::vector<float> row(64), again(64);
  for (std::int32_t e = 0; e < 2; ++e) {
    for (std::int64_t n = 0; n < 48; ++n) {
      const Int4Matrix& m = (n < 24 ? gate : up).matrices[static_cast<std::size_t>(e)];
      dequantize_expert_row(stack.weights().ref, e, n, row.data());
      for (std::int64_t k = 0; k < 64; ++k)
        ASSERT_EQ(row[static_cast<std::size_t>(k)], m.value(k, n % 24));
      if (n < 24) continue;
      dequantize_expert_row(tail.ref, e, n - 24, again.data());
      EXPECT_EQ(row, again);
    }
  }
  MarlinExpertStack::Builder short_one(
      {.num_experts = 1, .k = 64, .n_per_expert = 48, .group_size = 32});
  EXPECT_THROW(std::move(short_one).build(), ShapeError);
}

TEST(Marlin, PermutationsAreTheDocumentedOnes) {
  const auto& perm = int4::marlin_weight_perm();
  const std::vector<std::int32_t> head = {0,   128, 8,   136, 16,  144, 24,  152,
                                          256, 384, 264, 392, 272, 400, 280, 408};
  const std::vector<std::int32_t> tail = {871, 999, 879, 1007, 887, 1015, 895, 1023};
  EXPECT_TRUE(std::equal(head.begin(), head.end(), perm.begin()));
  EXPECT_TRUE(std::equal(tail.begin(), tail.end(), perm.end() - 8));
  EXPECT_EQ(
      int4::marlin_scale_perm(false),
      (std::vector<std::int32_t>{0, 1, 8,  9,  16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
                                 4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31}));
  const auto grouped = int4::marlin_scale_perm(true);
  const std::vector<std::int32_t> start = {0, 8, 16, 24, 32, 40, 48, 56, 1, 9};
  ASSERT_EQ(grouped.size(), 64U);
  EXPECT_TRUE(std::equal(start.begin(), start.end(), grouped.begin()));
}

TEST(Marlin, FirstWordsHoldTheDocumentedPositions) {
  // Each code of a 16 x 64 tile tells four bits of its position; ten runs tell all of it.
  const auto position = [](int word, int nibble) {
    int at = 0;
    for (int bit = 0; bit < 10; bit += 4) {
      std::vector<std::uint8_t> codes(1024);
      for (int i = 0; i < 1024; ++i)
        codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i >> bit & 15);
      const auto words = int4::pack_marlin_codes(codes, 16, 64);
      at |= static_cast<int>(words[static_cast<std::size_t>(word)] >> 4 * nibble & 15U) << bit;
    }
    return std::pair(at / 64, at % 64);
  };
  const std::pair<int, int> first[8] = {{0, 0}, {8, 0}, {0, 8}, {8, 8},
                                        {1, 0}, {9, 0}, {1, 8}, {9, 8}};
  for (int nibble = 0; nibble < 8; ++nibble) {
    const auto [row, col] = first[nibble];
    EXPECT_EQ(position(0, nibble), std::pair(row, col));
    EXPECT_EQ(position(1, nibble), std::pair(row, col + 16));
    EXPECT_EQ(position(4, nibble), std::pair(row + 2, col));
    // Word = lane * 4 + warp.
    EXPECT_EQ(position(4 * 13 + 2, nibble), std::pair(row + 2, 2 * 16 + 3 + col));
  }
}

TEST(Marlin, ZeroPointsLieWhereTheKernelReadsThem) {
  // A thread reads the word at slab * 8 + lane / 4 and uses it for columns lane / 4 + 8 j, j in the
  // order of the codes' nibbles.
  std::vector<std::uint8_t> zeros(128);
  for (std::size_t i = 0; i < zeros.size(); ++i)
    zeros[i] = static_cast<std::uint8_t>((i * 7 + i / 16) % 16);
  const auto words = int4::pack_marlin_zeros(zeros, 1, 128);
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (int slab = 0; slab < 2; ++slab) {
    for (int column = 0; column < 8; ++column) {
      for (int nibble = 0; nibble < 8; ++nibble) {
        EXPECT_EQ(words[static_cast<std::size_t>(slab * 8 + column)] >> 4 * nibble & 15U,
                  zeros[static_cast<std::size_t>(slab * 64 + column + 8 * kOrder[nibble])]);
      }
    }
  }
  EXPECT_EQ(int4::unpack_marlin_zeros(words, 1, 128), zeros);
}

TEST(Marlin, LayoutIsInvertible) {
  for (const Recipe& r :
       {Recipe{.k = 256, .n = 128, .group_size = 64, .format = CheckpointFormat::GptqV2},
        Recipe{.k = 128, .n = 64, .group_size = -1, .zeros = false},
        Recipe{.k = 256, .n = 64, .group_size = 32, .zeros = false, .order = Order::Permuted}}) {
    const Int4Matrix m = make_checkpoint(r).matrices[0];
    const int4::MarlinMatrix packed = int4::to_marlin(m);
    EXPECT_EQ(packed.qzeros.empty(), !r.zeros);
    EXPECT_EQ(int4::from_marlin(packed), m) << describe_recipe(r);
  }
  EXPECT_THROW(int4::to_marlin(make_checkpoint({.k = 24, .n = 64}).matrices[0]), UnsupportedError);
  EXPECT_THROW(int4::to_marlin(make_checkpoint({.k = 32, .n = 32}).matrices[0]), UnsupportedError);
  EXPECT_THROW(
      int4::to_marlin(
          make_checkpoint({.k = 256, .n = 64, .zeros = false, .order = Order::Random}).matrices[0]),
      UnsupportedError);
  Int4Matrix sixteen = make_checkpoint({.k = 64, .n = 64}).matrices[0];
  sixteen.zeros[3] = 16;
  EXPECT_THROW(int4::to_marlin(sixteen), UnsupportedError);
}

TEST(Marlin, ActOrderSortsRowsByGroup) {
  const Int4Matrix m = make_checkpoint({.k = 64, .n = 64, .order = Order::Permuted}).matrices[0];
  Int4Matrix even = m;
  for (auto& z : even.zeros) z = static_cast<std::uint8_t>(z % 16);
  const int4::MarlinMatrix packed = int4::to_marlin(even);
  const auto codes = int4::unpack_marlin_codes(packed.qweight, 64, 64);
  for (std::int64_t i = 0; i < 64; ++i) {
    const std::int64_t from = packed.perm[static_cast<std::size_t>(i)];
    EXPECT_EQ(m.g_idx[static_cast<std::size_t>(from)], i / 32);
    if (i % 32 != 0) {
      EXPECT_LT(packed.perm[static_cast<std::size_t>(i - 1)], from);  // stable
    }
    EXPECT_EQ(codes[static_cast<std::size_t>(i * 64 + 5)],
              m.codes[static_cast<std::size_t>(from * 64 + 5)]);
  }
}

TEST(P4, IsInvertible) {
  for (const Recipe& r : recipes()) {
    if (r.order == Order::Random) continue;
    const Int4Matrix m = make_checkpoint(r).matrices[0];
    for (const bool interleave : {false, true}) {
      if (interleave && m.n % 16 != 0) {
        EXPECT_THROW(int4::to_p4(m, true), UnsupportedError);
        continue;
      }
      const int4::P4Matrix packed = int4::to_p4(m, interleave);
      EXPECT_EQ(int4::from_p4(packed), m) << describe_recipe(r);
      EXPECT_EQ(packed.packed_rows % 16, 0);
      EXPECT_EQ(packed.packed_cols % 64, 0);
    }
  }
}

TEST(P4, HasTheDocumentedSizesAndOrder) {
  const Recipe r{.k = 256, .n = 32, .group_size = 128, .zeros = false};
  const Int4Matrix m = make_checkpoint(r).matrices[0];
  const int4::P4Matrix packed = int4::to_p4(m, true);
  EXPECT_EQ(packed.row_block_bytes, 2 * 1056);
  EXPECT_EQ(packed.bytes.size(), 2U * 2 * 1056);
  // Lane l = 4 g + t owns 16 bytes; the nibble at bit 4 (r + 4 h) of word s is row g + 8 (r & 1),
  // k = 16 s + 2 t + h + 8 (r >> 1). Unit rows 0-7 are gate rows, 8-15 up rows.
  for (int row_block = 0; row_block < 2; ++row_block) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int s = 0; s < 4; ++s) {
        const std::size_t at =
            static_cast<std::size_t>(row_block * 2112 + 1056 + 512 + lane * 16 + s * 4);
        std::uint32_t word = 0;
        std::memcpy(&word, packed.bytes.data() + at, 4);
        for (int i = 0; i < 8; ++i) {
          const int sub = i % 4, h = i / 4;
          const int gate_row = row_block * 8 + lane / 4;
          const int n = (sub & 1) == 0 ? gate_row : 16 + gate_row;
          const int k = 128 + 64 + 16 * s + 2 * (lane % 4) + h + 8 * (sub >> 1);
          ASSERT_EQ(word >> 4 * i & 15U, m.codes[static_cast<std::size_t>(k * 32 + n)]);
        }
      }
    }
    for (int g = 0; g < 8; ++g) {
      std::uint16_t pair[2];
      std::memcpy(pair, packed.bytes.data() + row_block * 2112 + 1056 + 1024 + 4 * g, 4);
      EXPECT_EQ(f16_to_f32(pair[0]), m.scales[static_cast<std::size_t>(32 + row_block * 8 + g)]);
      EXPECT_EQ(f16_to_f32(pair[1]),
                m.scales[static_cast<std::size_t>(32 + 16 + row_block * 8 + g)]);
    }
  }
}

TEST(Marlin, ColumnOrderKeepsGroupsApart) {
  for (const Recipe& r : recipes()) {
    const Checkpoint c = make_checkpoint(r);
    const int4::ColumnOrder order = int4::order_columns(c.k, c.group_size, c.groups, c.g_idx);
    const std::size_t orders = c.g_idx.empty() ? 1 : c.g_idx.size() / static_cast<std::size_t>(c.k);
    for (std::size_t o = 0; o < orders; ++o) {
      std::vector<bool> seen(static_cast<std::size_t>(c.k));
      for (std::int64_t j = 0; j < order.packed_cols; ++j) {
        const std::int32_t col = order.column[o * static_cast<std::size_t>(order.packed_cols) +
                                              static_cast<std::size_t>(j)];
        if (col < 0) continue;
        EXPECT_FALSE(seen[static_cast<std::size_t>(col)]);
        seen[static_cast<std::size_t>(col)] = true;
        EXPECT_EQ(order.group[o * static_cast<std::size_t>(order.scale_groups) +
                              static_cast<std::size_t>(j / order.scale_cols)],
                  c.matrices[o].group_of(col))
            << describe_recipe(r);
      }
      EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](bool s) { return s; }));
    }
  }
  EXPECT_EQ(int4::order_columns(2048, 128, 16, {}).scale_cols, 128);
  EXPECT_TRUE(int4::order_columns(2048, 128, 16, {}).identity);
  EXPECT_EQ(int4::order_columns(2048, 2048, 1, {}).scale_cols, 256);
}

TEST(Marlin, BadTensorsAreRefused) {
  const Checkpoint c = make_checkpoint({.k = 64, .n = 32, .order = Order::Permuted});
  const auto with = [&](auto&& change) {
    GptqTensors t = c.tensors();
    change(t);
    return t;
  };
  const auto load = [](const GptqTensors& t) { return MarlinExpertStack::from_gptq(t); };
  EXPECT_NO_THROW(load(c.tensors()));
  EXPECT_THROW(load(with([](auto& t) { t.group_size = 64; })), ShapeError);
  EXPECT_THROW(load(with([](auto& t) { t.group_size = 0; })), ShapeError);
  EXPECT_THROW(load(with([](auto& t) { t.scales.shape[2] = 31; })), ShapeError);
  EXPECT_THROW(load(with([](auto& t) { t.scales.dtype = DType::I32; })), DTypeError);
  EXPECT_THROW(load(with([](auto& t) { t.qweight.dtype = DType::F32; })), DTypeError);
  EXPECT_THROW(load(with([](auto& t) { t.qzeros.shape[2] = 5; })), ShapeError);
  EXPECT_THROW(load(with([](auto& t) { t.qweight.rank = 2; })), ShapeError);
  EXPECT_THROW(load(with([](auto& t) { t.g_idx.shape[0] = 63; })), ShapeError);
  EXPECT_THROW(unpack_gptq(c.tensors(), 3), ShapeError);
  EXPECT_THROW(unpack_gptq(c.tensors(), -1), ShapeError);
  Checkpoint bad = c;
  bad.g_idx[5] = 2;
  EXPECT_THROW(MarlinExpertStack::from_gptq(bad.tensors()), FormatError);
  bad.g_idx[5] = -1;
  EXPECT_THROW(MarlinExpertStack::from_gptq(bad.tensors()), FormatError);

  MarlinExpertStack::Builder builder(
      {.num_experts = 1, .k = 64, .n_per_expert = 32, .group_size = 32, .zeros = false});
  GptqTensors one;
  one.qweight = ConstTensorView(c.qweight.data(), DType::I32, {8, 32});
  one.scales = ConstTensorView(c.half_scales.data(), DType::F16, {2, 32});
  one.qzeros = ConstTensorView(c.qzeros.data(), DType::I32, {2, 4});
  EXPECT_THROW(builder.add(0, 0, one), FormatError);  // zero points are not all 8
  EXPECT_THROW(builder.add(1, 0, one), ShapeError);
  EXPECT_THROW(builder.add(0, 16, one), ShapeError);
}

}  // namespace
}  // namespace moesaic::testing
