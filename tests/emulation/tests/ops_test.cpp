// Gather, activate, combine, router logits, norms, tables, identity experts and fills on the device
// against the scalar definitions and f64 sums.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "launch.h"
#include "moesaic/config.hpp"
#include "moesaic/types.hpp"
#include "random.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

namespace moesaic {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
using testing::Floats;
using testing::random_values;
using Ints = std::vector<std::int32_t>;

constexpr DType kTypes[] = {DType::F32, DType::F16, DType::BF16};

/// Elements of one type, starting at any element of an aligned range.
class Elements {
 public:
  Elements(DType dtype, std::size_t count, std::size_t skip = 0)
      : dtype_(dtype), skip_(skip), count_(count), words_((count + skip) * size_of(dtype) / 2) {
    for (std::size_t i = 0; i < count; ++i) set(i, kNan);
  }
  Elements(DType dtype, const Floats& values, std::size_t skip = 0)
      : Elements(dtype, values.size(), skip) {
    for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void* data() { return words_.data() + skip_ * size_of(dtype_) / 2; }
  std::size_t size() const { return count_; }
  float get(std::size_t i) const {
    const std::uint16_t* const at = words_.data() + (i + skip_) * size_of(dtype_) / 2;
    if (dtype_ == DType::F16) return f16_to_f32(*at);
    if (dtype_ == DType::BF16) return bf16_to_f32(*at);
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  void set(std::size_t i, float value) {
    std::uint16_t* const at = words_.data() + (i + skip_) * size_of(dtype_) / 2;
    if (dtype_ == DType::F16) {
      *at = f32_to_f16(value);
    } else if (dtype_ == DType::BF16) {
      *at = f32_to_bf16(value);
    } else {
      std::memcpy(at, &value, sizeof(value));
    }
  }
  bool operator==(const Elements& other) const { return words_ == other.words_; }

 private:
  DType dtype_;
  std::size_t skip_, count_;
  std::vector<std::uint16_t> words_;
};

float rounded(DType dtype, float value) {
  if (dtype == DType::F16) return f16_to_f32(f32_to_f16(value));
  if (dtype == DType::BF16) return bf16_to_f32(f32_to_bf16(value));
  return value;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

TEST(GatherOnDevice, RowsOfEveryTypeAndStride) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t cols : {1, 5, 64, 516, 1030}) {
      for (const std::size_t skip : {std::size_t{0}, std::size_t{1}}) {
        for (const std::int64_t slack : {0, 4, 3}) {
          const std::int64_t x_rows = 6;
          const std::int64_t stride = cols + slack;
          Elements x(dtype, random_values(static_cast<std::size_t>(x_rows * stride), 1), skip);
          x.set(1, kInf);
          const Ints index = {3, -1, 0, 5, 5, -7, 6, 2};  // 6 is behind the last row
          Floats out(static_cast<std::size_t>(cols) * index.size(), kNan);
          op::Gather args;
          args.x = {x.data(), dtype, x_rows, cols, 1, stride, 0};
          args.index = index.data();
          args.out = out.data();
          args.rows = static_cast<std::int64_t>(index.size());
          emulation::options().seed = skip;
          ASSERT_EQ(cuda::launch_gather(args, nullptr), cuda::kOk);
          for (std::size_t r = 0; r < index.size(); ++r) {
            for (std::int64_t c = 0; c < cols; ++c) {
              const bool real = index[r] >= 0 && index[r] < x_rows;
              const float expected =
                  real ? x.get(static_cast<std::size_t>(index[r] * stride + c)) : 0.0F;
              ASSERT_EQ(out[r * static_cast<std::size_t>(cols) + static_cast<std::size_t>(c)],
                        expected)
                  << "row " << r << ", column " << c << " of " << cols;
            }
          }
        }
      }
    }
  }
}

TEST(GatherOnDevice, BroadcastAndRankThree) {
  // [2, 3, 8] with an inner stride, then one row for all slots.
  Elements x(DType::BF16, random_values(2 * 3 * 20, 2));
  for (const std::int64_t inner_stride : {20, 0}) {
    Floats out(6 * 8, kNan);
    const Ints index = {0, 1, 2, 3, 4, 5};
    op::Gather args;
    args.x = {x.data(), DType::BF16, 6, 8, 3, 60, inner_stride};
    args.index = index.data();
    args.out = out.data();
    args.rows = 6;
    ASSERT_EQ(cuda::launch_gather(args, nullptr), cuda::kOk);
    for (std::size_t r = 0; r < 6; ++r) {
      for (std::size_t c = 0; c < 8; ++c) {
        const std::size_t at = r / 3 * 60 + r % 3 * static_cast<std::size_t>(inner_stride) + c;
        EXPECT_EQ(out[r * 8 + c], x.get(at));
      }
    }
  }
}

TEST(GatherOnDevice, RefusesOtherTypes) {
  op::Gather args;
  args.x.dtype = DType::I32;
  EXPECT_EQ(cuda::launch_gather(args, nullptr), cuda::kUnsupported);
}

TEST(ActivateOnDevice, EveryKindAgainstTheScalarDefinition) {
  constexpr float kSpecial[] = {0.0F, -0.0F, 90.0F, -90.0F, 7.0F, -7.0F, kNan, kInf, -kInf, 1e-20F};
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    for (const float linear_beta : {0.0F, 2.5F}) {
      const Activation activation{static_cast<ActivationKind>(kind), 3.0F, 1.702F, 1.5F,
                                  linear_beta};
      for (const std::int64_t cols : {1, 6, 64, 700}) {
        const std::int64_t rows = 5;
        const std::int64_t stride = 2 * cols;
        Floats gate_up = random_values(static_cast<std::size_t>(rows * stride), 7, 3.0F);
        for (std::size_t i = 0; i < gate_up.size() && i < std::size(kSpecial); ++i) {
          gate_up[i] = kSpecial[i];
        }
        Floats hidden(static_cast<std::size_t>(rows * cols), kNan);
        op::Activate args;
        args.activation = activation;
        args.gate = activation.gated() ? gate_up.data() : nullptr;
        args.up = gate_up.data() + cols;
        args.hidden = hidden.data();
        args.row_stride = stride;
        args.rows = rows;
        args.intermediate = cols;
        ASSERT_EQ(cuda::launch_activate(args, nullptr), cuda::kOk);
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t c = 0; c < cols; ++c) {
            const float g = gate_up[static_cast<std::size_t>(r * stride + c)];
            const float u = gate_up[static_cast<std::size_t>(r * stride + cols + c)];
            const float expected = activate(activation, g, u);
            const float got = hidden[static_cast<std::size_t>(r * cols + c)];
            // 1 + tanh(x) of the scalar definition loses what its two terms cancel.
            const float slack =
                2e-6F * std::fabs(expected) + 1e-6F * std::fabs(u) * std::max(1.0F, std::fabs(g));
            ASSERT_TRUE(same(got, expected) || std::fabs(got - expected) <= slack)
                << name_of(activation.kind) << "(" << g << ", " << u << ") = " << got
                << ", expected " << expected;
          }
        }
      }
    }
  }
}

