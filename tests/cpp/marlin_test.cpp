// INT4 group weights: checkpoints, layouts, stacks and their products.

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cpu/isa.hpp"
#include "gptq_checkpoint.hpp"
#include "int4/columns.hpp"
#include "int4/marlin_layout.hpp"
#include "int4/p4_layout.hpp"
#include "layers.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic::testing {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Checkpoints and layouts

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

// ---------------------------------------------------------------------------------------------------------
// Products

constexpr double kReferenceBound = 1e-5;
constexpr double kExactBound = 1e-4;
constexpr double kFastBound = 2e-2;

Context make_context(CpuIsa isa = CpuIsa::Auto, int threads = 2) {
  Tuning tuning;
  tuning.cpu_isa = isa;
  tuning.poison = true;
  return Context(backend_for(Device{}), tuning, std::make_shared<ThreadPool>(threads));
}

/// Sizes for make_routing; the weight types are not read.
Case case_of(std::int64_t tokens, std::int64_t hidden, std::int64_t intermediate,
             std::int32_t experts, std::int32_t top_k,
             RoutingShape routing = RoutingShape::Uniform) {
  const QuantType type = QuantType::INT4;
  return {"marlin", tokens, hidden, intermediate, experts, top_k, type, type, type, routing};
}

Floats poisoned(std::int64_t count) { return Floats(static_cast<std::size_t>(count), kPoison); }

ConstTensorView rows_of(const Floats& values, std::int64_t cols) {
  return {values.data(), DType::F32, {static_cast<std::int64_t>(values.size()) / cols, cols}};
}
TensorView rows_of(Floats& values, std::int64_t cols) {
  return {values.data(), DType::F32, {static_cast<std::int64_t>(values.size()) / cols, cols}};
}

TEST(MarlinProducts, AgreeWithF64OnEveryInstructionSet) {
  for (const Recipe& r : recipes()) {
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
    // Rows of the experts lie apart in x and in out, and not in their order.
    const std::vector<MarlinDispatch> dispatches = {
        {2, 0, 11, 9}, {0, 12, 2, 1}, {1, 14, 4, 3}, {1, 2, 0, 2}};
    const Floats x = random_values(20 * c.k, 5);
    Doubles want;
    for (const MarlinDispatch& d : dispatches) {
      for (std::int64_t i = 0; i < d.rows; ++i) {
        const auto first = x.begin() + (d.in_row + i) * c.k;
        const Doubles row(first, first + c.k);
        const Doubles y = apply_f64(c.matrices[static_cast<std::size_t>(d.expert)], row.data());
        want.insert(want.end(), y.begin(), y.end());
      }
    }
    for (const CpuIsa isa : cpu::supported_isas()) {
      for (const Precision precision : {Precision::Exact, Precision::Fast}) {
        Context context = make_context(isa);
        Floats out = poisoned(21 * c.n);
        stack.gemm_phase_batched(context, rows_of(x, c.k), dispatches, rows_of(out, c.n),
                                 precision);
        Floats got;
        for (const MarlinDispatch& d : dispatches) {
          got.insert(got.end(), out.begin() + d.out_row * c.n,
                     out.begin() + (d.out_row + d.rows) * c.n);
        }
        const double bound = precision == Precision::Exact ? kExactBound : kFastBound;
        EXPECT_LT(rel_l2(got, want), bound) << describe_recipe(r) << " " << cpu::name_of(isa);
        // Rows that no dispatch names stay as they were.
        for (const std::int64_t row : {3, 7, 10, 20})
          EXPECT_TRUE(std::isnan(out[static_cast<std::size_t>(row * c.n)]));
      }
    }
  }
}

