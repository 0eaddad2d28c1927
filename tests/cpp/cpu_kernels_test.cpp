// The expert products of the CPU backend: every format on every instruction set of this machine,
// beside f64 on the decoded weights and beside the scalar twin; panels beside rows, bit for bit.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/isa.hpp"
#include "cpu/pack.hpp"
#include "layers.hpp"
#include "moesaic/moesaic.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr QuantType kTypes[] = {
#define MOESAIC_KERNEL(TYPE, NAME) QuantType::TYPE,
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
};

bool is_float(QuantType type) {
  return type == QuantType::F32 || type == QuantType::F16 || type == QuantType::BF16 ||
         type == QuantType::E4M3;
}

/// In panels, as the CPU backend prepares a role.
RoleWeights repack(const RoleWeights& weights, ThreadPool* pool = nullptr) {
  ExpertStack::Parts parts;
  parts.up = weights;
  LoadOptions options;
  options.pool = pool;
  cpu::CpuBackend().prepare(parts, options);
  return parts.up;
}

/// A role as in a file and in panels.
struct Role {
  TestRole made;
  RoleWeights packed;
  Role(QuantType type, std::int32_t experts, std::int64_t rows, std::int64_t cols,
       std::uint32_t seed)
      : made(make_role(experts, rows, cols, type, seed, false)), packed(repack(made.weights)) {}

  /// What multiply() must give, in f64.
  Doubles want(const Floats& x) const {
    const std::int64_t cols = packed.ref.cols;
    Doubles y;
    for (std::int64_t t = 0; t * cols < static_cast<std::int64_t>(x.size()); ++t) {
      const Doubles row(x.begin() + t * cols, x.begin() + (t + 1) * cols);
      const auto expert = static_cast<std::int32_t>(t % packed.ref.num_experts);
      const Doubles out = apply_f64(made, expert, row.data());
      y.insert(y.end(), out.begin(), out.end());
    }
    return y;
  }
};

/// The case of rows that go through experts 0 to E - 1 in turn.
ProductCase in_turn(const RoleWeights& weights, const InputRows& x, Precision precision) {
  ProductCase c{.weights = &weights, .x = x, .experts = {}, .precision = precision};
  for (std::int32_t row = 0; row < x.num_rows; ++row) {
    c.experts.push_back(row % weights.ref.num_experts);
  }
  return c;
}

Floats multiply(Context& context, const RoleWeights& weights, const Floats& x,
                Precision precision) {
  return run_case(context, in_turn(weights, dense_rows(x, weights.ref.cols), precision));
}

Floats first_rows(const Floats& values, std::int64_t rows, std::int64_t cols) {
  return {values.begin(), values.begin() + rows * cols};
}

class EveryFormat : public ::testing::TestWithParam<QuantType> {
 protected:
  /// 3 blocks or so, not a multiple of 256 where the format allows it.
  std::int64_t cols() const {
    const int block = traits(GetParam()).block_elems;
    return block == 256 ? 768 : block == 1 ? 301 : block == 128 ? 384 : 704;
  }
};

std::string type_name(const ::testing::TestParamInfo<QuantType>& info) {
  return std::string(traits(info.param).name);
}
INSTANTIATE_TEST_SUITE_P(Types, EveryFormat, ::testing::ValuesIn(kTypes), type_name);

TEST_P(EveryFormat, PanelsGiveBackEveryBit) {
  for (const std::int64_t rows : {1, 16, 37}) {
    const RoleWeights weights = make_role(2, rows, cols(), GetParam(), 1, false).weights;
    ThreadPool pool(2);
    const RoleWeights packed = repack(weights, &pool);
    ASSERT_EQ(packed.ref.layout, WeightLayout::Panels);
    std::vector<std::byte> row(static_cast<std::size_t>(weights.ref.row_stride), std::byte{0xee});
    for (std::int32_t e = 0; e < 2; ++e) {
      for (std::int64_t r = 0; r < rows; ++r) {
        cpu::panel_row(packed.ref, e, r, row.data());
        ASSERT_EQ(0, std::memcmp(row.data(), weights.ref.expert(e) + r * weights.ref.row_stride,
                                 row.size()))
            << "expert " << e << " row " << r;
      }
    }
  }
}

TEST_P(EveryFormat, MeetsF64) {
  const Role role(GetParam(), 2, 40, cols(), 2);
  const Floats x = random_values(6 * cols(), 3);
  const Doubles want = role.want(x);
  for (const CpuIsa isa : cpu::supported_isas()) {
    Context context = cpu_context(isa);
    const double exact = rel_l2(multiply(context, role.packed, x, Precision::Exact), want);
    const double fast = rel_l2(multiply(context, role.packed, x, Precision::Fast), want);
    EXPECT_LT(exact, 5e-5) << name_of(isa);
    EXPECT_LT(fast, is_float(GetParam()) ? 5e-6 : 8e-3) << name_of(isa);
  }
}