struct CombineCase {
  std::int64_t tokens;
  std::int32_t top_k;
  std::int64_t hidden;
  bool with_plan;
  bool accumulate;
};

TEST(CombineOnDevice, SlotOrderEveryTypeAndSkippedPairs) {
  constexpr std::int32_t kExperts = 9;
  for (const CombineCase& c :
       {CombineCase{1, 1, 1, false, false}, CombineCase{3, 8, 70, true, false},
        CombineCase{5, 6, 512, true, true}, CombineCase{4, 10, 700, false, true},
        CombineCase{2, 64, 33, true, false}, CombineCase{0, 2, 16, true, false}}) {
    for (const DType rows_type : kTypes) {
      for (const DType out_type : kTypes) {
        const auto pairs = static_cast<std::size_t>(c.tokens * c.top_k);
        const auto hidden = static_cast<std::size_t>(c.hidden);
        const std::size_t stride = hidden + (c.accumulate ? 3 : 0);
        Elements rows(rows_type, random_values(pairs * hidden, 3));
        Ints ids(pairs);
        Ints pair_row(pairs);
        Floats weights = random_values(pairs, 4);
        for (std::size_t p = 0; p < pairs; ++p) {
          ids[p] = static_cast<std::int32_t>(p * 5 % 11) - 1;  // -1 and 9 are skipped
          pair_row[p] = static_cast<std::int32_t>(pairs - 1 - p);
          if (p % 13 == 12) pair_row[p] = -1;
          const bool skipped = ids[p] < 0 || ids[p] >= kExperts || (c.with_plan && pair_row[p] < 0);
          // A row that must not be read.
          const std::size_t row = c.with_plan ? pairs - 1 - p : p;
          if (skipped) rows.set(row * hidden, kNan);
        }
        const Floats before = random_values(static_cast<std::size_t>(c.tokens) * stride, 6);
        Elements out(out_type, before);
        const op::Combine args{
            .rows = rows.data(),
            .rows_dtype = rows_type,
            .pair_row = c.with_plan ? pair_row.data() : nullptr,
            .routing = {ids.data(), weights.data(), c.tokens, c.top_k},
            .out = {out.data(), out_type, c.hidden, static_cast<std::int64_t>(stride)},
            .accumulate = c.accumulate,
            .num_experts = kExperts};
        emulation::options().seed = pairs % 3;
        ASSERT_EQ(cuda::launch_combine(args, nullptr), cuda::kOk);

        for (std::size_t t = 0; t < static_cast<std::size_t>(c.tokens); ++t) {
          for (std::size_t h = 0; h < stride; ++h) {
            const float was = rounded(out_type, before[t * stride + h]);
            const float got = out.get(t * stride + h);
            if (h >= hidden) {
              ASSERT_EQ(got, was) << "between rows";
              continue;
            }
            float sum = 0.0F;
            for (std::size_t slot = 0; slot < static_cast<std::size_t>(c.top_k); ++slot) {
              const std::size_t p = t * static_cast<std::size_t>(c.top_k) + slot;
              if (ids[p] < 0 || ids[p] >= kExperts) continue;
              if (c.with_plan && pair_row[p] < 0) continue;
              const auto row = c.with_plan ? static_cast<std::size_t>(pair_row[p]) : p;
              sum += weights[p] * rows.get(row * hidden + h);
            }
            if (c.accumulate) sum = was + sum;
            ASSERT_EQ(got, rounded(out_type, sum)) << "token " << t << ", column " << h;
          }
        }
      }
    }
  }
}

