#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/pages.hpp"
#include "compare.hpp"
#include "cpu/cpu_backend.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "moesaic/config.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"
#include "tensor.hpp"

namespace moesaic::cpu {
namespace {

using testing::kPoison;
using testing::random_values;
using testing::same_bits;

constexpr DType kFloats[] = {DType::F32, DType::F16, DType::BF16};

/// `values` stored as `dtype`.
std::vector<std::byte> encode(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  from_f32(values.data(), static_cast<std::int64_t>(values.size()), dtype, bytes.data(), 0);
  return bytes;
}
std::vector<float> decode(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  to_f32(bytes.data(), dtype, 0, static_cast<std::int64_t>(values.size()), values.data());
  return values;
}

/// The backend and a context of so many threads.
struct Cpu {
  CpuBackend backend;
  Context context;
  explicit Cpu(int threads) : context(backend, Tuning{}, std::make_shared<ThreadPool>(threads)) {}

  void router_logits(const InputRows& x, const std::vector<float>& weight, std::int32_t experts,
                     std::vector<float>& logits) {
    backend.router_logits(
        context,
        {.x = x, .weight = weight.data(), .num_experts = experts, .logits = logits.data()});
  }
};

TEST(Convert, EveryHalfAndBrainValue) {
  std::vector<std::uint16_t> words(65536);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::uint16_t>(i);
  std::vector<float> values(words.size(), kPoison);
  to_f32(words.data(), DType::F16, 0, 65536, values.data());
  for (std::size_t i = 0; i < words.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]),
              std::bit_cast<std::uint32_t>(f16_to_f32(words[i])))
        << i;
  }
  to_f32(words.data(), DType::BF16, 0, 65536, values.data());
  for (std::size_t i = 0; i < words.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]),
              std::bit_cast<std::uint32_t>(bf16_to_f32(words[i])))
        << i;
  }
}

TEST(Convert, RoundsAsTheScalarDefinition) {
  testing::Random random(7);
  std::vector<float> values;
  for (int i = 0; i < 400000; ++i) {
    values.push_back(std::bit_cast<float>(random.bits()));
  }
  for (std::uint32_t half = 0; half < 0x7c01; ++half) {  // each boundary and its neighbours
    const float low = f16_to_f32(static_cast<std::uint16_t>(half));
    const float high = f16_to_f32(static_cast<std::uint16_t>(half + 1));
    const float middle = 0.5F * (low + high);
    for (const float value :
         {low, middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 1e9F)}) {
      values.push_back(value);
      values.push_back(-value);
    }
  }
  for (const float value :
       {65504.0F, 65519.996F, 65520.0F, 1e30F, INFINITY, -INFINITY, NAN, 0.0F, -0.0F}) {
    values.push_back(value);
  }
  const auto count = static_cast<std::int64_t>(values.size());
  std::vector<std::uint16_t> words(values.size());
  from_f32(values.data(), count, DType::F16, words.data(), 0);
  for (std::size_t i = 0; i < values.size(); ++i)
    ASSERT_EQ(words[i], f32_to_f16(values[i])) << values[i];
  from_f32(values.data(), count, DType::BF16, words.data(), 0);
  for (std::size_t i = 0; i < values.size(); ++i)
    ASSERT_EQ(words[i], f32_to_bf16(values[i])) << values[i];
}

TEST(Ranges, CoverInOrderAndStaySmall) {
  EXPECT_EQ(chunk_count(0, 100, 4), 0);
  EXPECT_EQ(chunk_count(10, 100, 4), 1);  // tiny work stays on the caller's thread
  EXPECT_EQ(chunk_count(100, kMinChunkWork, 4), 16);
  EXPECT_EQ(chunk_count(3, kMinChunkWork * 10, 4), 3);
  ThreadPool pool(3);
  for (const std::int64_t items : {0, 1, 5, 100, 1001}) {
    std::vector<int> seen(static_cast<std::size_t>(items), 0);
    parallel_ranges(pool, items, kMinChunkWork, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), items);
  }
}