TEST_P(EveryFormat, EveryTokenCountGivesTheSameBitsAndMeetsTheScalarTwin) {
  const Role role(GetParam(), 1, 35, cols(), 4);
  const RoleWeights &weights = role.made.weights, &packed = role.packed;
  const Floats x = random_values(17 * cols(), 5);
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    Context twin = cpu_context(CpuIsa::Scalar);
    const Floats want = multiply(twin, packed, x, precision);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = cpu_context(isa);
      const Floats all = multiply(context, packed, x, precision);
      // The integer sums are equal; the f32 rounding of at most a few hundred additions is not.
      EXPECT_LT(rel_l2(all, want), 1e-6) << name_of(isa);
      for (std::int64_t tokens = 1; tokens <= 16; ++tokens) {
        ASSERT_TRUE(same_bits(multiply(context, packed, first_rows(x, tokens, cols()), precision),
                              first_rows(all, tokens, 35)))
            << name_of(isa) << " tokens " << tokens;
        if (isa == CpuIsa::Scalar && tokens >= 3) break;
      }
      const Floats few = first_rows(x, 3, cols());
      ASSERT_TRUE(same_bits(multiply(context, weights, few, precision),
                            multiply(context, packed, few, precision)))
          << "rows against panels, " << name_of(isa);
      ASSERT_TRUE(same_bits(multiply(context, weights, x, precision), all))
          << "rows against panels, " << name_of(isa);
    }
  }
}

TEST_P(EveryFormat, FmaInstructionSetsAgreeBitForBit) {
  const Role role(GetParam(), 1, 32, cols(), 6);
  const Floats x = random_values(9 * cols(), 7);
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    Floats first;
    for (const CpuIsa isa : cpu::supported_isas()) {
      if (isa == CpuIsa::Scalar) continue;
      Context context = cpu_context(isa);
      const Floats y = multiply(context, role.packed, x, precision);
      if (first.empty()) first = y;
      EXPECT_TRUE(same_bits(first, y)) << name_of(isa);
    }
  }
}

TEST(CpuKernels, ListsEveryFormatAndNamesTheForcedOne) {
  const auto list = cpu::CpuBackend().kernels();
  std::size_t expected = 0;
  for (const CpuIsa isa : cpu::supported_isas()) {
    // In panels and in rows, and INT4 groups in panels; tiles are of integers alone.
    const bool tiles = isa == CpuIsa::Amx;
    expected += 2 * std::size(kTypes) + 1;
    if (tiles) expected -= 2 * static_cast<std::size_t>(std::ranges::count_if(kTypes, is_float));
  }
  EXPECT_EQ(list.size(), expected);
  const Role role(QuantType::Q4_K, 1, 16, 256, 1);
  for (const CpuIsa isa : cpu::supported_isas()) {
    Tuning tuning;
    tuning.cpu_isa = isa;
    EXPECT_EQ(cpu::CpuBackend().kernel_name(role.packed.ref, tuning),
              std::string("gemm_q4_k_") + name_of(isa));
  }
}

TEST(CpuKernels, ExtremeActivationsDoNotSaturate) {
  // The largest low plane is -128; wide weights times it must not saturate anywhere.
  for (const QuantType type :
       {QuantType::Q8_0, QuantType::IQ4_NL, QuantType::Q6_K, QuantType::Q4_K}) {
    const Role role(type, 1, 32, 512, 8);
    Floats x(512);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = i % 32 == 0 ? 32639.0F : i % 2 == 0 ? -32640.0F + 1.0F : -128.0F;
    }
    const Doubles want = role.want(x);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = cpu_context(isa);
      EXPECT_LT(rel_l2(multiply(context, role.packed, x, Precision::Exact), want), 1e-5)
          << name_of(isa) << " " << traits(type).name;
    }
  }
}

TEST(CpuKernels, NonFiniteTokensStayAlone) {
  const Role role(QuantType::Q4_K, 1, 32, 256, 9);
  const Floats clean = random_values(8 * 256, 10);
  for (const CpuIsa isa : cpu::supported_isas()) {
    Context context = cpu_context(isa);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      const Floats want = multiply(context, role.packed, clean, precision);
      Floats x = clean;
      x[2 * 256 + 17] = std::numeric_limits<float>::quiet_NaN();
      x[5 * 256 + 200] = -std::numeric_limits<float>::infinity();
      x[6 * 256] = std::numeric_limits<float>::max();
      std::fill(x.begin() + 7 * 256, x.end(), 1e-38F);
      const Floats got = multiply(context, role.packed, x, precision);
      for (std::size_t t = 0; t < 8; ++t) {
        for (std::size_t r = 0; r < 32; ++r) {
          const float y = got[t * 32 + r];
          if (t == 2 || t == 5) {
            EXPECT_TRUE(std::isnan(y));
          } else if (t == 6 || t == 7) {
            EXPECT_FALSE(std::isnan(y));
          } else {
            EXPECT_EQ(y, want[t * 32 + r]);
          }
        }
      }
    }
  }
}