TEST(CombineOnDevice, WithoutWeightsAllOfThemAreOne) {
  constexpr std::size_t kTokens = 3, kTopK = 5, kHidden = 37;
  Elements rows(DType::F32, random_values(kTokens * kTopK * kHidden, 3));
  Ints ids(kTokens * kTopK, 0);
  ids[4] = -1;
  Floats ones(ids.size(), 1.0F);
  Floats with(kTokens * kHidden, kNan), without = with;
  op::Combine args;
  args.rows = rows.data();
  args.routing = {ids.data(), ones.data(), kTokens, kTopK};
  args.out = {with.data(), DType::F32, kHidden, kHidden};
  args.num_experts = 1;
  ASSERT_EQ(cuda::launch_combine(args, nullptr), cuda::kOk);
  args.out.data = without.data();
  args.routing.topk_weights = nullptr;
  ASSERT_EQ(cuda::launch_combine(args, nullptr), cuda::kOk);
  EXPECT_EQ(without, with);
}

TEST(RmsNormOnDevice, AgainstDoubleAndTheSameForEveryBatch) {
  constexpr std::int64_t kRows = 5;
  constexpr float kEps = 1e-3F;
  for (const DType dtype : kTypes) {
    for (const std::int64_t cols : {1, 3, 128, 333, 1024, 2052}) {
      const std::int64_t stride = cols + (cols == 1024 ? 4 : 1);
      const auto at = [&](std::int64_t r, std::int64_t c) {
        return static_cast<std::size_t>(r * stride + c);
      };
      Elements x(dtype, random_values(static_cast<std::size_t>(kRows * stride), 8));
      for (std::int64_t c = 0; c < cols; ++c) x.set(at(2, c), 0.0F);
      x.set(at(3, cols / 2), kNan);
      Floats weight = random_values(static_cast<std::size_t>(cols), 9);
      const auto run = [&](std::int64_t first, std::int64_t rows) {
        Floats out(static_cast<std::size_t>(rows * cols), -7.0F);
        op::RmsNorm args;
        args.x = {static_cast<const char*>(x.data()) + at(first, 0) * size_of(dtype),
                  dtype,
                  rows,
                  cols,
                  1,
                  stride,
                  0};
        args.weight = weight.data();
        args.out = out.data();
        args.eps = kEps;
        EXPECT_EQ(cuda::launch_rms_norm(args, nullptr), cuda::kOk);
        return out;
      };
      Floats out;
      for (const std::uint64_t seed : emulation::seeds()) {
        emulation::options().seed = seed;
        out = run(0, kRows);
        for (std::int64_t r = 0; r < kRows; ++r) {
          double square = 0.0;
          for (std::int64_t c = 0; c < cols; ++c) {
            const auto v = static_cast<double>(x.get(at(r, c)));
            square += v * v;
          }
          const double root =
              std::sqrt(square / static_cast<double>(cols) + static_cast<double>(kEps));
          for (std::int64_t c = 0; c < cols; ++c) {
            const float got = out[static_cast<std::size_t>(r * cols + c)];
            const auto w = static_cast<double>(weight[static_cast<std::size_t>(c)]);
            const double want = static_cast<double>(x.get(at(r, c))) / root * w;
            ASSERT_TRUE(std::isnan(want)
                            ? std::isnan(got)
                            : std::fabs(static_cast<double>(got) - want) <= 2e-6 * std::fabs(want))
                << "row " << r << ", column " << c << " of " << cols;
          }
        }
      }
      const Floats alone = run(1, 1);
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(), out.begin() + cols));
      EXPECT_TRUE(run(0, 0).empty());
    }
  }
}