TEST(RouterLogits, MatchesF64ForEveryShapeAndType) {
  Cpu cpu(3);
  for (const DType dtype : kFloats) {
    for (const std::int64_t hidden : {1, 7, 8, 64, 100, 1023, 1024, 1025, 2060}) {
      for (const std::int32_t experts : {1, 3, 16, 17, 61}) {
        for (const std::int64_t tokens : {1, 2, 5, 33}) {
          const auto x = encode(random_values(tokens * hidden, 1), dtype);
          const auto values = decode(x, dtype);
          const auto weight = random_values(experts * hidden, 2);
          std::vector<float> logits(static_cast<std::size_t>(tokens * experts), kPoison);
          cpu.router_logits(dense_rows(x.data(), dtype, tokens, hidden), weight, experts, logits);
          for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t e = 0; e < experts; ++e) {
              double sum = 0.0;
              double size = 0.0;
              for (std::int64_t k = 0; k < hidden; ++k) {
                const double product =
                    static_cast<double>(values[t * hidden + k]) * weight[e * hidden + k];
                sum += product;
                size += std::abs(product);
              }
              ASSERT_NEAR(logits[t * experts + e], sum, 4e-6 * size + 1e-30)
                  << name_of(dtype) << " H " << hidden << " E " << experts << " T " << tokens;
            }
          }
        }
      }
    }
  }
}

TEST(RouterLogits, IndependentOfBatchThreadsAndStrides) {
  constexpr std::int64_t kTokenCount = 37;
  constexpr std::int64_t kHidden = 1300;
  constexpr std::int32_t kExpertCount = 70;
  constexpr std::int64_t kStride = kHidden + 11;
  const auto x = random_values(kTokenCount * kStride, 3);
  const auto weight = random_values(kExpertCount * kHidden, 4);
  InputRows rows = dense_rows(x.data(), DType::F32, kTokenCount, kHidden);
  rows.outer_stride = kStride;
  std::vector<float> whole(kTokenCount * kExpertCount, kPoison);
  Cpu one(1);
  one.router_logits(rows, weight, kExpertCount, whole);
  for (const int threads : {2, 5}) {
    Cpu cpu(threads);
    std::vector<float> again(whole.size(), kPoison);
    cpu.router_logits(rows, weight, kExpertCount, again);
    EXPECT_TRUE(same_bits(whole, again));
  }
  for (std::int64_t t = 0; t < kTokenCount; ++t) {
    std::vector<float> single(kExpertCount, kPoison);
    one.router_logits(dense_rows(x.data() + t * kStride, DType::F32, 1, kHidden), weight,
                      kExpertCount, single);
    EXPECT_EQ(
        std::memcmp(single.data(), whole.data() + t * kExpertCount, sizeof(float) * kExpertCount),
        0);
  }
}

TEST(RouterLogits, OneTokenIsFast) {
#if !defined(NDEBUG) || defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "timing of an optimised build";
#endif
  const auto x = random_values(2048, 5);
  const auto weight = random_values(128 * 2048, 6);
  std::vector<float> logits(128);
  Cpu one(1);
  double best = 1e9;
  for (int i = 0; i < 300; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    one.router_logits(dense_rows(x.data(), DType::F32, 1, 2048), weight, 128, logits);
    const std::chrono::duration<double, std::micro> elapsed =
        std::chrono::steady_clock::now() - begin;
    best = std::min(best, elapsed.count());
  }
  RecordProperty("microseconds", std::to_string(best));
  EXPECT_LT(best, 100.0);  // a few times the usual figure: a scalar loop takes longer
}

TEST(Gather, PicksStridedRowsOfEveryType) {
  Cpu cpu(3);
  constexpr std::int64_t kCols = 129;
  const std::vector<std::int32_t> index{3, 0, -1, 3, 5, 4};
  for (const DType dtype : kFloats) {
    const auto x = encode(random_values(6 * 200, 8), dtype);
    const auto values = decode(x, dtype);
    // [3, 2, kCols]: two rows 150 elements apart in each group of 400
    const InputRows rows{.data = x.data(),
                         .dtype = dtype,
                         .num_rows = 6,
                         .cols = kCols,
                         .inner_count = 2,
                         .outer_stride = 400,
                         .inner_stride = 150};
    std::vector<float> out(index.size() * kCols + 1, kPoison);
    cpu.backend.gather(cpu.context, {.x = rows,
                                     .index = index.data(),
                                     .rows = static_cast<std::int64_t>(index.size()),
                                     .out = out.data()});
    for (std::size_t r = 0; r < index.size(); ++r) {
      for (std::int64_t c = 0; c < kCols; ++c) {
        const float expected =
            index[r] < 0 ? 0.0F : values[(index[r] / 2) * 400 + (index[r] % 2) * 150 + c];
        ASSERT_EQ(out[r * kCols + c], expected);
      }
    }
    EXPECT_TRUE(std::isnan(out.back()));
  }
}