TEST(MarlinProducts, ManyRowsPerExpert) {
  const Checkpoint c = make_checkpoint({.experts = 2,
                                        .k = 256,
                                        .n = 80,
                                        .group_size = 64,
                                        .order = Order::Permuted,
                                        .shared_order = false});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  const Floats x = random_values(150 * c.k, 6);
  const std::vector<MarlinDispatch> dispatches = {{1, 0, 0, 131}, {0, 131, 131, 19}};
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    Context context = make_context();
    Floats out = poisoned(150 * c.n), one = poisoned(150 * c.n);
    stack.gemm_phase_batched(context, rows_of(x, c.k), dispatches, rows_of(out, c.n), precision);
    // One row at a time gives the same bits.
    for (std::int64_t row = 0; row < 150; ++row) {
      const std::vector<MarlinDispatch> single = {{row < 131 ? 1 : 0, row, row, 1}};
      stack.gemm_phase_batched(context, rows_of(x, c.k), single, rows_of(one, c.n), precision);
    }
    EXPECT_EQ(out, one);
  }
}

TEST(MarlinProducts, PhasesAgreeBitForBit) {
  for (const Recipe& r :
       {Recipe{.experts = 4,
               .k = 128,
               .n = 64,
               .group_size = 32,
               .order = Order::Permuted,
               .shared_order = false},
        Recipe{.experts = 4, .k = 256, .n = 70, .group_size = 128},
        Recipe{.experts = 4, .k = 136, .n = 24, .group_size = 64, .zeros = false}}) {
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
    constexpr std::int32_t kTopK = 3;
    const Case shape = case_of(37, c.k, c.n, 4, kTopK, RoutingShape::Skipped);
    const Routing routing = make_routing(shape);
    const std::int64_t pairs = 37 * kTopK;
    const Floats x = random_values(37 * c.k, 8);
    const BucketPlan plan = BucketPlan::build(routing, 4);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      Context context = make_context();
      // Per pair, by expert linears.
      Floats want(static_cast<std::size_t>(pairs * c.n));
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        const std::int32_t e = routing.topk_ids()[static_cast<std::size_t>(pair)];
        if (e < 0) continue;
        const ConstTensorView row(x.data() + pair / kTopK * c.k, DType::F32, {1, c.k});
        stack.make_expert_linear(e).forward(
            context, row, {want.data() + pair * c.n, DType::F32, {1, c.n}}, precision);
      }
      // Buckets over packed rows.
      Floats packed(static_cast<std::size_t>(pairs * c.k));
      std::vector<MarlinDispatch> dispatches;
      for (std::int64_t row = 0; row < plan.num_rows(); ++row) {
        std::copy_n(x.begin() + plan.row_token()[static_cast<std::size_t>(row)] * c.k, c.k,
                    packed.begin() + row * c.k);
      }
      for (std::int32_t e = 0; e < 4; ++e) {
        const std::int64_t first = plan.expert_offsets()[static_cast<std::size_t>(e)];
        dispatches.push_back(
            {e, first, first, plan.expert_offsets()[static_cast<std::size_t>(e) + 1] - first});
      }
      Floats rows = poisoned(pairs * c.n);
      stack.gemm_phase_batched(context, rows_of(packed, c.k), dispatches, rows_of(rows, c.n),
                               precision);
      for (std::int64_t row = 0; row < plan.num_rows(); ++row) {
        const std::int64_t pair = plan.row_pair()[static_cast<std::size_t>(row)];
        EXPECT_TRUE(std::equal(rows.begin() + row * c.n, rows.begin() + (row + 1) * c.n,
                               want.begin() + pair * c.n));
      }
      for (const std::int32_t block : {4, 8, 16, 32, 48, 64}) {
        const AlignedRouting pairs_aligned =
            AlignedRouting::build(routing, 4, block, RowSpace::TokenPairs);
        Floats out = poisoned(pairs * c.n);
        stack.gemm_phase_vllm(context, rows_of(x, c.k), pairs_aligned, kTopK, rows_of(out, c.n),
                              precision);
        EXPECT_EQ(out, want) << block;
        const AlignedRouting rows_aligned =
            AlignedRouting::build(routing, 4, block, RowSpace::PackedRows);
        Floats out_rows = poisoned(pairs * c.n);
        stack.gemm_phase_vllm(context, rows_of(packed, c.k), rows_aligned, 1,
                              rows_of(out_rows, c.n), precision);
        for (std::int64_t i = plan.num_rows() * c.n; i < pairs * c.n; ++i)
          rows[static_cast<std::size_t>(i)] = 0.0F;
        EXPECT_EQ(out_rows, rows) << block;
      }
    }
  }
}