TEST(LookUpOnDevice, RowsOfTheTableAndSkippedTokens) {
  for (const std::int32_t top_k : {1, 6}) {
    for (const std::int64_t tokens : {0, 7, 300}) {
      constexpr std::int64_t kRows = 11;
      Ints table(static_cast<std::size_t>(kRows * top_k));
      for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(100 + i);
      Ints token_ids(static_cast<std::size_t>(tokens));
      for (std::size_t t = 0; t < token_ids.size(); ++t) {
        token_ids[t] = static_cast<std::int32_t>(t * 5 % 13) - 1;  // -1 and 11 are no rows
      }
      if (tokens > 0) token_ids.back() = std::numeric_limits<std::int32_t>::min();
      Ints ids(static_cast<std::size_t>(tokens * top_k), 55);
      emulation::options().seed = 1;
      ASSERT_EQ(cuda::launch_look_up_experts({.table = table.data(),
                                              .num_rows = kRows,
                                              .token_ids = token_ids.data(),
                                              .out = {ids.data(), nullptr, tokens, top_k}},
                                             nullptr),
                cuda::kOk);
      for (std::size_t p = 0; p < ids.size(); ++p) {
        const std::size_t slots = static_cast<std::size_t>(top_k);
        const std::int32_t token = token_ids[p / slots];
        const bool known = token >= 0 && token < kRows;
        ASSERT_EQ(ids[p], known ? table[static_cast<std::size_t>(token) * slots + p % slots] : -1)
            << p;
      }
    }
  }
}

TEST(IdentityOnDevice, WeightsInSlotOrderAndTokensWithoutAny) {
  constexpr std::int64_t kTokens = 6;
  constexpr std::int32_t kTopK = 4, kFirst = 3, kCount = 2;
  // Identity ids are 3 and 4; 5, -1 and others are nobody's.
  Ints ids = {3, 0, 4,  3, /**/ 0,  1,  2, 5,  /**/ 4, 4, 4, 4,
              1, 3, -1, 0, /**/ -9, 99, 5, -1, /**/ 3, 1, 4, 2};
  Floats weights = {0.1F, 9.0F, 1e-8F, 0.7F, 1, 2, 3, 4, 0.3F,  -0.3F, 0.2F, 0.1F,
                    8,    0.5F, 3,     2,    1, 1, 1, 1, 0.25F, 2,     0.5F, 1};
  for (const DType dtype : kTypes) {
    for (const std::int64_t cols : {1, 37, 512, 1030}) {
      const std::int64_t stride = cols + (cols == 512 ? 4 : 3);
      const auto count = static_cast<std::size_t>(kTokens * stride);
      Elements x(dtype, random_values(count, 8));
      for (std::int64_t c = 0; c < cols; ++c) {
        x.set(static_cast<std::size_t>(1 * stride + c), kNan);  // a token without identity experts
        x.set(static_cast<std::size_t>(5 * stride + c), kNan);
      }
      const Floats before = random_values(count, 9);
      for (const std::uint64_t seed : emulation::seeds()) {
        Floats out = before;
        op::AddIdentity args;
        args.x = {x.data(), dtype, kTokens, cols, 1, stride, 0};
        args.routing = {ids.data(), weights.data(), kTokens, kTopK};
        args.out = {out.data(), DType::F32, cols, stride};
        args.first = kFirst;
        args.count = kCount;
        emulation::options().seed = seed;
        ASSERT_EQ(cuda::launch_add_identity(args, nullptr), cuda::kOk);
        for (std::size_t i = 0; i < count; ++i) {
          const std::size_t t = i / static_cast<std::size_t>(stride);
          float weight = 0.0F;
          for (std::size_t slot = 0; slot < kTopK; ++slot) {
            const std::size_t pair = t * kTopK + slot;
            if (ids[pair] == 3 || ids[pair] == 4) weight += weights[pair];
          }
          const bool inside = i % static_cast<std::size_t>(stride) < static_cast<std::size_t>(cols);
          const float want = inside && weight != 0.0F ? before[i] + weight * x.get(i) : before[i];
          ASSERT_TRUE(same(out[i], want)) << "token " << t << " of " << cols << " columns";
        }
      }
    }
  }
}