TEST(Activate, MatchesTheScalarDefinition) {
  Cpu cpu(3);
  constexpr std::int64_t kRows = 40;
  constexpr std::int64_t kWidth = 203;
  const auto gate_up = random_values(kRows * 2 * kWidth, 9, 5.0F);
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    for (const float linear_beta : {0.0F, 2.0F}) {
      Activation activation{.kind = static_cast<ActivationKind>(kind), .linear_beta = linear_beta};
      activation.beta = 3.0F;
      std::vector<float> hidden(kRows * kWidth + 1, kPoison);
      cpu.backend.activate(cpu.context, {.activation = activation,
                                         .gate = gate_up.data(),
                                         .up = gate_up.data() + kWidth,
                                         .row_stride = 2 * kWidth,
                                         .rows = kRows,
                                         .intermediate = kWidth,
                                         .hidden = hidden.data()});
      for (std::int64_t r = 0; r < kRows; ++r) {
        for (std::int64_t i = 0; i < kWidth; ++i) {
          const float g = gate_up[r * 2 * kWidth + i];
          const float u = gate_up[r * 2 * kWidth + kWidth + i];
          const float expected = activate(activation, g, u);
          ASSERT_NEAR(hidden[r * kWidth + i], expected, 2e-6 * std::abs(expected) + 2e-6)
              << name_of(activation.kind) << " g " << g << " u " << u;
        }
      }
      EXPECT_TRUE(std::isnan(hidden.back()));
    }
  }
}

TEST(Activate, ExtremesAndUngated) {
  Cpu one(1);
  const float huge = std::numeric_limits<float>::max();
  const std::vector<float> gate{-1e4F, -100.0F, -88.0F, 0.0F, 88.8F, 1e4F, huge, NAN, 1e-20F};
  const std::vector<float> up(gate.size(), 1.0F);
  const auto count = static_cast<std::int64_t>(gate.size());
  std::vector<float> hidden(gate.size(), kPoison);
  op::Activate call{.activation = {},
                    .gate = gate.data(),
                    .up = up.data(),
                    .row_stride = count,
                    .rows = 1,
                    .intermediate = count,
                    .hidden = hidden.data()};
  one.backend.activate(one.context, call);
  for (std::size_t i = 0; i < gate.size(); ++i) {
    if (std::isnan(gate[i])) {
      EXPECT_TRUE(std::isnan(hidden[i]));
    } else {
      const double expected = gate[i] / (1.0 + std::exp(-static_cast<double>(gate[i])));
      EXPECT_NEAR(hidden[i], expected, 1e-6 * std::abs(expected) + 1e-36) << gate[i];
    }
  }
  call.activation.kind = ActivationKind::ReluSquared;
  call.gate = nullptr;
  call.up = gate.data();
  one.backend.activate(one.context, call);
  EXPECT_EQ(hidden[1], 0.0F);
  EXPECT_EQ(hidden[4], 88.8F * 88.8F);
}

struct CombineCase {
  std::int64_t tokens, hidden;
  std::int32_t top_k;
};