TEST(MarlinProducts, ExpertLinearsTakeColumnsAndBias) {
  const Checkpoint c = make_checkpoint({.experts = 2,
                                        .k = 128,
                                        .n = 200,
                                        .group_size = 32,
                                        .order = Order::Permuted,
                                        .shared_order = false});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  Context context = make_context();
  const Floats x = random_values(5 * c.k, 9);
  const std::pair<std::int64_t, std::int64_t> pieces[] = {
      {0, 64}, {64, 128}, {128, 72}, {192, 8}, {0, 200}};
  for (const auto& [first, cols] : pieces) {
    const Floats bias = random_values(cols, 10);
    const MarlinLinear linear = stack.make_expert_linear(1, first, cols, bias);
    EXPECT_EQ(linear.in_features(), c.k);
    EXPECT_EQ(linear.out_features(), cols);
    Floats out = poisoned(5 * cols);
    linear.forward(context, rows_of(x, c.k), rows_of(out, cols), Precision::Exact);
    Doubles want;
    for (std::int64_t row = 0; row < 5; ++row) {
      const Doubles in(x.begin() + row * c.k, x.begin() + (row + 1) * c.k);
      const Doubles y = apply_f64(c.matrices[1], in.data());
      for (std::int64_t n = 0; n < cols; ++n) {
        want.push_back(y[static_cast<std::size_t>(first + n)] +
                       static_cast<double>(bias[static_cast<std::size_t>(n)]));
      }
    }
    EXPECT_LT(rel_l2(out, want), kExactBound);
  }
  EXPECT_THROW(stack.make_expert_linear(2), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(-1), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 32, 64), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 64, 32), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 64, 192), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 256), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 0, 64, Floats(63)), ShapeError);
}

TEST(MarlinProducts, BadCallsAreRefused) {
  const Checkpoint c = make_checkpoint({.experts = 2, .k = 64, .n = 32});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  Context context = make_context();
  const Floats x = random_values(4 * 64, 1);
  Floats out = poisoned(4 * 32);
  const auto batched = [&](const std::vector<MarlinDispatch>& dispatches) {
    stack.gemm_phase_batched(context, rows_of(x, 64), dispatches, rows_of(out, 32));
  };
  EXPECT_NO_THROW(batched({}));
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_THROW(batched({{2, 0, 0, 1}}), ShapeError);
  EXPECT_THROW(batched({{-1, 0, 0, 1}}), ShapeError);
  EXPECT_THROW(batched({{0, 3, 0, 2}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 3, 2}}), ShapeError);
  EXPECT_THROW(batched({{0, -1, 0, 1}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 0, -1}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 0, INT64_MAX}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 0, 2}, {1, 2, 1, 2}}), ShapeError);
  const Case shape = case_of(2, 64, 32, 2, 2);
  const Routing routing = make_routing(shape);
  const AlignedRouting aligned = AlignedRouting::build(routing, 2, 8, RowSpace::TokenPairs);
  const auto vllm = [&](std::int64_t rows, std::int32_t top_k) {
    stack.gemm_phase_vllm(context, {x.data(), DType::F32, {rows, 64}}, aligned, top_k,
                          rows_of(out, 32));
  };
  EXPECT_NO_THROW(vllm(2, 2));
  EXPECT_NO_THROW(vllm(4, 1));
  EXPECT_THROW(vllm(2, 1), ShapeError);
  EXPECT_THROW(vllm(4, 2), ShapeError);
  EXPECT_THROW(vllm(4, 0), ShapeError);
  const AlignedRouting others = AlignedRouting::build(routing, 3, 8, RowSpace::TokenPairs);
  EXPECT_THROW(
      stack.gemm_phase_vllm(context, {x.data(), DType::F32, {2, 64}}, others, 2, rows_of(out, 32)),
      ShapeError);
}