TEST(RouterLogitsOnDevice, AgainstDoubleAndTheSameForEveryBatch) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t cols : {1, 7, 128, 300}) {
      for (const std::int32_t experts : {1, 5, 33}) {
        const std::int64_t tokens = 21;
        const std::int64_t stride = cols + (cols == 300 ? 4 : 1);
        Elements x(dtype, random_values(static_cast<std::size_t>(tokens * stride), 8));
        Floats weight = random_values(static_cast<std::size_t>(experts * cols), 9);
        Floats logits(static_cast<std::size_t>(tokens * experts), kNan);
        op::RouterLogits args;
        args.x = {x.data(), dtype, tokens, cols, 1, stride, 0};
        args.weight = weight.data();
        args.logits = logits.data();
        args.num_experts = experts;
        emulation::options().seed = 1;
        ASSERT_EQ(cuda::launch_router_logits(args, nullptr), cuda::kOk);
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (std::int32_t e = 0; e < experts; ++e) {
            double sum = 0.0;
            double norm = 0.0;
            for (std::int64_t c = 0; c < cols; ++c) {
              const double product =
                  static_cast<double>(x.get(static_cast<std::size_t>(t * stride + c))) *
                  static_cast<double>(weight[static_cast<std::size_t>(e * cols + c)]);
              sum += product;
              norm += std::fabs(product);
            }
            ASSERT_NEAR(logits[static_cast<std::size_t>(t * experts + e)], sum, 3e-6 * norm);
          }
        }
        // Alone, a token runs in the other tile shape: the same bits.
        Floats alone(static_cast<std::size_t>(experts), kNan);
        args.x.data = static_cast<const char*>(args.x.data) +
                      static_cast<std::size_t>(17 * stride) * size_of(dtype);
        args.x.num_rows = 1;
        args.logits = alone.data();
        ASSERT_EQ(cuda::launch_router_logits(args, nullptr), cuda::kOk);
        for (std::int32_t e = 0; e < experts; ++e) {
          EXPECT_EQ(alone[static_cast<std::size_t>(e)],
                    logits[static_cast<std::size_t>(17 * experts + e)]);
        }
      }
    }
  }
}

TEST(ZeroSkippedOnDevice, OnlySkippedRows) {
  for (const std::int64_t cols : {1, 6, 640}) {
    const Ints ids = {0, -1, 3, 4, -9, 2};
    Floats out(static_cast<std::size_t>(cols) * ids.size(), kNan);
    ASSERT_EQ(cuda::launch_zero_skipped(
                  {.ids = ids.data(), .num_experts = 4, .out = out.data(), .rows = 6, .cols = cols},
                  nullptr),
              cuda::kOk);
    for (std::size_t r = 0; r < ids.size(); ++r) {
      for (std::size_t c = 0; c < static_cast<std::size_t>(cols); ++c) {
        const float got = out[r * static_cast<std::size_t>(cols) + c];
        EXPECT_TRUE(ids[r] < 0 || ids[r] >= 4 ? got == 0.0F : std::isnan(got));
      }
    }
  }
}

TEST(FillOnDevice, EveryByteAndNoOther) {
  for (const std::size_t skip : {0, 1, 7, 15}) {
    for (const std::size_t bytes : {0, 1, 15, 16, 17, 100, 5000}) {
      std::vector<unsigned char> memory(bytes + 64, 0x11);
      ASSERT_EQ(cuda::launch_fill({memory.data() + skip, static_cast<std::int64_t>(bytes), 0xA5},
                                  nullptr),
                cuda::kOk);
      for (std::size_t i = 0; i < memory.size(); ++i) {
        ASSERT_EQ(memory[i], i >= skip && i < skip + bytes ? 0xA5 : 0x11)
            << "byte " << i << " of " << bytes << " from " << skip;
      }
    }
  }
}

}  // namespace
}  // namespace moesaic