TEST(Combine, MatchesTheSumInSlotOrder) {
  Cpu cpu(3);
  for (const CombineCase c :
       {CombineCase{1, 2048, 8}, {5, 33, 3}, {70, 513, 4}, {3, 1, 1}, {0, 8, 2}}) {
    const std::int64_t pairs = c.tokens * c.top_k;
    const std::int64_t stride = c.hidden + 5;
    const auto rows = random_values(pairs * c.hidden, 10);
    auto weights = random_values(pairs, 11);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(pairs));
    std::vector<std::int32_t> pair_row(ids.size());
    for (std::size_t p = 0; p < ids.size(); ++p) {
      ids[p] = p % 5 == 2 || (p < 1 && c.tokens > 1) ? -1 : static_cast<std::int32_t>(p % 7);
      pair_row[p] = ids[p] < 0 ? -1 : static_cast<std::int32_t>(ids.size() - 1 - p);
      if (ids[p] < 0) weights[p] = kPoison;
    }
    for (const bool packed : {false, true}) {
      for (const bool accumulate : {false, true}) {
        for (const DType dtype : kFloats) {
          const auto before =
              accumulate ? random_values(c.tokens * stride, 12)
                         : std::vector<float>(static_cast<std::size_t>(c.tokens * stride), kPoison);
          auto out = encode(before, dtype);
          const auto start = decode(out, dtype);
          op::Combine call;
          call.rows = rows.data();
          call.pair_row = packed ? pair_row.data() : nullptr;
          call.routing = {ids.data(), weights.data(), c.tokens, c.top_k};
          call.out = {.data = out.data(), .dtype = dtype, .cols = c.hidden, .stride = stride};
          call.accumulate = accumulate;
          cpu.backend.combine(cpu.context, call);
          const auto result = decode(out, dtype);
          for (std::int64_t t = 0; t < c.tokens; ++t) {
            for (std::int64_t h = 0; h < c.hidden; ++h) {
              float sum = 0.0F;
              for (std::int64_t p = t * c.top_k; p < (t + 1) * c.top_k; ++p) {
                if (ids[p] < 0) continue;
                sum += weights[p] * rows[(packed ? pair_row[p] : p) * c.hidden + h];
              }
              if (accumulate) sum = start[t * stride + h] + sum;
              float expected = 0.0F;
              const auto rounded = encode({sum}, dtype);
              to_f32(rounded.data(), dtype, 0, 1, &expected);
              ASSERT_EQ(result[t * stride + h], expected)
                  << name_of(dtype) << " t " << t << " h " << h;
            }
            for (std::int64_t h = c.hidden; h < stride; ++h) {  // nothing written between the rows
              ASSERT_EQ(std::isnan(result[t * stride + h]), !accumulate);
            }
          }
        }
      }
    }
  }
}

TEST(Route, SplitsRowsWithoutChangingThem) {
  constexpr std::int64_t kTokenCount = 300;
  RouterConfig config;
  config.num_experts = 64;
  config.top_k = 6;
  auto logits = random_values(kTokenCount * 64, 13);
  for (const std::int64_t bad : {0, 150, 299}) logits[bad * 64 + 3] = NAN;
  Routing serial(kTokenCount, 6);
  std::vector<float> scratch(static_cast<std::size_t>(route_scratch_elems(config)));
  op::Route call = route_by(config);
  call.logits = logits.data();
  call.row_stride = 64;
  call.out = serial.view();
  call.scratch = scratch.data();
  const RouteStats expected = route_rows(call);
  EXPECT_EQ(expected.nonfinite_rows, 3);
  Cpu cpu(4);
  Routing parallel(kTokenCount, 6);
  std::fill(parallel.topk_ids().begin(), parallel.topk_ids().end(), -7);
  scratch.assign(4 * scratch.size(), kPoison);
  call.out = parallel.view();
  call.scratch = scratch.data();
  const RouteStats stats = cpu.backend.route(cpu.context, call);
  EXPECT_EQ(stats.nonfinite_rows, expected.nonfinite_rows);
  EXPECT_TRUE(std::ranges::equal(serial.topk_ids(), parallel.topk_ids()));
  EXPECT_TRUE(std::ranges::equal(serial.topk_weights(), parallel.topk_weights()));
}

TEST(Arena, ZeroedAndAligned) {
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{5000},
                                  (std::size_t{4} << 20) + 1, std::size_t{9} << 20}) {
    const auto memory = allocate_pages(bytes);
    ASSERT_NE(memory, nullptr);
    const std::uintptr_t alignment = bytes >= (std::size_t{4} << 20) ? std::uintptr_t{2} << 20 : 64;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.get()) % alignment, 0U);
    EXPECT_TRUE(std::all_of(memory.get(), memory.get() + bytes,
                            [](std::byte b) { return b == std::byte{0}; }));
    std::fill_n(memory.get(), bytes, std::byte{1});
  }
}

TEST(Arena, SaysHowMuchWasAsked) {
  for (const std::size_t bytes : {std::numeric_limits<std::size_t>::max(), std::size_t{1} << 60}) {
    try {
      allocate_pages(bytes);
      FAIL() << "allocated " << bytes;
    } catch (const OutOfMemoryError& error) {
      EXPECT_NE(std::string(error.what()).find(std::to_string(bytes)), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace moesaic::cpu