// ---------------------------------------------------------------------------------------------------------
// Whole layers

/// Two Marlin stacks as a layer.
struct MarlinLayer {
  Checkpoint gate_up, down;
  std::shared_ptr<const MarlinExpertStack> gate_up_stack, down_stack;

  MarlinLayer(const Recipe& gate_up_recipe, const Recipe& down_recipe)
      : gate_up(make_checkpoint(gate_up_recipe, 3)), down(make_checkpoint(down_recipe, 4)) {
    const auto load = [](const Checkpoint& c) {
      return std::make_shared<const MarlinExpertStack>(MarlinExpertStack::from_gptq(c.tensors()));
    };
    gate_up_stack = load(gate_up);
    down_stack = load(down);
  }
  ExpertStack stack(const LoadOptions& options = {}) const {
    return ExpertStack::from_marlin(gate_up_stack, down_stack, options);
  }
  Doubles forward_f64(const Floats& x, const Routing& routing) const {
    const std::int64_t hidden = gate_up.k, intermediate = down.k;
    Doubles y(x.size());
    for (std::size_t pair = 0; pair < routing.topk_ids().size(); ++pair) {
      const std::int32_t e = routing.topk_ids()[pair];
      if (e < 0) continue;
      const auto t = static_cast<std::int64_t>(pair) / routing.top_k();
      const Doubles row(x.begin() + t * hidden, x.begin() + (t + 1) * hidden);
      const Doubles gu = apply_f64(gate_up.matrices[static_cast<std::size_t>(e)], row.data());
      Doubles h;
      for (std::int64_t i = 0; i < intermediate; ++i) {
        const double gate = gu[static_cast<std::size_t>(i)];
        h.push_back(gate / (1.0 + std::exp(-gate)) *
                    gu[static_cast<std::size_t>(intermediate + i)]);
      }
      const Doubles d = apply_f64(down.matrices[static_cast<std::size_t>(e)], h.data());
      for (std::int64_t i = 0; i < hidden; ++i) {
        y[static_cast<std::size_t>(t * hidden + i)] +=
            static_cast<double>(routing.topk_weights()[pair]) * d[static_cast<std::size_t>(i)];
      }
    }
    return y;
  }
};

Floats run_layer(const ExpertStack& stack, const Floats& x, Routing& routing, const Tuning& tuning,
                 std::optional<std::pair<GemmMode, RowSpaceMode>> way) {
  Context context(backend_for(Device{}), tuning, std::make_shared<ThreadPool>(2));
  LayerRef layer;
  layer.stack = &stack;
  const std::int64_t hidden = stack.shape().hidden_size;
  Floats y = poisoned(static_cast<std::int64_t>(x.size()));
  ForwardIo io;
  io.x = rows_of(x, hidden);
  io.routing = routing.view();
  io.out = rows_of(y, hidden);
  Workspace workspace(workspace_bytes(context, layer, routing.top_k(), routing.num_tokens()));
  if (way) {
    moe_forward_bucketed(context, layer, io, workspace, way->first, way->second);
  } else {
    moe_forward(context, layer, io, workspace);
  }
  return y;
}