TEST(CpuKernels, TwoByteAndStridedSourcesGiveTheBitsOfDenseF32) {
  const std::int64_t cols = 320, stride = cols + 7;
  const Role role(QuantType::Q8_0, 2, 24, cols, 11);
  for (const DType dtype : {DType::F16, DType::BF16}) {
    Tensor wide(dtype, 4, stride, random_values(4 * stride, 12));
    ConstTensorView strided = wide.view();
    strided.shape[1] = cols;
    Floats values = wide.values(), x;
    for (std::int64_t row = 0; row < 4; ++row) {
      x.insert(x.end(), values.begin() + row * stride, values.begin() + row * stride + cols);
    }
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = cpu_context(isa);
      const InputRows in = input_rows(strided);
      EXPECT_TRUE(same_bits(run_case(context, in_turn(role.packed, in, Precision::Exact)),
                            multiply(context, role.packed, x, Precision::Exact)))
          << name_of(isa);
    }
  }
}

/// Each code alone, so that nothing is rounded: subnormal ones, both zeros and the largest included.
TEST(CpuKernels, EveryCodeOfE4m3IsItsValueTimesItsScale) {
  constexpr std::int64_t kCols = 256, kBlock = 132, kRow = 2 * kBlock, kNumRows = 19;
  const float scales[] = {1.0F, 0.3F, 1e-4F, -2.5F, 0x1p-120F, 1e30F};
  TestRole role = make_role(1, kNumRows, kCols, QuantType::E4M3, 1, false);
  for (std::int64_t row = 0; row < kNumRows; ++row) {
    for (std::int64_t col = 0; col < kCols; ++col) {
      std::byte* const block = role.bytes->data() + row * kRow + col / 128 * kBlock;
      const std::int64_t code = (col + 13 * row) % 256;
      block[4 + col % 128] = static_cast<std::byte>(code % 128 == 127 ? 0x80 : code);
      std::memcpy(block, scales + (row + col / 128) % std::ssize(scales), sizeof(float));
    }
  }
  const Floats values = decode_role(role.weights);
  const RoleWeights packed = repack(role.weights);
  Floats one_each(kCols * kCols);
  for (std::int64_t col = 0; col < kCols; ++col) one_each[static_cast<std::size_t>(col * 257)] = 1;
  for (const CpuIsa isa : cpu::supported_isas()) {
    Context context = cpu_context(isa);
    const Floats y = multiply(context, packed, one_each, Precision::Exact);
    for (std::int64_t col = 0; col < kCols; ++col) {
      const Floats alone =
          multiply(context, packed,
                   Floats(one_each.begin() + col * kCols, one_each.begin() + (col + 1) * kCols),
                   Precision::Exact);
      for (std::int64_t row = 0; row < kNumRows; ++row) {
        const float want = values[static_cast<std::size_t>(row * kCols + col)];
        ASSERT_EQ(y[static_cast<std::size_t>(col * kNumRows + row)], want) << row << " " << col;
        ASSERT_EQ(alone[static_cast<std::size_t>(row)], want) << row << " " << col;
      }
    }
  }
}

TEST(CpuKernels, ExpertsInATableAndBehindASlotMapGiveTheSameBits) {
  const Role role(QuantType::Q5_K, 4, 48, 256, 71);
  const Floats x = random_values(8 * 256, 72);
  Context context = cpu_context();
  const Floats want = multiply(context, role.packed, x, Precision::Exact);
  std::vector<const std::byte*> table;
  for (const std::int32_t e : {3, 1, 0, 2}) table.push_back(role.packed.ref.expert(e));
  const std::int32_t slots[] = {2, 1, 3, 0};
  RoleWeights scattered = role.packed;
  scattered.ref.base = nullptr;
  scattered.ref.table = table.data();
  scattered.ref.slot_map = slots;
  EXPECT_TRUE(same_bits(multiply(context, scattered, x, Precision::Exact), want));
}

TEST(CpuKernels, AbortedRepackThrows) {
  ExpertStack::Parts parts;
  parts.up = make_role(2, 32, 64, QuantType::Q4_0, 1, false).weights;
  LoadOptions options;
  std::int64_t reported = 0;
  options.progress = [&](const Progress& p) {
    reported = p.done_bytes;
    return false;
  };
  EXPECT_THROW(cpu::CpuBackend().prepare(parts, options), OperationCancelled);
  EXPECT_GT(reported, 0);
}

}  // namespace
}  // namespace moesaic::testing