void check_layer(const MarlinLayer& marlin, std::int64_t tokens, std::int32_t top_k,
                 RoutingShape routing_shape, bool every_isa = true) {
  const ExpertStack stack = marlin.stack();
  const std::int64_t hidden = marlin.gate_up.k;
  const Case shape =
      case_of(tokens, hidden, marlin.down.k, marlin.down.experts, top_k, routing_shape);
  Routing routing = make_routing(shape);
  const Floats x = random_values(tokens * hidden, 12);
  const Doubles want = marlin.forward_f64(x, routing);
  LayerRef layer;
  layer.stack = &stack;
  Floats reference = poisoned(tokens * hidden);
  ForwardIo io;
  io.x = rows_of(x, hidden);
  io.routing = routing.view();
  io.out = rows_of(reference, hidden);
  moe_forward_cpu(layer, io);
  EXPECT_LT(rel_l2(reference, want), kReferenceBound);
  const std::pair<GemmMode, RowSpaceMode> ways[] = {{GemmMode::Bucketed, RowSpaceMode::TokenPairs},
                                                    {GemmMode::Bucketed, RowSpaceMode::PackedRows},
                                                    {GemmMode::Aligned, RowSpaceMode::TokenPairs},
                                                    {GemmMode::Aligned, RowSpaceMode::PackedRows}};
  for (const CpuIsa isa : cpu::supported_isas()) {
    if (!every_isa && isa != cpu::best_isa()) continue;
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      Tuning tuning;
      tuning.cpu_isa = isa;
      tuning.precision = precision;
      tuning.poison = true;
      const Floats first = run_layer(stack, x, routing, tuning, std::nullopt);
      EXPECT_LT(rel_l2(first, want), precision == Precision::Exact ? kExactBound : kFastBound)
          << cpu::name_of(isa);
      for (const auto& way : ways) {
        EXPECT_EQ(run_layer(stack, x, routing, tuning, way), first);
        if (way.first != GemmMode::Aligned) continue;
        for (const std::int32_t block : kBlockSizes) {
          Tuning sized = tuning;
          sized.block_size = block;
          EXPECT_EQ(run_layer(stack, x, routing, sized, way), first) << block;
        }
      }
    }
  }
}

TEST(MarlinLayers, AgreeOnEveryPath) {
  check_layer({{.experts = 5, .k = 128, .n = 128, .group_size = 32},
               {.experts = 5, .k = 64, .n = 128, .group_size = 32}},
              9, 3, RoutingShape::Skipped);
  // Act-order: shared above, one per expert below, groups of any size.
  check_layer({{.experts = 4, .k = 256, .n = 192, .group_size = 64, .order = Order::Permuted},
               {.experts = 4,
                .k = 96,
                .n = 256,
                .group_size = 32,
                .order = Order::Random,
                .shared_order = false}},
              17, 2, RoutingShape::Zipf);
  // Columns that fill no panel, rows that fill no step.
  check_layer({{.experts = 3,
                .k = 72,
                .n = 48,
                .group_size = 32,
                .order = Order::Random,
                .f32_scales = true},
               {.experts = 3, .k = 24, .n = 72, .group_size = -1, .zeros = false}},
              7, 2, RoutingShape::AllToOne);
  check_layer(
      {{.experts = 1, .k = 64, .n = 64, .group_size = 128, .format = CheckpointFormat::Awq},
       {.experts = 1, .k = 32, .n = 64, .group_size = 32, .format = CheckpointFormat::GptqV2}},
      1, 1, RoutingShape::Uniform);
}

TEST(MarlinLayers, ModelShape) {
  check_layer({{.experts = 8, .k = 2048, .n = 1536, .group_size = 128, .order = Order::Permuted},
               {.experts = 8, .k = 768, .n = 2048, .group_size = 128}},
              6, 2, RoutingShape::Uniform, false);
}

TEST(MarlinLayers, ScratchHoldsPaddedGroups) {
  // 32 groups of 8 columns take 32 steps: four times as many columns in memory.
  const Checkpoint c = make_checkpoint({.experts = 2, .k = 256, .n = 40, .group_size = 8});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  EXPECT_EQ(stack.weights().ref.int4.packed_cols, 1024);
  Context context = make_context();
  const Backend& backend = context.backend();
  const Floats x = random_values(6 * 256, 5);
  const std::vector<std::int32_t> ids = {0, 1, 1, 0, 1, 1};
  const std::size_t bytes = backend.scratch_bytes({{2, 256, 40}, 6, 1, 6, 1024});
  GuardedMemory scratch(bytes);
  Floats out = poisoned(6 * 40);
  GemmCall call{.weights = &stack.weights(),
                .rows = {.num_segments = 6, .expert = ids.data(), .limit = 6},
                .in = input_rows(rows_of(x, 256), "test", "x"),
                .out = out.data()};
  call.scratch = scratch.data();
  backend.expert_gemm(context, call);
  EXPECT_TRUE(scratch.guard_untouched());
  Doubles want;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Doubles row(x.begin() + static_cast<std::int64_t>(i) * 256,
                      x.begin() + static_cast<std::int64_t>(i + 1) * 256);
    const Doubles y = apply_f64(c.matrices[static_cast<std::size_t>(ids[i])], row.data());
    want.insert(want.end(), y.begin(), y.end());
  }
  EXPECT_LT(rel_l2(out, want), kExactBound);
  // The forward asks for as much.
  ScratchQuery plain{{2, 256, 40}, 6, 1, 6};
  EXPECT_GT(bytes, backend.scratch_bytes(plain));
  const MarlinLayer layer({.experts = 2, .k = 256, .n = 64, .group_size = 8},
                          {.experts = 2, .k = 32, .n = 256, .group_size = 8});
  const MarlinLayer even({.experts = 2, .k = 256, .n = 64, .group_size = 32},
                         {.experts = 2, .k = 32, .n = 256, .group_size = 32});
  const ExpertStack padded = layer.stack(), packed = even.stack();
  LayerRef a, b;
  a.stack = &padded;
  b.stack = &packed;
  EXPECT_GT(workspace_bytes(context, a, 2, 8), workspace_bytes(context, b, 2, 8));
  check_layer(layer, 8, 2, RoutingShape::Uniform);
}

TEST(MarlinLayers, StackKnowsItsMarlinStacks) {
  const MarlinLayer layer({.experts = 2, .k = 64, .n = 64}, {.experts = 2, .k = 32, .n = 64});
  LoadOptions options;
  options.backend = &backend_for(Device{});
  const ExpertStack stack = layer.stack(options);
  EXPECT_STREQ(stack.kind(), "marlin");
  EXPECT_EQ(stack.marlin(Role::Gate), layer.gate_up_stack);
  EXPECT_EQ(stack.marlin(Role::Up), layer.gate_up_stack);
  EXPECT_EQ(stack.marlin(Role::Down), layer.down_stack);
  EXPECT_EQ(stack.gate().ref.base, layer.gate_up_stack->weights().ref.base);  // no copy
  // Codes, f16 scales and zero points of [64 x 64] and [32 x 64].
  EXPECT_EQ(stack.bytes_per_expert(), 64 * 64 / 2 + 2 * 64 * 3 + 32 * 64 / 2 + 1 * 64 * 3);
  options.dequantize = QuantType::F32;
  const ExpertStack dense = layer.stack(options);
  EXPECT_STREQ(dense.kind(), "stacked");
  EXPECT_EQ(dense.marlin(Role::Down), nullptr);
  Floats a(64), b(64);
  for (const Role role : {Role::Gate, Role::Up}) {
    for (std::int64_t row = 0; row < 32; ++row) {
      dequantize_expert_row(stack.role(role).ref, 1, row, a.data());
      dequantize_expert_row(dense.role(role).ref, 1, row, b.data());
      EXPECT_EQ(a, b);
    }
  }
  EXPECT_THROW(ExpertStack::from_marlin(layer.down_stack, layer.gate_up_stack), ShapeError);
  // INT4 bytes have no form of their own.
  const std::vector<std::byte> bytes(2 * 32 * 64 / 2);
  const ExpertStack::EncodedRole up{QuantType::INT4, 2,      32, 64, bytes.data(),
                                    bytes.size(),    nullptr};
  const ExpertStack::EncodedRole down{QuantType::INT4, 2,      64, 32, bytes.data(),
                                      bytes.size(),    nullptr};
  EXPECT_THROW(ExpertStack::from_encoded(up, up, down), UnsupportedError);
  EXPECT_THROW(ExpertStack::from_marlin(layer.gate_up_stack, nullptr), ShapeError);
  const MarlinLayer more({.experts = 3, .k = 64, .n = 64}, {.experts = 3, .k = 32, .n = 64});
  EXPECT_THROW(ExpertStack::from_marlin(layer.gate_up_stack, more.down_stack), ShapeError);
}

}  // namespace
}  // namespace moesaic::testing
